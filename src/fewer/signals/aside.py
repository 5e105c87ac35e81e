"""Visual entries of a cache that are set aside while decoding: held, and not read for now.

Dynamic(layer=3, read=0.3, alike=0.9)   what is set aside at a step, and when it is chosen anew   -> Aside
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewer.types import Budget


@dataclass(frozen=True)
class Dynamic:
    """Layers from `layer` on read the share `read` of a row's visual entries: those that the layer before attends to
    most. They are chosen anew where the cosine of that attention with the step before is below `alike`; elsewhere the
    choice stays, or with `official=True` everything is read."""

    layer: int
    read: float
    alike: float
    official: bool = False

    key_bytes: ClassVar[int] = 0

    def start(self) -> "Aside":
        return Aside()

    def aside(self, attention: Tensor, before: Tensor | None, aside: Tensor) -> Tensor:
        """What is set aside of n entries `(n,)`, bool, given what the newest token's attention gives to each, what it
        gave at the step before (None: there was none), and what was set aside then."""
        if before is not None and float(F.cosine_similarity(attention, before, dim=0)) >= self.alike:
            return torch.zeros_like(aside) if self.official else aside
        chosen = attention.argsort(descending=True, stable=True)[: Budget.parse(self.read).count(len(attention))]
        return torch.ones_like(aside).index_fill(0, chosen, False)


class Aside:
    """Of every row of a batch, which entries are visual, what the last decoding step's attention gave to them, and
    which of them deeper layers leave unread. Entries go by their position among their row's real tokens, so that one
    set serves layers and heads that hold different ones.

    An observer that no forward is shown to: it lives with a cache's first layer, and follows its rows into beams,
    copies and files.
    """

    lasting = True

    def __init__(self) -> None:
        self.visual: list[Tensor] = []
        self.attention: list[Tensor | None] = []
        self.aside: list[Tensor | None] = []

    def begin(self, visual: list[Tensor], before: list[int]) -> None:
        """Several tokens are read at once: `visual` marks each row's tokens so far, these included, of which `before`
        had come earlier; without it the new ones are text."""
        new = visual or [torch.zeros(count, dtype=torch.bool) for count in before]
        if not self.visual:  # a cache that was read before: its tokens count as text
            self.visual = [row.new_zeros(count) for row, count in zip(new, before, strict=True)]
        pairs = zip(self.visual, new, before, strict=True)
        self.visual = [torch.cat([old[:count], row[count:].to(old.device)]) for old, row, count in pairs]
        self.forget()

    def forget(self) -> None:
        """The next decoding step chooses anew."""
        self.attention, self.aside = [None] * len(self.visual), [None] * len(self.visual)

    def candidates(self, row: int, holds: Bool[Tensor, " n"]) -> Int[Tensor, " m"]:
        """The visual ones among the positions that are held."""
        there = min(len(holds), len(self.visual[row]))
        return (self.visual[row][:there].to(holds.device) & holds[:there]).nonzero().flatten()

    def put(self, row: int, at: Int[Tensor, " m"], attention: Float[Tensor, " m"], aside: Bool[Tensor, " m"]) -> None:
        """Of the row's candidates `at`, set these aside until the next step."""
        table = torch.zeros(len(self.visual[row]), dtype=torch.bool, device=at.device)
        table[at] = aside
        self.attention[row], self.aside[row] = attention, table

    def earlier(self, row: int, at: Int[Tensor, " m"]) -> tuple[Tensor | None, Tensor]:
        """What the step before gave to these candidates, None where there was none; and which were set aside."""
        attention, table = self.attention[row], self.aside[row]
        if attention is None or table is None or len(attention) != len(at):
            return None, torch.zeros_like(at, dtype=torch.bool)
        return attention, table[at]

    def table(self) -> Bool[Tensor, "b n"] | None:
        """What is set aside, by row and position; None where nothing is."""
        there = [row for row in self.aside if row is not None]
        if not there or not any(bool(row.any()) for row in there):
            return None
        longest = max(map(len, there))
        empty = there[0].new_zeros(longest)
        each = [empty if row is None else torch.cat([row, empty[len(row) :]]) for row in self.aside]
        return torch.stack(each)

    # --- as an observer of a cache's layer ---

    def observe(self, step: object) -> None:
        """Nothing: what it knows comes from the layers that read."""

    def value(self) -> None:
        return None

    def regather(self, index: Tensor) -> None:
        """Entries left: what was attended to is no longer comparable."""
        self.forget()

    def rows(self, index: Int[Tensor, " r"]) -> None:
        order = index.tolist()
        self.visual = [self.visual[row] for row in order]
        self.attention, self.aside = [self.attention[row] for row in order], [self.aside[row] for row in order]

    @property
    def nbytes(self) -> int:
        """Bytes of the latest choice; which entries are visual is known without it."""
        return sum(one.nbytes for one in (*self.attention, *self.aside) if one is not None)
