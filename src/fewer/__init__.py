"""fewer: fewer tokens, same answer. One interface to token compression in transformers."""

from typing import TYPE_CHECKING, Any

from fewer.compress import compress, step
from fewer.methods import METHODS
from fewer.prompts import protect
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
    from fewer.adapters.hf_cache import Cache

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Allocation",
    "Budget",
    "BudgetError",
    "Cache",
    "Card",
    "Compression",
    "FewerError",
    "FewerWarning",
    "Method",
    "MissingSignal",
    "Plan",
    "Report",
    "Site",
    "Tokens",
    "UnknownName",
    "UnsupportedModel",
    "compress",
    "compress_prompt",
    "protect",
    "restore",
    "step",
]


def __getattr__(name: str) -> Any:
    if name == "Cache":  # it subclasses a transformers class, which `import fewer` does not load
        from fewer.adapters.hf_cache import Cache

        return Cache
    raise AttributeError(f"module 'fewer' has no attribute {name!r}")
