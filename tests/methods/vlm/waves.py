"""Numbers without a generator, that are the same everywhere; videos; and a method's decision about them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fewer
from fewer.compress import step
from fewer.signals.visual import Layout
from fewer.types import Budget, Tokens
from tests.methods.vlm.build import lay
from tests.vlms import FAMILIES


def waves(n: int, d: int) -> Tensor:
    return torch.sin(torch.arange(n * d, dtype=torch.float64).view(n, d) ** 1.5).float()


def video(frames: int, rows: int, columns: int) -> Layout:
    return replace(lay([(rows, columns)] * frames), video=True)


def drifting() -> Tensor:
    """Four frames of nine tokens: three that are nearly alike, and one that is not."""
    still = [waves(9, 12) + 0.05 * i * waves(36, 12)[9 * i : 9 * i + 9] for i in range(3)]
    return torch.cat([*still, waves(36, 12)[27:]])


def decide(method: Any, tokens: Tokens, keep: int) -> Any:
    return step(method, Budget(keep, tokens=keep), tokens)


def kept(method: Any, tokens: Tokens, keep: int) -> list[int]:
    """The survivors' indices."""
    found: list[int] = decide(method, tokens, keep).survivors[0].tolist()
    return found


@torch.no_grad()
def through(name: str, family: str, keep: float = 0.4, **inputs: Any) -> Any:
    """A tiny model's run, with one image in its first row and two in the second, or with videos."""
    case = FAMILIES[family]()
    given = case.inputs([1, 1] if inputs else [1, 2], **inputs)
    with fewer.compress(case.model, name, keep=keep) as run:
        out = case.model(**given)
    assert bool(out.logits[:, -1].isfinite().all())
    for row in run.pictures:
        for one in row:
            assert len(one.alive) == max(1, -(-len(one.layout) * 4 // 10)) or keep != 0.4
    return run
