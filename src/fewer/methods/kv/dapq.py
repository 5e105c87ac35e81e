"""DapQ (arXiv 2603.11564): where a query stands says more about what it reads than what it says.

    append N pseudo tokens to the prompt, at the positions of the coming decoding steps; drop their keys and values
    a   = mean over the pseudo queries of softmax(q K^T)          (b, heads, n), K with the pseudo keys
    s   = pool(a over the prompt, kernel)                          as SnapKV does before its window
    keep the top of s

Differs from the paper: N and what the pseudo tokens say were not in the sources read, so both are parameters; kernel
and pooling are SnapKV's; scores are averaged over the query heads that share a key-value head. No token of the prompt
is kept for being recent: the window is not part of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewer import checks
from fewer.allocate.uniform import uniform
from fewer.reduce.select import top_k
from fewer.score.attention import per_head, smooth, window_attention
from fewer.signals import QueryWindow, Step, marked_last
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class PseudoWindow:
    """The queries of pseudo tokens, and their keys, which attention to them passes through the same softmax."""

    window: QueryWindow
    keys: Float[Tensor, "b h p d"]


@dataclass(frozen=True)
class Pseudo:
    """`count` tokens that are read after the prompt and forgotten. `content` is a token id for all of them, or "last":
    the row's own last tokens once more, from the first of them again where the row has fewer."""

    count: int
    content: Literal["last"] | int = "last"

    key_bytes: ClassVar[int] = 0
    probe: ClassVar[bool] = True

    def start(self) -> "_PseudoObserver":
        return _PseudoObserver()

    def inputs(self, ids: Int[Tensor, "b q"], real: Bool[Tensor, "b q"]) -> Iterator[tuple[Tensor, Tensor]]:
        had = real.sum(1, keepdim=True)
        if self.content == "last":
            order = marked_last(~real)  # each row's real tokens come first
            at = (had - self.count + torch.arange(self.count, device=ids.device)) % had.clamp(min=1)
            said = ids.gather(1, order.gather(1, at))
        else:
            said = ids.new_full((len(ids), self.count), self.content)
        yield said, (had > 0).expand_as(said)


class _PseudoObserver:
    lasting = False

    def __init__(self) -> None:
        self.window: PseudoWindow | None = None

    def observe(self, step: Step) -> None:
        pass  # of the prompt itself nothing is asked

    def observe_probe(self, step: Step) -> None:
        keys, _, _ = step.dense()
        window = QueryWindow(step.query, step.positions, step.padding, step.scaling, step.softcap)
        self.window = PseudoWindow(window, keys[:, :, -step.query.shape[2] :].clone())

    def value(self) -> PseudoWindow | None:
        return self.window

    def regather(self, index: Tensor) -> None:
        pass

    def rows(self, index: Tensor) -> None:
        self.window = None  # the next prompt brings its own

    @property
    def nbytes(self) -> int:
        if self.window is None:
            return 0
        window = self.window.window
        return window.query.nbytes + window.positions.nbytes + window.padding.nbytes + self.window.keys.nbytes


@dataclass(frozen=True)
class DapQ:
    """Attention of pseudo queries at the coming positions, smoothed.

    Args:
        count: pseudo tokens.
        content: what they say: "last" for the row's own last tokens again, or a token id.
        kernel: width of the pooling, odd.
        pooling: "mean" or "max".
    """

    count: int = 32
    content: Literal["last"] | int = "last"
    kernel: int = 5
    pooling: Literal["mean", "max"] = "mean"

    card: ClassVar[Card] = Card(
        source="arXiv 2603.11564",
        faithfulness="style",
        differs="number and content of the pseudo tokens are not the published ones, which were not to be had; "
        "averages scores over grouped query heads",
        slugs=("dapq",),
    )

    def __post_init__(self) -> None:
        checks.counts(count=self.count)
        checks.odd(kernel=self.kernel)
        checks.words(("mean", "max"), pooling=self.pooling)
        if self.content != "last":
            checks.counts(0, content=self.content)

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Pseudo(self.count, self.content)})

    def score(self, tokens: Tokens) -> Tensor:
        pseudo = tokens.signal(Pseudo, PseudoWindow)
        h, n = tokens.positions.shape[1:]
        places, padding = (x.unsqueeze(1).expand(-1, h, -1) for x in (pseudo.window.positions, pseudo.window.padding))
        seen = window_attention(
            pseudo.window,
            torch.cat([tokens.features, pseudo.keys], 2),
            torch.cat([tokens.positions, places], 2),
            torch.cat([tokens.padding, padding], 2),
        )  # (b, heads, n + p)
        return per_head(smooth(seen[..., :n], self.kernel, self.pooling), h)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)
