"""What a method can ask a host to gather while the model runs, beside keys and values: its `needs`.

Each need is a small frozen dataclass; `start` gives an observer, which the host feeds with every forward step that the
policy observes. The attention function sees the rotated queries of every model family, so no need knows a model.

    Queries(last=64)      the last real queries of each row           -> QueryWindow
    Probes(share=0.05)    a few queries that stand for a forward's    -> ProbeQueries
    Received(decay=1.0)   attention each key got from all queries     -> Tensor (b, h, n)
    Moments(skip=4)       mean and covariance of unrotated queries    -> QueryMoments
    ChannelMaxima()       largest queries and keys, by channel        -> Maxima
    Rotation()            the model's rotary position embedding       -> Rotary
    Projection()          the layer's output projection               -> OutputWeight
    EveryLayer()          the scores of all layers, before any is cut -> LayerScores

A need may also say, as class attributes, what it takes from the host:

    hidden = True         `Step.hidden`, the hidden states that the layer's attention was given
    probe = True          that the model be run once more before anything is dropped: `inputs` names the tokens, and
                          `observe_probe` of its observer sees the layers read them (`Probing`)
    everywhere = True     that no layer is cut before all have their scores
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK_CELLS = 1 << 20
"""Numbers of unrotated queries held at once: few enough that a CPU's cache holds them."""


def blank(x: Float[Tensor, "b h n d"], padding: Bool[Tensor, "b #h n"]) -> Float[Tensor, "b h n d"]:
    """Zeros for padding, whose features may be no numbers at all; `x` itself where there is none."""
    return x.masked_fill(padding.unsqueeze(-1), 0) if bool(padding.any()) else x


@runtime_checkable
class Rotary(Protocol):
    """A model's rotary position embedding, as the host's adapter found it."""

    def turn(self, x: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """Rotate features `(b, h, n, d)` by positions `(b, n)` or `(b, h, n)`, or back by them. Lengths are kept."""
        ...

    def mean_matrix(self, positions: Tensor) -> Tensor:
        """The `(d, d)` mean of the rotations at `positions` `(p,)`, as the model applies them to queries."""
        ...


@dataclass(frozen=True)
class Step:
    """One forward at one layer, as the host shows it to observers.

    `dense` gives all keys of the layer, kept and new, as `(keys, positions, padding)`; it is a function because only
    `Received` needs them. Queries are rotated; `scaling` is the factor on the logits, `softcap` the model's tanh cap.
    `place` counts the layers that are shortened. `hidden` is there where a need asks for it; `output` gives the output
    projection, cut into query heads, where the model has one that can be found.
    """

    query: Float[Tensor, "b heads q d"]
    positions: Int[Tensor, "b q"]
    padding: Bool[Tensor, "b q"]
    dense: Callable[[], tuple[Tensor, Tensor, Tensor]]
    scaling: float
    softcap: float | None
    rotary: Rotary | None
    place: int = 0
    hidden: Float[Tensor, "b q hidden"] | None = None
    output: Callable[[], Tensor | None] = lambda: None


@runtime_checkable
class Observer(Protocol):
    lasting: bool
    """Whether the signal lives on with the keys when the cache was compressed, or starts anew."""

    def observe(self, step: Step) -> None: ...

    def value(self) -> object:
        """The signal, aligned with the layer's keys where it is a number for each key."""
        ...

    def regather(self, index: Int[Tensor, "b h k"]) -> None:
        """The layer's keys were reordered or dropped: entry i now is what `index[i]` was (-1: none)."""
        ...

    def rows(self, index: Int[Tensor, " r"]) -> None:
        """The batch rows were reordered or repeated."""
        ...

    @property
    def nbytes(self) -> int: ...


@runtime_checkable
class Probing(Protocol):
    """A need that has the model read something more before its cache is cut, and looks at the attention."""

    probe: ClassVar[bool]

    def inputs(self, ids: Int[Tensor, "b q"], real: Bool[Tensor, "b q"]) -> Iterable[tuple[Tensor, Tensor]]:
        """What to read, given the tokens of the forward that just ended and which of them are no padding: token ids
        `(b, p)` and which of those are real. Each item is one forward right after the prompt; nothing of it is kept."""
        ...


@dataclass(frozen=True)
class QueryWindow:
    """Up to `w` last real queries of each row, in order; `padding` marks those a short row does not have."""

    query: Float[Tensor, "b heads w d"]
    positions: Int[Tensor, "b w"]
    padding: Bool[Tensor, "b w"]
    scaling: float
    softcap: float | None


@dataclass(frozen=True)
class Queries:
    """The last `last` real queries of each row."""

    last: int

    key_bytes = 0

    def start(self) -> "Observer":
        return _QueryObserver(self.last)


class _QueryObserver:
    lasting = False

    def __init__(self, last: int) -> None:
        self.last = last
        self.window: QueryWindow | None = None

    def observe(self, step: Step) -> None:
        query, positions, padding = step.query, step.positions, step.padding
        if self.window is not None:
            query = torch.cat([self.window.query, query], dim=2)
            positions = torch.cat([self.window.positions, positions], dim=1)
            padding = torch.cat([self.window.padding, padding], dim=1)
        if bool(padding.any()):  # move each row's real queries to the end, keeping their order
            order = (~padding).to(torch.int8).argsort(dim=1, stable=True)
            query = query.gather(2, order[:, None, :, None].expand_as(query))
            positions, padding = positions.gather(1, order), padding.gather(1, order)
        self.window = QueryWindow(
            query[:, :, -self.last :].clone(),  # a view would hold the whole prompt's queries
            positions[:, -self.last :].clone(),
            padding[:, -self.last :].clone(),
            step.scaling,
            step.softcap,
        )

    def value(self) -> QueryWindow | None:
        return self.window

    def regather(self, index: Tensor) -> None:
        pass

    def rows(self, index: Tensor) -> None:
        if (w := self.window) is not None:
            self.window = QueryWindow(w.query[index], w.positions[index], w.padding[index], w.scaling, w.softcap)

    @property
    def nbytes(self) -> int:
        w = self.window
        return 0 if w is None else w.query.nbytes + w.positions.nbytes + w.padding.nbytes


@dataclass(frozen=True)
class ProbeQueries:
    """Queries that stand for all real ones of the latest forward, of which each row had `among`."""

    window: QueryWindow
    among: Int[Tensor, " b"]


@dataclass(frozen=True)
class Probes:
    """Of the latest forward the last `share` of each row's real queries, and as many drawn at random from the others.

    The last share is rounded up and the drawn one down; none is drawn twice. A row's draw depends on `seed`, the layer
    and how many queries the row has, so batches and padding do not change it. A single query is its own probe.
    """

    share: float = 0.05
    seed: int = 0

    key_bytes = 0

    def start(self) -> "Observer":
        return _ProbesObserver(self.share, self.seed)


class _ProbesObserver:
    lasting = False

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.seed = share, seed
        self.found: ProbeQueries | None = None

    def observe(self, step: Step) -> None:
        q, among = step.query.shape[2], (~step.padding).sum(1)
        order = (~step.padding).to(torch.int8).argsort(dim=1, stable=True)  # each row's real queries at the end
        picked = [q - n + self._pick(n, step.place) for n in among.tolist()]
        width = max(len(row) for row in picked)
        places = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=-1) for row in picked])
        places = places.to(order.device)
        padding = places < 0
        at = order.gather(1, places.clamp(min=0))
        query = step.query.gather(2, at[:, None, :, None].expand(-1, step.query.shape[1], -1, step.query.shape[3]))
        window = QueryWindow(query, step.positions.gather(1, at), padding, step.scaling, step.softcap)
        self.found = ProbeQueries(window, among)

    def _pick(self, n: int, place: int) -> Tensor:
        last = math.ceil(self.share * n - 1e-9)
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + place)
        drawn = torch.randperm(n - last, generator=draw)[: int(self.share * n + 1e-9)]
        return torch.cat([drawn.sort().values, torch.arange(n - last, n)])

    def value(self) -> ProbeQueries | None:
        return self.found

    def regather(self, index: Tensor) -> None:
        self.found = None  # what they were gathered for is done

    def rows(self, index: Tensor) -> None:
        if (f := self.found) is not None:
            w = f.window
            window = QueryWindow(w.query[index], w.positions[index], w.padding[index], w.scaling, w.softcap)
            self.found = ProbeQueries(window, f.among[index])

    @property
    def nbytes(self) -> int:
        if (f := self.found) is None:
            return 0
        return f.window.query.nbytes + f.window.positions.nbytes + f.window.padding.nbytes + f.among.nbytes


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
    """Attention each key received, summed over all real queries so far and over the heads that share it.

    What a query paid is multiplied by `decay` for every real query of its row after it; 1 forgets nothing.
    """

    decay: float = 1.0

    key_bytes = 4  # float32, for as long as the key is kept

    def start(self) -> "Observer":
        return _ReceivedObserver(self.decay)


class _ReceivedObserver(PerKey):
    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay

    def observe(self, step: Step) -> None:
        from fewer.score.attention import received  # score reads QueryWindow from here, so not importable above

        keys, positions, padding = step.dense()
        new = received(step, keys, positions, padding, self.decay)
        if (old := self.value()) is not None:
            aged = self.decay ** (~step.padding).sum(1)[:, None, None]  # by as many real queries as the row has new
            new[..., : old.shape[-1]] += old * aged  # keys only ever grow at the end between two gathers
        self.put(new)


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


@dataclass(frozen=True)
class Rotation:
    """The model's rotary embedding itself, for methods that move keys to other positions."""

    key_bytes = 4  # a moved key knows both positions

    def start(self) -> "Observer":
        return _RotationObserver()


class _RotationObserver:
    lasting = False
    nbytes = 0

    def __init__(self) -> None:
        self.rotary: Rotary | None = None

    def observe(self, step: Step) -> None:
        self.rotary = step.rotary

    def value(self) -> Rotary | None:
        return self.rotary

    def regather(self, index: Tensor) -> None:
        pass

    def rows(self, index: Tensor) -> None:
        pass


@dataclass(frozen=True)
class OutputWeight:
    """A layer's output projection, cut into query heads."""

    weight: Float[Tensor, "heads e hidden"]


@dataclass(frozen=True)
class Projection:
    """The output projection of the layer, one matrix for each query head: what a value is worth once it is written."""

    key_bytes = 0

    def start(self) -> "Observer":
        return _ProjectionObserver()


class _ProjectionObserver:
    lasting = False
    nbytes = 0  # the model's own weights

    def __init__(self) -> None:
        self.output: Callable[[], Tensor | None] = lambda: None

    def observe(self, step: Step) -> None:
        self.output = step.output

    def value(self) -> "OutputWeight | None":
        weight = self.output()
        return None if weight is None else OutputWeight(weight)

    def regather(self, index: Tensor) -> None:
        pass

    def rows(self, index: Tensor) -> None:
        pass


@dataclass(frozen=True)
class LayerScores:
    """The scores `(b, h, n)` of every layer that is shortened, +inf for what must stay and -inf for padding."""

    scores: tuple[Tensor, ...]
    _won: dict[tuple[int, int], Tensor] = field(default_factory=dict, compare=False)

    def winners(self, row: int, total: int) -> Int[Tensor, "layers h"]:
        """How many of the `total` best of this row, over all layers and heads, each head has. Ties go to earlier
        layers, lower heads and earlier tokens."""
        if (row, total) not in self._won:  # every layer asks
            flat = torch.cat([layer[row].flatten() for layer in self.scores])
            h = self.scores[0].shape[1]
            place = torch.cat([
                torch.arange(h, device=flat.device).repeat_interleave(layer.shape[2]) + index * h
                for index, layer in enumerate(self.scores)
            ])  # fmt: skip
            best = flat.argsort(descending=True, stable=True)[:total]
            self._won[row, total] = torch.bincount(place[best], minlength=len(self.scores) * h).view(-1, h)
        return self._won[row, total]


@dataclass(frozen=True)
class EveryLayer:
    """The scores of all layers, for methods that share one total among them."""

    key_bytes = 0
    everywhere: ClassVar[bool] = True

    def start(self) -> "Observer":
        return _EveryLayerObserver()


class _EveryLayerObserver:
    lasting = False
    nbytes = 0

    def observe(self, step: Step) -> None:
        pass

    def value(self) -> None:
        """The host puts the scores in when they are known."""

    def regather(self, index: Tensor) -> None:
        pass

    def rows(self, index: Tensor) -> None:
        pass


ROTARY_NEEDS = (Moments, Rotation)
"""Needs that only a host with rotary positions can give."""
