"""TidalDecode (arXiv 2410.05076): the keys that matter in one layer matter in the next ones too, so choose them rarely.

    prefill           full attention
    decoding, layers  0 .. start - 1           read every key
                      start and correction     read every key; the top k logits of each query head are its choice
                      all others               read the keys of the last choice, and nothing else

Every token stays: what is saved is reads, not bytes.

Differs from the paper: layers are counted among those with an unbounded cache; several tokens at once read everything,
as a prompt does; the newest token is read where it was chosen, as in the authors' simulation.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewer import checks
from fewer.reduce.select import top_k
from fewer.types import Allocation, Budget, Card, FewerError, Plan, Tokens


@dataclass(frozen=True)
class TidalDecode:
    """Sparse reads with persistent positions, over the whole cache.

    Args:
        top_k: keys that a query head reads in the sparse layers.
        start: the first layer that chooses.
        correction: the layer that chooses anew (published: 9 of 32, and 13 for Llama 3 8B).
    """

    top_k: int = 256
    start: int = 2
    correction: int = 9

    whole: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        source="arXiv 2410.05076",
        faithfulness="official",
        mechanism="read less",
        differs="several tokens at once read everything; the newest token is read where it was chosen",
        slugs=("tidaldecode",),
    )
    needs: ClassVar[frozenset[object]] = frozenset()

    def __post_init__(self) -> None:
        checks.counts(top_k=self.top_k)
        checks.counts(0, start=self.start, correction=self.correction)
        if self.start > self.correction:
            raise FewerError(f"{self}: layers choose anew after they chose")

    def score(self, tokens: Tokens) -> Tensor:
        return torch.zeros_like(tokens.positions, dtype=torch.float32)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return Allocation(tokens.available)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)

    def reads(self, layer: int) -> Literal["all", "choose", "chosen"]:
        """What a decoding step reads in this layer; where it chooses it reads everything as well."""
        if layer in (self.start, self.correction):
            return "choose"
        return "all" if layer < self.start else "chosen"
