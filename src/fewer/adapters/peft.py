"""PEFT's wrappers: the model that one adapts, with LoRA layers in it, does the work, and the wrapper calls it."""

from typing import Any

from torch import nn

from fewer.errors import UnsupportedModel


def bare(model: Any, *, to_run: bool = False) -> Any:
    """The model inside a `PeftModel`, with its adapters in place; any other as it is.

    What is done to it holds for the wrapper too, whose forward and `generate` are its own. Where fewer is `to_run` it
    by itself, a wrapper with a tuned prompt, which nobody else puts before the text, raises `UnsupportedModel`.
    """
    inner = getattr(model, "get_base_model", None)
    if not callable(inner):
        return model
    if to_run and getattr(model.active_peft_config, "is_prompt_learning", False):
        raise UnsupportedModel(
            f"{type(model).__name__} puts a tuned prompt before the text ({type(model.active_peft_config).__name__}), "
            "which would be missing here; pass a model whose adapters are layers, such as LoRA's"
        )
    return inner()


def adding(model: nn.Module) -> list[str]:
    """Which adapters a model's layers add now, and times what, which no weight says: empty where there are none."""
    return [
        f"{name}+{adapter}*{getattr(layer, 'scaling', {}).get(adapter, 1)}"
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "active_adapters", None), list) and not layer.disable_adapters
        for adapter in layer.active_adapters
    ]
