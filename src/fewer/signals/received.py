"""Numbers for each key, that live and go with it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.signals.step import Observer, Step


class PerKey:
    """Base of observers that keep a number for each key, for as long as the key is kept."""

    lasting = True

    def __init__(self) -> None:
        self._numbers: Tensor | None = None  # (b, h, n), or what is not empty of it where `_counts` says so
        self._counts: list[list[int]] = []

    def put(self, numbers: Float[Tensor, "b h n"]) -> None:
        """The numbers of all keys, in the layer's order, new ones last."""
        self._numbers, self._counts = numbers, []

    def value(self) -> Tensor | None:
        if self._numbers is None or not self._counts:
            return self._numbers
        counts = torch.tensor(self._counts, device=self._numbers.device).unsqueeze(-1)  # (b, h, 1)
        longest = int(counts.max())
        there = torch.arange(longest, device=counts.device) >= longest - counts
        return self._numbers.new_zeros(there.shape).masked_scatter(there, self._numbers)

    def regather(self, index: Tensor) -> None:
        if (old := self.value()) is not None:
            width, there = old.shape[-1], index >= 0
            known = there & (index < width)
            new = torch.where(known, old.gather(-1, index.clamp(0, width - 1)), 0.0)
            # as the keys themselves: heads that keep few cost few
            aligned = not bool((there[..., :-1] & ~there[..., 1:]).any())
            self._numbers, self._counts = (new[there], there.sum(-1).tolist()) if aligned else (new, [])

    def rows(self, index: Tensor) -> None:
        if (old := self.value()) is not None:
            self.put(old[index])

    @property
    def nbytes(self) -> int:
        return 0 if self._numbers is None else self._numbers.nbytes


@dataclass(frozen=True)
class Received:
    """Attention each key received, summed over all real queries that were observed and over the heads that share it.

    What a query paid is multiplied by `decay` for every real query of its row after it, observed or not; 1 forgets
    nothing. Queries of decoding steps are observed, and summed, where the policy compresses while decoding.
    """

    decay: float = 1.0

    key_bytes = 4  # float32, for as long as the key is kept

    def start(self) -> "Observer":
        return _ReceivedObserver(self.decay)


class _ReceivedObserver(PerKey):
    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self._next: list[int] = []  # the position after the last query of each row that was observed

    def observe(self, step: Step) -> None:
        from fewer.score.attention import received  # score reads QueryWindow from here, so not importable above

        keys, positions, padding = step.dense()
        new = received(step, keys, positions, padding, self.decay)
        if (old := self.value()) is not None:
            aged = self.decay ** self._came(step)[:, None, None]
            new[..., : old.shape[-1]] += old * aged  # keys only ever grow at the end between two gathers
        self.put(new)
        if self.decay != 1:
            ends = (step.positions.masked_fill(step.padding, -1).amax(1) + 1).tolist()
            self._next = [end or had for end, had in zip(ends, self._next or ends, strict=True)]

    def _came(self, step: Step) -> Int[Tensor, " b"]:
        """Real queries of each row since what was last observed: the step's, and those that nobody was shown."""
        real = ~step.padding
        new = real.sum(1)
        if not self._next:
            return new
        first = torch.where(real, step.positions, torch.iinfo(step.positions.dtype).max).amin(1)
        unseen = (first - torch.tensor(self._next, device=first.device)).clamp(min=0)
        return new + torch.where(new > 0, unseen, 0)

    def rows(self, index: Tensor) -> None:
        super().rows(index)
        self._next = [self._next[row] for row in index.tolist()] if self._next else []
