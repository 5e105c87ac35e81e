"""Small timm encoders with random weights, one of each kind; and what several tests do with them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fewer.types import Allocation, Card, Plan

timm = pytest.importorskip("timm", reason="timm is not installed here: make test-timm runs these")

SMALL: dict[str, Any] = {"embed_dim": 32, "num_heads": 2, "depth": 3, "img_size": 64, "num_classes": 5}
HOSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True, "init_values": 1.0}),
    "deit3": ("deit3_small_patch16_224", {}),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {}),
    "vit average": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "eva02": ("eva02_tiny_patch14_224", {"img_size": 56}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "rope": ("vit_small_patch16_rope_224", {}),
    "rope mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "relpos": ("vit_relpos_small_patch16_224", {}),
    "naflex": ("naflexvit_base_patch16_gap", {"img_size": None, "pos_embed_grid_size": (4, 4)}),
}
PREFIX = {"dinov2 registers": 5, "dinov3": 5, "deit distilled": 2, "naflex": 4}
PREFIX |= dict.fromkeys(("vit average", "siglip", "relpos"), 0)
POOLED = ("vit average", "siglip", "relpos", "naflex", "beit", "eva02")
ROTARY = ("eva02", "dinov3", "rope", "rope mixed")
RELATIVE = ("beit", "relpos")
PLAIN = [name for name in HOSTS if name not in (*ROTARY, *RELATIVE)]
"""Hosts whose blocks know no positions."""
PATCHES = 16


def prefix(name: str) -> int:
    return PREFIX.get(name, 1)


def host(name: str, **how: Any) -> Any:
    """A host in which every part counts: no LayerScale near zero, no bias table of zeros."""
    model, own = HOSTS[name]
    args = {key: value for key, value in {**SMALL, **own, **how}.items() if value is not None}
    torch.manual_seed(0)
    made = timm.create_model(model, **args).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.ndim == 1 else 0.1)
    return made.requires_grad_(False)


def images(name: str, rows: int = 2, seed: int = 0) -> Tensor:
    size = {"dinov2 registers": 56, "eva02": 56}.get(name, 64)
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(seed))


def entering(model: Any, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The tokens that come to the first block, and what comes with them."""
    seen: list[Any] = []
    hook = model.blocks[0].register_forward_pre_hook(
        lambda _, args, named: seen.append((args, named)), with_kwargs=True
    )
    model.forward_features(x)
    hook.remove()
    (tokens, *_), named = seen[0]
    return tokens, named


def with_tokens(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    """Let the first block get these tokens, whatever the picture; gives the function that ends it."""
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: (tokens, *args[1:]))  # type: ignore[union-attr,index]
    return hook.remove


@dataclass(frozen=True)
class Given:
    """A method that does what it is told: at each layer named, these slots, -1 for who leaves."""

    slots: dict[int, Tensor]

    card: ClassVar[Card] = Card(source="tests", faithfulness="own")
    needs: ClassVar[frozenset[Any]] = frozenset()
    exact: ClassVar[bool] = False

    def places(self, layers: int) -> list[int]:
        return list(self.slots)

    def score(self, tokens: Any) -> Tensor:
        return torch.zeros(tokens.positions.shape)

    def allocate(self, tokens: Any, scores: Tensor, budget: Any) -> Allocation:
        return Allocation(self.slots[tokens.site.layer].max(-1).values + 1)

    def reduce(self, tokens: Any, scores: Tensor, allocation: Allocation) -> Plan:
        slot = self.slots[tokens.site.layer]
        mass = torch.ones(slot.shape) if tokens.mass is None else tokens.mass
        first = torch.stack([(slot == s).int().argmax(-1) for s in range(int(slot.max()) + 1)], -1)
        total = torch.zeros(first.shape).scatter_add(-1, slot.clamp(min=0), mass * (slot >= 0))
        weight = torch.where(slot < 0, 0, mass / total.gather(-1, slot.clamp(min=0)))
        return Plan(slot, weight, first, mass=total)


def reduced(x: Tensor, slot: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Every slot as the mean of its members by mass, slot by slot; and its mass."""
    rows, masses = [], []
    for row in range(len(x)):
        members = [(slot[row] == s).nonzero().flatten() for s in range(int(slot[row].max()) + 1)]
        masses.append(torch.stack([mass[row, m].sum() for m in members]))
        rows.append(torch.stack([(x[row, m] * mass[row, m, None]).sum(0) / mass[row, m].sum() for m in members]))
    return torch.stack(rows), torch.stack(masses)
