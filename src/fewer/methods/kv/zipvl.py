"""ZipVL (arXiv 2410.08584): each layer decides by itself how many tokens it needs.

    a_j = attention of the probes to j, summed              s_j = a_j / queries of the prompt that see j
    p   = the least number, one for a layer, for which its heads' p largest a add up to tau * sum_j a_j
    the p tokens of largest s are important: v1 packs them in 4 bits and the others in 2; v2 drops the others

`keep` is a ceiling for variant "drop": a layer keeps p tokens or what `keep` allows, whichever is less, and everything
at 1.0; say 0.99 to let tau decide alone. Variant "quantise" keeps every token, and `keep` must be 1.0.

Differs from the paper: the prefill itself is dense. ZipVL attends among the important tokens only while it reads the
prompt, which makes it faster and changes what later layers see; here the choice is made after a layer has attended, so
nothing is saved before the cache is. Read from descriptions, not from code: each key-value head picks p tokens of its
own, probes are ZipCache's (5 % last, 5 % drawn), and so are the forms of storage. Decoded tokens stay as they are.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.codec import Stores
from fewer.reduce.select import top_k
from fewer.reduce.tiers import fresh, two_tiers
from fewer.score.probes import onlookers, probe_attention
from fewer.signals import Probes
from fewer.tiers import ChannelSeparable
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class ZipVL:
    """As many important tokens as hold `tau` of a layer's attention.

    Args:
        tau: share of the attention that the important tokens hold, in (0, 1].
        variant: "quantise" packs the others in fewer bits, "drop" drops them and holds the rest in full precision.
        bits_important, bits_others: 2, 3, 4 or 8; not used by "drop".
        probes: share of the last queries that probe; as many are drawn from the others.
        seed: of the draw.
    """

    tau: float = 0.975
    variant: Literal["quantise", "drop"] = "quantise"
    bits_important: int = 4
    bits_others: int = 2
    probes: float = 0.05
    seed: int = 0

    card: ClassVar[Card] = Card(
        source="arXiv 2410.08584",
        faithfulness="style",
        mechanism="quantise",
        differs="the prefill is dense: only the cache is mixed or cut, not the attention while reading the prompt",
        slugs=("zipvl",),
    )

    @property
    def whole(self) -> bool:
        return self.variant == "quantise"

    @property
    def store(self) -> Stores:
        return (ChannelSeparable(self.bits_important), ChannelSeparable(self.bits_others)) if self.whole else (None,)

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Probes(self.probes, self.seed)})

    def score(self, tokens: Tokens) -> Tensor:
        return probe_attention(tokens) / onlookers(tokens)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        if self.whole or budget.whole:
            return Allocation(tokens.available)
        most = uniform(tokens, budget)
        counts = torch.minimum(self._needed(tokens, scores) + (tokens.protected & ~tokens.padding).sum(-1), most.counts)
        note = "layers keep fewer tokens than allowed where fewer hold tau of the attention"
        return Allocation(counts, note=note * bool((counts < most.counts).any()))

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        if not self.whole:
            return top_k(scores, allocation)
        needed = torch.minimum(self._needed(tokens, scores), fresh(tokens).sum(-1))
        return two_tiers(tokens, top_k(torch.where(fresh(tokens), scores, -torch.inf), Allocation(needed)))

    def _needed(self, tokens: Tokens, scores: Tensor) -> Tensor:
        """The least number of fresh tokens that hold tau of what all fresh tokens got: `(b, h)`, the same for all h."""
        got = torch.where(fresh(tokens), scores * onlookers(tokens), 0.0).double()
        held = got.sort(dim=-1, descending=True).values.mean(1).cumsum(-1)  # (b, n), by the n best of every head
        enough = self.tau * (1 - 1e-6) * held[..., -1:]  # float32 sums are no more exact than that
        least = (held < enough).sum(-1) + 1
        return least.unsqueeze(-1).expand(scores.shape[:2])
