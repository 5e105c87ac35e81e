"""Places for methods to decide at, built by hand, with every signal gathered the way a host gathers it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewer.compress import step
from fewer.score.position import FORCED
from fewer.signals import Step
from fewer.types import Budget, Keep, Method, Plan, Site, Tokens
from tests import gather

SIZES = (1, 7, 63, 130)
"""Awkward lengths: a single token, less than any window, one below and two above a power of two."""

ONLY = Site()


class HalfRotary:
    """Rotary positions in the half-split layout: channel i turns together with channel i + d/2."""

    def __init__(self, dim: int, base: float = 100.0) -> None:
        self.speed = base ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))

    def turn(self, x: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        places = positions if positions.ndim == 3 else positions.unsqueeze(1)
        angle = places.unsqueeze(-1) * self.speed * (-1 if back else 1)  # (b, 1 or h, n, d/2)
        left, right = x.double().chunk(2, dim=-1)
        turned = torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1)
        return turned.to(x.dtype)

    def mean_matrix(self, positions: Tensor) -> Tensor:
        angle = positions.unsqueeze(-1) * self.speed
        cos, sin = angle.cos().mean(0).diag(), angle.sin().mean(0).diag()
        return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)], 0).float()


@dataclass(frozen=True)
class Row:
    """The queries, keys and values of one sequence, without padding; queries and keys are rotated already."""

    query: Tensor  # (heads, n, d)
    keys: Tensor  # (h, n, d)
    values: Tensor  # (h, n, e)

    def __len__(self) -> int:
        return self.keys.shape[1]

    def part(self, start: int, end: int) -> "Row":
        return Row(self.query[:, start:end], self.keys[:, start:end], self.values[:, start:end])


def random_row(n: int, seed: int = 0, heads: int = 4, kv_heads: int = 2, dim: int = 8) -> Row:
    """Normal numbers drawn in the order queries, keys, values from one generator: golden numbers depend on it."""
    draw = torch.Generator().manual_seed(seed)
    return Row(*(torch.randn(count, n, dim, generator=draw) for count in (heads, kv_heads, kv_heads)))


def projection(heads: int, e: int, hidden: int = 6) -> Tensor:
    """An output projection of normal numbers, cut into query heads."""
    return torch.randn(heads, e, hidden, generator=torch.Generator().manual_seed(7))


def place(
    method: Method,
    rows: Row | Sequence[Row],
    *,
    chunks: Sequence[int] = (),
    unseen: Sequence[int] = (),
    protect: Sequence[int] = (),
    site: Site = ONLY,
    scaling: float | None = None,
    softcap: float | None = None,
    filler: float = 50.0,
    output: Tensor | None = None,
) -> Tokens:
    """These rows as one batch, short ones padded at the front with `filler`, which no result may depend on.

    The observers see the columns in one forward, or in forwards that end at each of `chunks` and at the end, but for
    those that are `unseen`, by their number.
    """
    rows = [rows] if isinstance(rows, Row) else rows
    longest, dim = max(len(row) for row in rows), rows[0].keys.shape[-1]
    query, keys, values = (
        torch.stack([_padded(part, longest, filler) for part in parts])
        for parts in zip(*((row.query, row.keys, row.values) for row in rows), strict=True)
    )
    seen = torch.tensor([len(row) for row in rows])
    positions = (torch.arange(longest) - (longest - seen).unsqueeze(1)).clamp(min=-1)  # (b, n)
    padding = positions < 0
    scaling = dim**-0.5 if scaling is None else scaling
    wide = positions.unsqueeze(1).expand(*keys.shape[:3])
    output = projection(query.shape[1], values.shape[-1]) if output is None else output
    observers = {need: need.start() for need in method.needs}
    for number, (start, end) in enumerate(zip([0, *chunks], [*chunks, longest], strict=True)):
        if number in unseen:
            continue
        shown = Step(
            query[:, :, start:end],
            positions[:, start:end],
            padding[:, start:end],
            _first(end, keys, wide, wide < 0),
            scaling,
            softcap,
            HalfRotary(dim),
            hidden=query[:, :, start:end].transpose(1, 2).flatten(2),
            output=lambda: output,
        )
        for observer in observers.values():
            observer.observe(shown)
        gather.probe(observers, shown)
    tokens = Tokens(
        features=keys,
        values=values,
        positions=wide,
        padding=wide < 0,
        protected=torch.isin(wide, torch.tensor(list(protect), dtype=torch.long)),
        seen=seen,
        signals={type(need): observer.value() for need, observer in observers.items()},
        site=site,
    )
    return gather.together(method, [tokens])[0]


def _padded(part: Tensor, longest: int, filler: float) -> Tensor:
    missing = longest - part.shape[1]
    return torch.cat([torch.full_like(part[:, :1], filler).expand(-1, missing, -1), part], 1)


def _first(count: int, *parts: Tensor) -> Callable[[], Any]:
    return lambda: tuple(part[:, :, :count] for part in parts)


def decide(method: Method, keep: Keep, tokens: Tokens) -> Plan:
    return step(method, Budget.parse(keep), tokens)


def kept(tokens: Tokens, plan: Plan, row: int = 0) -> list[list[int]]:
    """The positions that each head of a row keeps."""
    there = plan.survivors[row] >= 0
    found = tokens.positions[row].gather(-1, plan.survivors[row].clamp(min=0))
    return [found[head][there[head]].tolist() for head in range(len(there))]


class Cache:
    """One layer's cache of one row that is compressed after every forward: a host in a few lines, for even heads."""

    def __init__(self, method: Method, keep: Keep, site: Site = ONLY) -> None:
        self.method, self.budget, self.site = method, Budget.parse(keep), site
        self.observers = {need: need.start() for need in method.needs}
        self.keys = self.values = torch.empty(0)
        self.positions = torch.empty(0, dtype=torch.long)
        self.seen = 0

    def forward(self, new: Row) -> Plan:
        """Take new tokens in, let the observers see their queries, and compress."""
        h, count = new.keys.shape[:2]
        places = self.seen + torch.arange(count)
        if not self.seen:
            self.keys, self.values, self.positions = new.keys[:, :0], new.values[:, :0], places[:0].expand(h, 0)
        self.keys = torch.cat([self.keys, new.keys], 1)
        self.values = torch.cat([self.values, new.values], 1)
        self.positions = torch.cat([self.positions, places.expand(h, count)], 1)
        self.seen += count
        none = torch.zeros_like(self.positions, dtype=torch.bool)[None]
        held = self.keys[None], self.positions[None], none
        dim = self.keys.shape[-1]
        padding = torch.zeros(1, count, dtype=torch.bool)
        shown = Step(
            new.query[None], places[None], padding, lambda: held, dim**-0.5, None, HalfRotary(dim),
            output=lambda: projection(len(new.query), new.values.shape[-1]),
        )  # fmt: skip
        for observer in self.observers.values():
            observer.observe(shown)
        tokens = Tokens(
            features=held[0],
            values=self.values[None],
            positions=held[1],
            padding=none,
            protected=none,
            seen=torch.tensor([self.seen]),
            signals={type(need): observer.value() for need, observer in self.observers.items()},
            site=self.site,
        )
        plan = step(self.method, self.budget, tokens)
        self.keys, self.values = plan.pick(held[0])[0], plan.pick(self.values[None])[0]
        self.positions = self.positions.gather(-1, plan.survivors[0])
        for observer in self.observers.values():
            observer.regather(plan.survivors)
        return plan


def agree(ours: Tensor, expected: Tensor) -> None:
    """The same scores to float32's accuracy, and the same tokens forced to stay or to go."""
    assert ours.shape == expected.shape
    free = expected.abs() < FORCED
    assert torch.equal(ours.abs() < FORCED, free) and torch.equal(ours[~free] > 0, expected[~free] > 0), "forced tokens"
    torch.testing.assert_close(ours[free].double(), expected[free].double(), rtol=2e-4, atol=1e-7)


def same_but_for_ties(scores: Tensor, ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> None:
    """Both keep tokens of the same scores `(h, n)` at each head; which of several equal ones may differ."""
    assert [len(head) for head in ours] == [len(head) for head in theirs]
    for head, mine, other in zip(scores, ours, theirs, strict=True):
        torch.testing.assert_close(head[list(mine)].sort().values, head[list(other)].sort().values)


def same_alone_and_padded(method: Method, keep: Keep, lengths: Sequence[int] = SIZES, filler: float = 50.0) -> None:
    """Every row of a padded batch has the scores and the survivors that it has by itself."""
    rows = [random_row(n, seed=n) for n in lengths]
    batch = place(method, rows, filler=filler)
    scores, plan = method.score(batch), decide(method, keep, batch)
    plan.check(batch.padding)
    for index, row in enumerate(rows):
        alone = place(method, row)
        agree(scores[index, :, -len(row) :], method.score(alone)[0])
        assert kept(batch, plan, index) == kept(alone, decide(method, keep, alone))


def same_in_chunks(method: Method, keep: Keep, n: int = 63, chunks: Sequence[int] = (5, 6, 40)) -> None:
    """A prompt that comes in several forwards is decided on as if it had come in one."""
    row = random_row(n)
    whole, parts = place(method, row), place(method, row, chunks=chunks)
    agree(method.score(parts), method.score(whole))
    assert kept(parts, decide(method, keep, parts)) == kept(whole, decide(method, keep, whole))
