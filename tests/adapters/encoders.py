"""Small encoders of every transformers family that fewer knows, with inputs for each; and one built as timm's are."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class Attention(nn.Module):
    """What it reads and gives is there to look at, the latest call's."""

    def __init__(self, relative: Tensor | None) -> None:
        super().__init__()
        self.qkv, self.relative = nn.Linear(32, 96), relative

    def forward(self, x: Tensor) -> Tensor:
        self.query, self.key, value = self.qkv(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        self.out = F.scaled_dot_product_attention(self.query, self.key, value, attn_mask=self.relative)
        return self.out.transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, relative: Tensor | None) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(32), Attention(relative), nn.LayerNorm(32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.ls1, self.drop_path1, self.ls2, self.drop_path2 = (nn.Identity() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        done: Tensor = x + self.mlp(self.norm2(x))
        return done


class Plain(nn.Module):
    """An encoder as timm builds them, of 36 patches, which counts the `prefix` tokens before them. `relative` gives its
    blocks a bias between tokens. `classed` says what it has by the name of a class token: one, None, or nothing."""

    def __init__(self, prefix: int, classed: str = "one", relative: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_prefix_tokens, self.first = prefix, nn.Parameter(torch.randn(1, prefix, 32))
        if classed != "nothing":
            self.cls_token = nn.Parameter(torch.randn(1, 1, 32)) if classed == "one" else None
        self.patch_embed, self.place = nn.Conv2d(3, 32, 4, 4), nn.Parameter(torch.randn(1, 36, 32))
        self.patch_embed.num_patches = 36  # type: ignore[assignment]
        n = prefix + 36
        self.blocks = nn.Sequential(*(Block(3 * torch.randn(1, 4, n, n) if relative else None) for _ in range(4)))
        for parameter in self.requires_grad_(False).parameters():
            if parameter.ndim == 2:  # heads that look at few tokens
                parameter.mul_(3)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels).flatten(2).mT + self.place
        done: Tensor = self.blocks(torch.cat([self.first.expand(len(x), -1, -1), x], 1))
        return done
