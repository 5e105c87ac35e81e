"""What is left of many queries and keys in a few numbers."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.signals.step import BLOCK_CELLS, Observer, Rotary, Step, blank


@dataclass(frozen=True)
class QueryMoments:
    """Mean and covariance of a row's unrotated queries, and the position its next query will have."""

    mean: Float[Tensor, "b heads d"]
    covariance: Float[Tensor, "b heads d d"]
    upcoming: Int[Tensor, " b"]
    scaling: float
    rotary: Rotary


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of the unrotated queries, without each row's first `skip` (sinks have outlying queries)."""

    skip: int

    key_bytes = 0

    def start(self) -> "Observer":
        return _MomentsObserver(self.skip)


class _MomentsObserver:
    lasting = False

    def __init__(self, skip: int) -> None:
        self.skip = skip
        self.n = self.mean = self.spread = self.upcoming = torch.empty(0)
        self.scaling, self.rotary = 1.0, None  # type: float, Rotary | None

    def observe(self, step: Step) -> None:
        assert step.rotary is not None, "hosts without rotary positions refuse Moments before they run"
        counted = (~step.padding & (step.positions >= self.skip)).float()[:, None, :, None]  # (b, 1, q, 1)
        n = counted.sum(2)
        query = blank(step.query, step.padding.unsqueeze(1))
        b, heads, q, d = query.shape
        mean, spread = query.new_empty(b, heads, d).float(), query.new_empty(b, heads, d, d).float()
        size = max(1, BLOCK_CELLS // max(1, b * q * d))
        for start in range(0, heads, size):
            at = slice(start, start + size)
            x = step.rotary.turn(query[:, at], step.positions, back=True).float()
            x = x * counted
            mean[:, at] = x.sum(2) / n.clamp(min=1)
            x.addcmul_(counted, mean[:, at].unsqueeze(2), value=-1)
            spread[:, at] = x.transpose(-1, -2) @ x
        last = torch.where(step.padding, -1, step.positions).amax(1) + 1
        if self.n.numel():  # merge the two samples' moments (Chan, Golub and LeVeque 1979)
            delta, both = mean - self.mean, self.n + n
            share = n / both.clamp(min=1)
            spread = spread + self.spread + (self.n * share).unsqueeze(-1) * delta.unsqueeze(-1) * delta.unsqueeze(-2)
            mean, n, last = self.mean + delta * share, both, torch.maximum(last, self.upcoming)
        self.n, self.mean, self.spread, self.upcoming = n, mean, spread, last
        self.scaling, self.rotary = step.scaling, step.rotary

    def value(self) -> QueryMoments | None:
        if self.rotary is None:
            return None
        covariance = self.spread / self.n.clamp(min=1).unsqueeze(-1)
        return QueryMoments(self.mean, covariance, self.upcoming, self.scaling, self.rotary)

    def regather(self, index: Tensor) -> None:
        pass

    def rows(self, index: Tensor) -> None:
        if self.n.numel():
            self.n, self.mean, self.spread = self.n[index], self.mean[index], self.spread[index]
            self.upcoming = self.upcoming[index]

    @property
    def nbytes(self) -> int:
        return self.n.nbytes + self.mean.nbytes + self.spread.nbytes + self.upcoming.nbytes


@dataclass(frozen=True)
class Maxima:
    """The largest size of each channel, over a row's prompts; of queries also over the heads that share a key."""

    query: Float[Tensor, "b h d"]
    key: Float[Tensor, "b h d"]


@dataclass(frozen=True)
class ChannelMaxima:
    """The largest size of each channel of rotated queries and keys. Decoding single tokens does not move it."""

    key_bytes = 0

    def start(self) -> "Observer":
        return _MaximaObserver()


class _MaximaObserver:
    lasting = True

    def __init__(self) -> None:
        self.found: Maxima | None = None

    def observe(self, step: Step) -> None:
        if self.found is not None and step.query.shape[2] == 1:
            return
        keys, _, padding = step.dense()
        b, h, _, d = keys.shape
        key = blank(keys, padding).abs().amax(2).float()
        query = blank(step.query, step.padding.unsqueeze(1)).abs().amax(2).view(b, h, -1, d).amax(2).float()
        if (old := self.found) is not None:
            query, key = torch.maximum(query, old.query), torch.maximum(key, old.key)
        self.found = Maxima(query, key)

    def value(self) -> Maxima | None:
        return self.found

    def regather(self, index: Tensor) -> None:
        pass

    def rows(self, index: Tensor) -> None:
        if (found := self.found) is not None:
            self.found = Maxima(found.query[index], found.key[index])

    @property
    def nbytes(self) -> int:
        return 0 if self.found is None else self.found.query.nbytes + self.found.key.nbytes
