"""Questions about documents: what a compressor of prompts is measured on, made offline and from a seed."""

from fewer_eval.asked.base import Asked, Setting
from fewer_eval.asked.code import CODE
from fewer_eval.asked.facts import MEETINGS, MULTI_DOCUMENT, TWO_HOP
from fewer_eval.asked.threads import THREADS

SETTINGS: dict[str, Setting] = {setting.name: setting for setting in (MULTI_DOCUMENT, TWO_HOP, MEETINGS, CODE, THREADS)}

__all__ = ["SETTINGS", "Asked", "Setting"]
