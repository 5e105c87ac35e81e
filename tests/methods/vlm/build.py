"""Visual tokens made by hand, as a host would hand them to a method, and what it decides of them."""

from typing import Any

import torch
from torch import Tensor

from fewer.compress import step
from fewer.signals.visual import Layout, Looked, Places, Question, TextAttention, Tower, TowerView
from fewer.types import Budget, Site, Tokens


def random(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that are the same on every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lay(grids: list[tuple[int, int]], whole: tuple[int, ...] = (), regions: Tensor | None = None) -> Layout:
    """All cells of the crops of one picture, crop by crop, row by row."""
    crop = torch.cat([torch.full((h * w,), i) for i, (h, w) in enumerate(grids)])
    y = torch.cat([torch.arange(h).repeat_interleave(w) for h, w in grids])
    x = torch.cat([torch.arange(w).repeat(h) for h, w in grids])
    return Layout(torch.zeros_like(crop), crop, y, x, tuple(grids), whole, regions)


def view(n: int, heads: int = 2, d: int = 4, seed: int = 0, attention: Tensor | None = None) -> TowerView:
    """What a tower might say: attention from random logits, or from these numbers (one row is one head)."""
    keys = random(heads, n, d, seed=seed + 100)
    if attention is not None:
        attention = attention.view(-1, n).float()
        return TowerView(attention, attention.clamp(min=1e-9).log(), keys[: len(attention)])
    logits = random(heads, n, seed=seed + 200)
    return TowerView(logits.softmax(-1), logits, keys)


def place(
    n: int,
    d: int = 8,
    grid: tuple[int, int] | None = None,
    seed: int = 0,
    features: Tensor | None = None,
    layout: Layout | None = None,
    tower: Any = None,
    question: Tensor | None = None,
    looked: Looked | None = None,
    site: Site | None = None,
) -> Tokens:
    """One picture's visual tokens. `tower` may be a TowerView, a row of attention, or True for random numbers."""
    features = random(1, n, d, seed=seed) if features is None else features.view(1, n, -1).float()
    if layout is None:
        layout = lay([grid or (1, n)])
    signals: dict[type, Any] = {Places: layout}
    if tower is not None:
        made = tower if isinstance(tower, TowerView) else None
        signals[Tower] = made or view(n, seed=seed, attention=None if tower is True else torch.as_tensor(tower))
    if question is not None:
        signals[Question] = question
    if looked is not None:
        signals[TextAttention] = looked
    none = torch.zeros(1, n, dtype=torch.bool)
    return Tokens(
        features, torch.arange(n).unsqueeze(0), none, none, torch.tensor([n]), signals=signals,
        site=site or Site(-1, 32, "prefill", 0, layout.grid),
    )  # fmt: skip


def decide(method: Any, tokens: Tokens, count: int) -> Any:
    """The plan that leaves so many, checked as in use."""
    return step(method, Budget(count, tokens=count), tokens)


def kept(plan: Any) -> list[int]:
    """Who gives the slots their places."""
    survivors: list[int] = plan.survivors[0].tolist()
    return survivors
