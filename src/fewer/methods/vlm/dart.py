"""DART (Wen et al., 2025, "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More"):
a few pivots, and beside each of them the tokens that are least like it.

    pivots   4 visual tokens and 4 tokens of the text after them, with the greatest L1 norm of the key over all heads
    chosen   pivot by pivot, those of the visual tokens not chosen yet whose states have the least cosine with its own,
             an equal number for each pivot; and the visual pivots themselves

Keys are those of the layer before the cut, turned by their positions, as in the authors' code; where padding comes
first, by those that the row has alone.

Differs from the paper: states are compared as they are, where the authors apply the language model's last norm first,
whose weights stretch channels. Pivots take turns in the order of the prompt, where the authors' code takes the order of
a Python set (the same for places below 32). Counts are exact: what does not divide evenly goes to the first pivots;
there it is left out.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.errors import FewerError
from fewer.reduce.select import top_k
from fewer.signals.visual import Looked, TextAttention
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class DART:
    """Pivots by the norms of their keys, and what duplicates none of them.

    Args:
        layer: the first layer that reads fewer tokens, K in the authors' code, counted from 0.
        image: pivots among the visual tokens.
        text: pivots among the text after them.
    """

    layer: int = 2
    image: int = 4
    text: int = 4

    card: ClassVar[Card] = Card(
        source="arXiv 2502.11494",
        faithfulness="official",
        mechanism="prune",
        differs="states without the last norm; pivots in the order of the prompt; exact counts",
    )
    needs: ClassVar[frozenset[object]] = frozenset({TextAttention()})

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise FewerError(f"DART(layer={self.layer!r}): it reads the keys of the layer before, so at least 1")
        if self.image < 1 or self.text < 0:
            raise FewerError(f"DART(image={self.image!r}, text={self.text!r}): at least one pivot among visual tokens")

    def after(self, layers: int) -> tuple[int, ...]:
        return (self.layer - 1,)

    def score(self, tokens: Tokens) -> Tensor:
        looked = tokens.signal(TextAttention, Looked)
        return _norms(looked, looked.visual).unsqueeze(0)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        keep, n = int(allocation.counts), scores.shape[-1]
        if keep <= self.image:
            return top_k(scores, allocation)
        looked, states = tokens.signal(TextAttention, Looked), tokens.features[0].float()
        own = scores[0].argsort(descending=True, stable=True)[: self.image].sort().values
        rows = (looked.after | ~looked.after.any()).nonzero().flatten()  # all where none comes after a picture
        norms = _norms(looked, looked.text[rows])
        words = rows[norms.argsort(descending=True, stable=True)[: self.text].sort().values]
        pivots = F.normalize(torch.cat([states[own], looked.states[words].float()]), dim=-1)
        alike = pivots @ F.normalize(states, dim=-1).T  # (pivots, n)
        chosen = torch.zeros(n, dtype=torch.bool, device=states.device)
        chosen[own] = True
        each, more = divmod(keep - len(own), len(pivots))
        for number, row in enumerate(alike):
            least = row.masked_fill(chosen, torch.inf).argsort(stable=True)
            chosen[least[: each + (number < more)]] = True
        return Plan.of(chosen.nonzero().T, n)


def _norms(looked: Looked, columns: Tensor) -> Tensor:
    """The L1 norms of these columns' keys, all heads as one.

    A turn changes such a norm, so positions have to count from the row's first token, which padding before it may move:
    then all keys are turned back by the place of that token. Of a later turn or chunk it is not known.
    """
    key = looked.key[:, columns].float()
    if looked.turns is not None and not looked.before and bool(looked.turns[1, 0].any()):
        cos, sin = looked.turns[:, 0]
        x, rest = key[..., : len(cos)], key[..., len(cos) :]
        half = torch.cat([-x[..., len(cos) // 2 :], x[..., : len(cos) // 2]], -1)
        key = torch.cat([(x * cos - half * sin) / cos.hypot(sin), rest], -1)  # some models scale their tables
    return key.abs().sum((0, 2))
