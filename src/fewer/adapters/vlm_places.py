"""Positions of visual tokens: made compact, moved to centroids; and queries and keys without them."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewer.adapters.hf_passed import Passed
from fewer.types import MissingSignal, Reduction


def compacted(places: Tensor, kept: Tensor, visual: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Positions without gaps, and by how much each row's later tokens come earlier.

    Text goes on by ones; every run of visual tokens is ranked, axis by axis, and what comes next starts after the
    highest rank: one axis is counted through, and of three (time, rows, columns) each closes its own gaps.

    Args:
        places: position ids `(b, q)`, or `(3 or 4, b, q)`.
        kept: the columns that go on, `(b, k)`, -1 for none.
        visual: of each row, the columns of visual tokens.
    """
    out, shift = places.clone(), []
    axes = out if out.ndim == 3 else out.unsqueeze(0)
    for row, mine in enumerate(visual):
        columns = kept[row][kept[row] >= 0]
        marks = torch.isin(columns, mine)
        edges = [0, *((marks.diff() != 0).nonzero().flatten() + 1).tolist(), len(columns)]
        now = int(axes[-1, row, columns[0]])
        for begin, end in pairwise(edges):
            run = columns[begin:end]
            ranks = [torch.unique(axis[run], return_inverse=True)[1] for axis in axes[:, row]]
            axes[:, row, run] = now + torch.stack(ranks).to(axes.dtype)
            now += 1 + max(int(rank.max()) for rank in ranks[-3:])
        shift.append(int(places[..., row, columns[-1]].max()) + 1 - now)
    return out, torch.tensor(shift, device=places.device)


def centred(places: Tensor, row: int, columns: Tensor, plan: Reduction) -> Tensor:
    """Position ids in which survivors of a row's `columns` stand at the mean place of all that they took in."""
    places = places if places.is_floating_point() else places.float()
    survivors = plan.survivors[0][plan.survivors[0] >= 0]
    mine = places[..., row, columns].reshape(-1, len(columns)).T  # (n, axes)
    both = plan.apply(torch.cat([mine, torch.ones_like(mine[:, :1])], 1).unsqueeze(0))[0, : len(survivors)]
    mean = (both[:, :-1] / both[:, -1:]).T
    places[..., row, columns[survivors]] = mean.reshape(*places.shape[:-2], len(survivors))
    return places


def tables(given: dict[str, Any], passed: Passed | None, row: int, config: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(k, d)` that a layer was to turn a row's states by."""
    found = given.get("position_embeddings") if passed is None else passed.moved.get("position_embeddings")
    if found is None and passed is not None:
        found = passed.of(given.get("position_embeddings"))
    if not isinstance(found, tuple) or len(found) != 2 or found[0].ndim not in (3, 4):
        raise MissingSignal("this language model does not hand rotary tables to its layers, so queries stay turned")
    if found[0].ndim == 4:  # of time, rows and columns, which its attention puts together by sections, up to 5.2
        sections = 2 * config.rope_parameters["mrope_section"]
        split = [[torch.split(axis, sections, dim=-1) for axis in table] for table in found]
        found = tuple(torch.cat([each[i % 3][i] for i in range(len(sections))], -1) for each in split)
    cos, sin = (table[row % len(table)].float() for table in found)
    return cos, sin


def unturned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys `(heads, n, d)` without the turn by their positions, which halves of the features share."""
    d = cos.shape[-1]
    x, rest = x[..., :d].float(), x[..., d:].float()
    half = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
    return torch.cat([(x * cos - half * sin) / (cos * cos + sin * sin), rest], -1)  # some models scale their tables
