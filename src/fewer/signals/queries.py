"""Queries themselves: the last ones of a row, or a few that stand for all."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewer.signals.step import Observer, Step, marked_last


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
    """The last `last` real queries of each row since its cache was last compressed.

    So a turn, or the last chunk of a prompt that is read in several, is rated by as many as it has, if these are fewer.
    Under when="both" and "decode" they are the last of all that were observed.
    """

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
            order = marked_last(~padding)
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
        order = marked_last(~step.padding)  # each row's real queries at the end
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
