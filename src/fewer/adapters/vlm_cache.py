"""Caches of vision-language models: a method kept to visual entries, and early layers cut to what went on.

OnlyVisual(method)    text stays whole, whatever it is worth
FinalSet()            once a prompt is read, no layer holds visual tokens that did not reach the last one
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fewer.inner import evicts, published
from fewer.reduce.select import top_k
from fewer.signals import EveryLayer
from fewer.signals.visual import Marked, VisualEntries
from fewer.types import Allocation, Budget, FewerError, Matching, Method, Tokens

if TYPE_CHECKING:
    from fewer.adapters.vlm_scene import Picture
    from fewer.adapters.vlm_stages import Stages


@dataclass(frozen=True)
class OnlyVisual:
    """Another method's scores and plans, with text protected and the budget counted in visual entries."""

    inner: Method

    def __post_init__(self) -> None:
        name = type(self.inner).__name__
        if not evicts(self.inner):
            raise FewerError(f"{name} does more to a cache than evict from it, and cannot be kept to visual entries")
        if published(self.inner)[0] != "prefill":
            raise FewerError(f"{name} cuts while it decodes, and visual entries are cut once, when they were read")

    @property
    def needs(self) -> frozenset[Any]:
        return self.inner.needs | {VisualEntries()}

    def score(self, tokens: Tokens) -> Any:
        text = ~tokens.signal(VisualEntries, Marked).visual & ~tokens.padding
        scores = self.inner.score(tokens)
        if isinstance(scores, Matching):
            return scores._replace(value=scores.value.masked_fill(text, torch.inf))
        return scores.masked_fill(text, torch.inf)

    def allocate(self, tokens: Tokens, scores: Any, budget: Budget) -> Allocation:
        """Row by row, since rows differ in how much text they have."""
        marked, every = tokens.signal(VisualEntries, Marked), tokens.signals.get(EveryLayer)
        rows = []
        for row, wanted in enumerate(marked.wanted):
            there = ~tokens.padding[row : row + 1]
            text = int((there & ~marked.visual[row : row + 1]).sum(-1).max())
            mine = replace(
                tokens,
                features=tokens.features[row : row + 1],
                values=None if tokens.values is None else tokens.values[row : row + 1],
                positions=tokens.positions[row : row + 1],
                padding=tokens.padding[row : row + 1],
                protected=tokens.protected[row : row + 1],
                mass=None if tokens.mass is None else tokens.mass[row : row + 1],
                seen=tokens.seen[row : row + 1],
                signals={**tokens.signals, **({} if every is None else {EveryLayer: every.row(row)})},
            )
            own = (
                scores._replace(**{k: v[row : row + 1] for k, v in scores._asdict().items()})
                if isinstance(scores, Matching)
                else scores[row : row + 1]
            )
            rows.append(self.inner.allocate(mine, own, Budget(budget.keep, tokens=text + wanted)))
        floors = [one.floor for one in rows]
        floor = torch.cat([f for f in floors if f is not None]) if all(f is not None for f in floors) else None
        note = "; ".join(sorted({one.note for one in rows if one.note}))
        return Allocation(torch.cat([one.counts for one in rows]), floor, note)

    def reduce(self, tokens: Tokens, scores: Any, allocation: Allocation) -> Any:
        return self.inner.reduce(tokens, scores, allocation)


@dataclass(frozen=True)
class FinalSet:
    """Drops, from every layer, visual tokens that later layers went on without; `MustDrop`'s third stage."""

    needs: ClassVar[frozenset[Any]] = frozenset({VisualEntries(), EveryLayer()})  # when the last layer has read

    def score(self, tokens: Tokens) -> Tensor:
        return tokens.signal(VisualEntries, Marked).final.float()

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return Allocation((scores > 0).sum(-1))

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Any:
        return top_k(scores, allocation)


@dataclass
class Books:
    """What the entries of a cache are, by their place in their row, padding not counted."""

    visual: list[Tensor] = field(default_factory=list)
    """Of each row, which were visual."""
    final: list[Tensor] = field(default_factory=list)
    """Of each row, text and those visual ones that every layer went on with."""
    wanted: list[int] = field(default_factory=list)
    """Of each row, how many visual entries may stay."""

    def mark(self, real: Tensor, before: list[int], rows: "list[list[Picture]]", stages: "Stages") -> None:
        """Take in a forward: `real` `(b, q)` are no padding. What came before the books were opened counts as text."""
        if not self.visual:
            self.visual = [real.new_zeros(count) for count in before]
            self.final = [real.new_ones(count) for count in before]
            self.wanted = [0] * len(real)
        for row, pictures in enumerate(rows):
            visual = torch.zeros_like(real[row])
            for one in pictures:
                visual[one.columns] = visual[one.separators] = True
            there = slice(before[row])  # what was cropped since is no more
            self.visual[row] = torch.cat([self.visual[row][there], visual[real[row]]])
            self.final[row] = torch.cat([self.final[row][there], real[row][real[row]]])
            had = [len(one.columns) for one in pictures]
            count = stages.budget.count
            self.wanted[row] += sum(map(count, had)) if stages.per == "picture" else count(sum(had))

    def settle(self, real: Tensor, rows: "list[list[Picture]]") -> None:
        """Of the latest forward, note what some layer went on without."""
        for row, pictures in enumerate(rows):
            gone = torch.zeros_like(real[row])
            for one in pictures:
                gone |= without(one, len(gone))
            new = ~gone[real[row]]
            self.final[row] = torch.cat([self.final[row][: len(self.final[row]) - len(new)], new])

    def choose(self, rows: list[int]) -> None:
        """These rows, in this order, once or several times each."""
        if self.visual:
            self.visual, self.final = [self.visual[row] for row in rows], [self.final[row] for row in rows]
            self.wanted = [self.wanted[row] for row in rows]

    def entries(self, positions: Tensor) -> Marked:
        """Those at these positions `(b, h, n)`; -1 is none."""
        longest = max(map(len, self.visual))
        at, there = positions.clamp(min=0, max=longest - 1), (positions >= 0) & (positions < longest)

        def marked(rows: list[Tensor]) -> Tensor:
            table = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
            return table.to(positions.device).unsqueeze(1).expand(*positions.shape[:2], longest).gather(-1, at) & there

        return Marked(marked(self.visual), marked(self.final), tuple(self.wanted))


def without(picture: "Picture", total: int) -> Tensor:
    """The columns, of so many, of a picture's tokens and separators that do not go on."""
    gone = torch.zeros(total, dtype=torch.bool, device=picture.columns.device)
    if not picture.whole:
        gone[picture.separators] = gone[picture.columns] = True
        gone[picture.columns[picture.alive]] = False
    return gone
