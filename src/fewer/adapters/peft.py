"""PEFT's wrappers: the model that one adapts, with LoRA layers in it, does the work, and the wrapper calls it."""

from typing import Any


def bare(model: Any) -> Any:
    """The model inside a `PeftModel`, with its adapters in place; any other as it is.

    What is done to it holds for the wrapper too, whose forward and `generate` are its own.
    """
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model
