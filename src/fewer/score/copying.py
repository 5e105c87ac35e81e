"""Which heads copy: scores of heads from how they read a text that says the same several times."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewer.attention import BLOCK_CELLS
from fewer.score.attention import attention_rows
from fewer.signals import Step
from fewer.types import Allocation, Budget, Plan, Tokens


@dataclass(frozen=True)
class Copied:
    """Shares of attention: `echo` to earlier copies of a query's own token, `induction` to the tokens after them."""

    echo: Tensor
    induction: Tensor


def copied(rows: Float[Tensor, "heads q n"], at: Int[Tensor, " q"], period: int, first: int = 0) -> Copied:
    """For each query `(heads, q)`, from its row of attention.

    Queries stand at the columns `at` of a text that repeats every `period` columns from column `first` on.
    """
    echo, induction = torch.zeros_like(rows[..., 0]), torch.zeros_like(rows[..., 0])
    query = torch.arange(len(at), device=at.device)
    for back in range(period, rows.shape[-1] - first, period):
        there = at - back >= first
        column = (at - back).clamp(min=0)
        echo += torch.where(there, rows[:, query, column], 0)
        induction += torch.where(there, rows[:, query, column + 1], 0)
    return Copied(echo, induction)


@dataclass(frozen=True)
class Copying:
    """Means of `copied` over the queries that have an earlier copy, for the best query head of each key-value head.

    `found` holds them by layer. For one row without padding, read in one forward.
    """

    period: int
    first: int = 0
    found: dict[int, Copied] = field(default_factory=dict, compare=False)

    key_bytes = 0

    def start(self) -> "_CopyingObserver":
        return _CopyingObserver(self)


class _CopyingObserver:
    lasting = False
    nbytes = 0

    def __init__(self, need: Copying) -> None:
        self.need = need

    def observe(self, step: Step) -> None:
        keys, positions, padding = step.dense()
        (_, heads, q, _), (h, n), need = step.query.shape, keys.shape[1:3], self.need
        total, start = torch.zeros(2, heads, device=keys.device), need.first + need.period
        late = torch.arange(start, q, device=keys.device)
        for block in torch.split(late, max(1, BLOCK_CELLS // (heads * n))):
            rows = attention_rows(
                step.query[:, :, block], step.positions[:, block], keys, positions, padding, step.scaling, step.softcap
            )[0]
            some = copied(rows, block, need.period, need.first)
            total += torch.stack([some.echo.sum(-1), some.induction.sum(-1)])
        echo, induction = (total / (q - start)).view(2, h, -1).amax(-1).cpu()
        need.found[step.place] = Copied(echo, induction)

    def value(self) -> None:
        """Nothing that belongs to the keys."""

    def regather(self, index: Tensor) -> None:
        pass

    def rows(self, index: Tensor) -> None:
        pass


@dataclass(frozen=True)
class _Listening:
    """Keeps everything, and only gathers."""

    needs: frozenset[Any]

    def score(self, tokens: Tokens) -> Tensor:
        return torch.zeros_like(tokens.positions, dtype=torch.float32)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return Allocation(tokens.available)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return Plan.keep(~tokens.padding)


@torch.no_grad()
def head_scores(model: Any, period: int = 2500, copies: int = 4, seed: int = 0) -> Copied:
    """Echo and induction scores `(layers, key-value heads)` of a transformers decoder.

    It reads `period` random tokens `copies` times, or as many as its positions allow, after its start token if it has
    one.
    """
    from fewer import Cache  # which loads transformers

    config = model.config.get_text_config(decoder=True)
    start = [config.bos_token_id] if isinstance(config.bos_token_id, int) else []
    most = getattr(config, "max_position_embeddings", None) or len(start) + copies * period
    period = min(period, (most - len(start)) // copies)
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randint(config.vocab_size, (period,), generator=draw)
    ids = torch.cat([torch.tensor(start, dtype=torch.long), drawn.repeat(copies)])
    need = Copying(period, len(start))
    with Cache(model, _Listening(frozenset({need}))) as cache:
        model.base_model(ids.unsqueeze(0).to(model.device), past_key_values=cache)  # logits of it all are not needed
    found = [need.found[place] for place in range(len(need.found))]
    return Copied(torch.stack([layer.echo for layer in found]), torch.stack([layer.induction for layer in found]))


def best_heads(scores: Float[Tensor, "layers h"], share: float) -> Bool[Tensor, "layers h"]:
    """The best `share` of all heads of a model, to the nearest whole number."""
    best = scores.flatten().argsort(descending=True, stable=True)[: round(share * scores.numel())]
    return torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, best, True).view_as(scores)
