"""Windows of real text, and sentences planted in them."""

import random
import re
from collections.abc import Sequence

from fewer_eval.text import prose

_SENTENCE_END = re.compile(r"[.!?][\"')]*\s+$")


def window(rng: random.Random, words: int) -> list[str]:
    """The text from a random sentence on, word by word with the space after it, at least `words` long if it can be.

    A window longer than the text starts at the text's beginning.
    """
    text = re.findall(r"\S+\s*", prose())
    starts = [0, *(at for at in range(1, len(text) - words) if _SENTENCE_END.search(text[at - 1]))]
    return text[rng.choice(starts) :]


def plant(text: Sequence[str], sentences: Sequence[str], depths: Sequence[float]) -> str:
    """Put each sentence at the end of the text's sentence nearest to its depth (0 is before all, 1 after all)."""
    ends = [0, *(at for at in range(1, len(text)) if _SENTENCE_END.search(text[at - 1])), len(text)]
    planted: dict[int, list[str]] = {}
    for sentence, depth in zip(sentences, depths, strict=True):
        at = min(ends, key=lambda end: abs(end - depth * len(text)))
        planted.setdefault(at, []).append(sentence)
    parts: list[str] = []
    for at in range(len(text) + 1):
        if at in planted:
            gap = "" if not parts or parts[-1][-1].isspace() else " "
            parts.append(gap + " ".join(planted[at]) + " ")
        if at < len(text):
            parts.append(text[at])
    return "".join(parts).strip()
