"""Visual tokens that leave a prompt before the language model's first layer, or after any.

    scene (rows of pictures)  ->  for each picture: Tokens -> step() -> Plan  ->  Passed, and the states that go on

A cut takes the visual tokens that are left, asks the stage that acts there, folds what joins, and drops the rest and
the separators between them. Text always goes on.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fewer.adapters.hf_passed import Passed
from fewer.adapters.vlm_cache import Books, without
from fewer.adapters.vlm_places import centred, compacted, tables, unturned
from fewer.adapters.vlm_scene import Picture
from fewer.adapters.vlm_stages import Stage, Stages
from fewer.adapters.vlm_stages import places as cuts
from fewer.compress import step
from fewer.signals.visual import Layout, Looked, Marked, Places, Question, TextAttention, Tower, TowerView, Vocabulary
from fewer.types import Budget, MissingSignal, Reduction, Site, Tokens

if TYPE_CHECKING:
    from fewer.adapters.hf_bind import Host
    from fewer.adapters.hf_cache import Cache

_costs: dict[tuple[Any, ...], int] = {}
"""FLOPs of the matrix products of a decision, by the method, its place and its sizes: each is counted once."""


@dataclass
class Cutter:
    """The cuts of one cache."""

    stages: Stages
    host: "Host"
    positions: str = "keep"
    turn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """The text model's rotary table for states and positions."""
    words: Callable[[], Tensor] | None = None
    """The language model's input embeddings."""
    rows: list[list[Picture]] = field(default_factory=list)
    padding: Tensor | None = None
    ids: Tensor | None = None
    places: Tensor | None = None
    """Position ids of the forward, as the text model got them."""
    deep: list[Tensor] = field(default_factory=list)
    """What the first layers add to their outputs (deep-stack), one for each token."""
    shift: Tensor | None = None
    """By how much later tokens of each row come earlier, where positions are made compact."""
    counts: list[float] = field(default_factory=list)
    """Visual tokens that each layer read, of the latest forward with pictures."""
    plans: list[tuple[int, int, int, Reduction]] = field(default_factory=list)
    """After which layer, in which row, for which picture of it (-1: all of them), what was decided."""
    books: Books = field(default_factory=Books)
    pictures: list[list[Picture]] = field(default_factory=list)
    """The pictures of every row, of the latest forward with any, with those of their tokens that are left."""
    had: int = 0
    tokens: int = 0
    """Visual tokens, and all tokens, of that forward."""
    seconds: float = 0.0
    choosing: int = 0
    """FLOPs of the matrix products of that forward's decisions."""

    @property
    def after(self) -> frozenset[int]:
        return frozenset(self.stages.at)

    def __deepcopy__(self, memo: Any) -> "Cutter":
        books = Books(list(self.books.visual), list(self.books.final), list(self.books.wanted))
        return Cutter(self.stages, self.host, self.positions, self.turn, self.words, shift=self.shift, books=books)

    def begin(self, ids: Tensor, rows: list[list[Picture]], padding: Tensor, places: Tensor | None) -> None:
        """A forward with these pictures starts."""
        self.ids, self.rows, self.padding, self.places = ids, rows, padding, places
        self.deep, self.plans, self.seconds, self.choosing = [], [], 0.0, 0
        self.had = sum(len(one.columns) + len(one.separators) for row in rows for one in row)
        self.tokens = int((~padding).sum())
        self.counts = [float(self.had)] * len(self.host.attentions)

    def mark(self, real: Tensor, before: list[int]) -> None:
        """Take the tokens of a forward into the books: `real` `(b, q)` are no padding, and each row had `before`."""
        self.books.mark(real, before, self.rows or [[] for _ in real], self.stages)

    def entries(self, positions: Tensor) -> Marked:
        """Which of the entries at these positions `(b, h, n)` of their rows are visual."""
        if self.rows and self.padding is not None:
            self.books.settle(~self.padding, self.rows)
        return self.books.entries(positions)

    def choose(self, rows: Tensor) -> None:
        """The cache holds these rows from now on."""
        self.books.choose(rows.tolist())
        self.shift = None if self.shift is None else self.shift[rows]

    def finish(self) -> None:
        """That forward is over."""
        self.pictures = [[replace(one, views={}) for one in row] for row in self.rows]
        self.end()

    def end(self) -> None:
        """Hold nothing of a forward."""
        self.rows, self.ids, self.places, self.padding, self.deep = [], None, None, None, []

    # --- one cut ---

    @torch.no_grad()
    def cut(self, after: int, given: dict[str, Any], cache: "Cache") -> tuple[Passed, Tensor] | None:
        """Who goes on, and with what states."""
        states: Tensor = given["hidden_states"]
        if not any(self.rows) or self.stages.whole:
            return None
        start = perf_counter()
        assert self.padding is not None and self.ids is not None
        (b, k, _), passed, total = states.shape, cache.shared.passed, self.ids.shape[1]
        if passed is None:
            columns = torch.arange(total, device=states.device).expand(b, k).masked_fill(self.padding, -1)
        else:
            columns = passed.columns
        acting: list[Stage | None] = [*self.stages.at[after]] or [None]  # none: what the tower left out leaves here
        for stage in acting:
            kept: list[Tensor] = []
            states, deep = states.clone(), [one.clone() for one in self.deep]
            for row in range(b):
                where = states.new_full((total,), -1, dtype=torch.long)
                real = columns[row] >= 0
                where[columns[row][real]] = real.nonzero().flatten()
                gone = self._row(stage, after, row, where, states, deep, given, cache)
                stays = real.clone()
                stays[gone] = False
                kept.append(stays.nonzero().flatten())
            longest = max(map(len, kept))
            index = torch.stack([torch.nn.functional.pad(at, (longest - len(at), 0), value=-1) for at in kept])
            if longest == k and b == 1:
                continue
            columns = torch.where(index < 0, -1, columns.gather(1, index.clamp(min=0)))
            k = longest
            states, self.deep = _gather(states, index), [_gather(one, index) for one in deep]
        cut = self._passed(columns, total, passed)
        self._place(cut, states)
        left = sum(one.left for row in self.rows for one in row)
        self.counts[after + 1 :] = [float(left)] * (len(self.counts) - after - 1)
        cache.shared.witness = None
        self.seconds += perf_counter() - start
        return cut, states

    def _row(
        self, stage: Stage | None, after: int, row: int, where: Tensor, states: Tensor, deep: list[Tensor],
        given: dict[str, Any], cache: "Cache",
    ) -> Tensor:  # fmt: skip
        """One row: every picture alone, or all as one. What leaves, by its place in `states`; what joins is folded."""
        pictures = self.rows[row]
        groups = [[one] for one in pictures] if self.stages.per == "picture" else [pictures] * bool(pictures)
        for number, group in enumerate(groups if stage is not None else []):
            assert stage is not None
            columns = torch.cat([one.columns[one.alive] for one in group])
            at = where[columns]
            had = sum(len(one.columns) for one in group)
            count = stage.count(had, len(at))
            if count >= len(at):
                continue
            tokens = self._tokens(stage.method, after, row, group, where, states, given, cache)
            plan = self._decide(stage.method, after, count, tokens)
            survivors = plan.survivors[0]
            survivors = survivors[survivors >= 0]
            self.plans.append((after, row, number if self.stages.per == "picture" else -1, plan))
            if plan.folds:
                for features in (states, *deep):
                    features[row, at[survivors]] = plan.apply(features[row, at].unsqueeze(0))[0, : len(survivors)]
                if self.positions == "centroid":
                    assert self.places is not None
                    self.places = centred(self.places, row, columns, plan)
            stays = torch.zeros(len(at), dtype=torch.bool, device=at.device)
            stays[survivors] = True
            first = 0
            for one in group:
                n = len(one.alive)
                one.alive = one.alive[stays[first : first + n]]
                first += n
        gone = [without(one, len(where)) for one in pictures]  # what a stage inside the tower left out is among it
        return where[torch.stack(gone).any(0) & (where >= 0)] if gone else where[:0]

    def _decide(self, method: Any, after: int, count: int, tokens: Tokens) -> Reduction:
        """One decision. What it costs is counted once for each shape, as counting takes longer than deciding."""
        key, budget = (repr(method), after, *tokens.features.shape[1:], count), Budget(count, tokens=count)
        with nullcontext() if key in _costs else FlopCounterMode(display=False) as counter:
            plan: Reduction = step(method, budget, tokens)
        if counter is not None:
            _costs[key] = counter.get_total_flops()
        self.choosing += _costs[key]
        return plan

    def _tokens(
        self, method: Any, after: int, row: int, group: list[Picture], where: Tensor, states: Tensor,
        given: dict[str, Any], cache: "Cache",
    ) -> Tokens:  # fmt: skip
        columns = torch.cat([one.columns[one.alive] for one in group])
        at = where[columns]
        layout = Layout.join([one.layout for one in group])
        sizes = [len(one.layout) for one in group]
        alive = torch.cat([one.alive + sum(sizes[:i]) for i, one in enumerate(group)])
        layout = layout.take(alive)
        signals: dict[type, Any] = {}
        for need in method.needs:
            if isinstance(need, Places):
                signals[Places] = layout
            elif isinstance(need, Tower):
                signals[Tower] = TowerView.join([one.views[need] for one in group]).take(alive)
            elif isinstance(need, Question):
                signals[Question] = states[row : row + 1, where[self._text(row)[0]]]
            elif isinstance(need, Vocabulary):
                assert self.words is not None
                signals[Vocabulary] = self.words()
            elif isinstance(need, TextAttention):
                if after < 0 <= max(cuts(method, len(self.host.attentions))):
                    continue  # there is none yet; the method reads it at its later cuts
                signals[TextAttention] = self._looked(method, row, columns, where, states, given, cache)
            else:
                raise MissingSignal(
                    f"{type(method).__name__} needs {type(need).__name__}, which is not gathered for visual tokens"
                )
        n, device = len(at), at.device
        places = list(self.stages.at)
        site = Site(after, len(self.host.attentions), "prefill", 0, layout.grid, places.index(after), len(places))
        none = torch.zeros(1, n, dtype=torch.bool, device=device)
        return Tokens(
            states[row, at].unsqueeze(0), torch.arange(n, device=device).unsqueeze(0), none, none,
            torch.tensor([n], device=device), signals=signals, site=site,
        )  # fmt: skip

    def _text(self, row: int) -> tuple[Tensor, Tensor]:
        """The row's text tokens that ask: those after its first picture, or all; and those that come after it."""
        assert self.padding is not None
        visual = torch.cat([torch.cat([one.columns, one.separators]) for one in self.rows[row]])
        real = ~self.padding[row]
        text = real.clone()
        text[visual] = False
        index = text.nonzero().flatten()
        asks = index[index > visual.min()]
        return (asks if len(asks) else index), index

    def _looked(
        self, method: Any, row: int, columns: Tensor, where: Tensor, states: Tensor, given: dict[str, Any],
        cache: "Cache",
    ) -> Looked:  # fmt: skip
        if cache.shared.witness is None:
            raise MissingSignal(
                f"{type(method).__name__} reads the attention of a layer before its cut, and there is none before the "
                "first layer"
            )
        query, dense, scaling = cache.shared.witness
        k, n = query.shape[2], dense.keys.shape[2]
        real = ~dense.padding[row, 0]
        rank = real.cumsum(0) - 1  # every column's place among the keys that are there
        before = int(real[: n - k].sum())
        asks, text = self._text(row)
        then = self._where(row, where.device, cache)  # as the layer had them: an earlier stage may have cut here too
        cos, sin = tables(given, cache.shared.passed, row, self.host.config)
        fresh = dense.keys[row][:, n - k :]
        return Looked(
            query[row][:, then[text]], dense.keys[row][:, real],
            unturned(query[row], cos, sin)[:, then[text]], unturned(fresh, cos, sin)[:, real[n - k :]],
            rank[n - k + then[columns]], rank[n - k + then[text]], before, states[row, where[text]],
            torch.isin(text, asks), scaling, torch.stack([cos, sin])[:, real[n - k :]],
        )  # fmt: skip

    def _where(self, row: int, device: Any, cache: "Cache") -> Tensor:
        """Every column's place among the states on their way."""
        assert self.ids is not None and self.padding is not None
        passed, total = cache.shared.passed, self.ids.shape[1]
        columns = torch.arange(total, device=device) if passed is None else passed.columns[row]
        real = columns >= 0 if passed is not None else ~self.padding[row]
        where = torch.full((total,), -1, dtype=torch.long, device=device)
        where[columns[real]] = real.nonzero().flatten()
        return where

    # --- what follows from a cut ---

    def _passed(self, columns: Tensor, total: int, before: Passed | None) -> Passed:
        assert self.padding is not None
        ranks = (~self.padding).cumsum(1) - 1
        new = (~self.padding).sum(1).tolist()
        return Passed(
            columns, ranks.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -1), total, new,
            {} if before is None else dict(before.moved), set() if before is None else set(before.seen),
        )  # fmt: skip

    def _place(self, cut: Passed, states: Tensor) -> None:
        """Other positions than the old ones, where they were asked for: for this cut and all that follow."""
        if self.positions == "keep":
            return
        assert self.places is not None and self.turn is not None
        if self.positions == "compact":
            none = cut.columns[0, :0]  # of a row without pictures
            visual = [torch.cat([none, *(one.columns for one in row)]) for row in self.rows]
            self.places, self.shift = compacted(self.places, cut.columns, visual)
        at = cut.columns.clamp(min=0)
        mine = self.places.gather(-1, at.expand(*self.places.shape[:-1], at.shape[-1]))
        axes = mine[-3:] if mine.ndim == 3 else mine  # the first of four rows numbers the tokens, for masks
        cut.moved = {"position_embeddings": self.turn(states, axes)}


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows' tokens in a new order; what fills up a row is its first token, which nothing looks at."""
    return x.gather(1, index.clamp(min=0).unsqueeze(-1).expand(*index.shape, x.shape[-1]))
