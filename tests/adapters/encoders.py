"""Small encoders of every transformers family that fewer knows, with inputs for each."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

SIZES: Mapping[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
FAMILIES = ("vit", "deit", "dinov2", "dinov2_with_registers", "clip_vision_model", "siglip_vision_model", "bert")
IMAGES = tuple(name for name in FAMILIES if name != "bert")
PREFIX = {
    "vit": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 5, "clip_vision_model": 1, "siglip_vision_model": 0,
}  # fmt: skip


@cache
def encoder(family: str, **more: Any) -> Any:
    import transformers

    known = {
        "vit": ("ViT", {"image_size": 96, "patch_size": 16}),
        "deit": ("DeiT", {"image_size": 96, "patch_size": 16}),
        "dinov2": ("Dinov2", {"image_size": 84, "patch_size": 14}),
        "dinov2_with_registers": ("Dinov2WithRegisters", {"image_size": 84, "patch_size": 14}),
        "clip_vision_model": ("CLIPVision", {"image_size": 96, "patch_size": 16}),
        "siglip_vision_model": ("SiglipVision", {"image_size": 96, "patch_size": 16, "vision_use_head": False}),
        "bert": ("Bert", {"vocab_size": 99}),
    }
    name, sizes = known[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **sizes, **more})
    model = getattr(transformers, f"{name}Model")(config).eval()
    for parameter in model.parameters():  # fresh layer scales and biases are ones and zeros, which hides mistakes
        if parameter.ndim < 2:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def inputs(family: str, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    if family == "bert":
        return {"input_ids": torch.randint(5, 99, (rows, 24), generator=draw)}
    size = 84 if family.startswith("dinov2") else 96
    return {"pixel_values": torch.randn(rows, 3, size, size, generator=draw)}


@torch.no_grad()
def output(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = model(**given).last_hidden_state
    return found
