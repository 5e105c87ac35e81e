"""fewer: fewer tokens, same answer. One interface to token compression in transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fewer.compress import compress, step
from fewer.methods import METHODS
from fewer.monitor import Monitor
from fewer.prompts import protect
from fewer.prompts.bill import Bill, Prices, Worth, bill, worth
from fewer.prompts.chat import compress_messages
from fewer.prompts.chat_result import ChatCompression, restore_messages
from fewer.prompts.compression import Compression, restore
from fewer.prompts.front import compress_prompt
from fewer.report import Report
from fewer.types import (
    Allocation,
    Budget,
    BudgetError,
    Card,
    FewerError,
    FewerWarning,
    Method,
    MissingSignal,
    Plan,
    Site,
    Tokens,
    UnknownName,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from fewer import cost
    from fewer.adapters.hf_cache import Cache
    from fewer.tuning.dial import tune
    from fewer.tuning.planfile import TunedPlan

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Allocation",
    "Bill",
    "Budget",
    "BudgetError",
    "Cache",
    "Card",
    "ChatCompression",
    "Compression",
    "FewerError",
    "FewerWarning",
    "Method",
    "MissingSignal",
    "Monitor",
    "Plan",
    "Prices",
    "Report",
    "Site",
    "Tokens",
    "TunedPlan",
    "UnknownName",
    "UnsupportedModel",
    "Worth",
    "bill",
    "compress",
    "compress_messages",
    "compress_prompt",
    "cost",
    "protect",
    "restore",
    "restore_messages",
    "step",
    "tune",
    "worth",
]


_LATER = {
    "Cache": "fewer.adapters.hf_cache",  # it subclasses a transformers class, which `import fewer` does not load
    "TunedPlan": "fewer.tuning.planfile",
    "tune": "fewer.tuning.dial",
}


def __getattr__(name: str) -> Any:
    if name == "cost":  # a module, which few need
        return import_module("fewer.cost")
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'fewer' has no attribute {name!r}")
