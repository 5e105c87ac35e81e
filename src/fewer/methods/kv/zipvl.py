"""ZipVL (arXiv 2410.08584): each layer decides by itself how many tokens it needs.

    a_j = attention of the probes to j, summed              s_j = a_j / queries of the prompt that see j
    p   = the least number, one for a layer, for which its heads' p largest a add up to tau * sum_j a_j
    the p tokens of largest s are important: only they attend, and only to each other, while the prompt is read;
    then v1 packs them in 4 bits and the others in 2, and v2 drops the others

`keep` is a ceiling for variant "drop": a layer keeps p tokens or what `keep` allows, whichever is less, and everything
at 1.0; say 0.99 to let tau decide alone. Variant "quantise" keeps every token, and `keep` must be 1.0.

Differs from the paper: read from descriptions, not from code. Each key-value head picks p tokens of its own; the
prompt's last token always attends, since the answer starts from it; a layer's attention leaves tokens that do not
attend as they were. Probes are ZipCache's (5 % last, 5 % drawn), and so are the forms of storage. Later chunks and
turns are read densely. Decoded tokens stay as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewer import checks
from fewer.allocate.uniform import uniform
from fewer.bits import check_bits
from fewer.codec import Stores
from fewer.reduce.select import top_k
from fewer.reduce.tiers import fresh, two_tiers
from fewer.score.position import latest, must_stay
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
        dense: read the prompt with full attention, and only store less.
    """

    tau: float = 0.975
    variant: Literal["quantise", "drop"] = "quantise"
    bits_important: int = 4
    bits_others: int = 2
    probes: float = 0.05
    seed: int = 0
    dense: bool = False

    card: ClassVar[Card] = Card(
        source="arXiv 2410.08584",
        faithfulness="style",
        mechanism="quantise",
        differs="heads choose tokens of their own; the last always attends; later chunks and turns are read densely",
        slugs=("zipvl",),
    )

    def __post_init__(self) -> None:
        checks.shares(some=True, tau=self.tau, probes=self.probes)
        checks.words(("quantise", "drop"), variant=self.variant)
        checks.counts(None, seed=self.seed)
        for bits in (self.bits_important, self.bits_others):
            check_bits(bits)

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
        needed = Allocation(self._needed(tokens, scores))
        return two_tiers(tokens, top_k(torch.where(fresh(tokens), scores, -torch.inf), needed))

    @property
    def among(self) -> Callable[[Tokens, Tensor], Plan] | None:
        """Who takes part in the attention to a prompt, if not all do."""
        return None if self.dense else self._important

    def _important(self, tokens: Tokens, scores: Tensor) -> Plan:
        return top_k(must_stay(scores, latest(tokens, 1)), Allocation(self._needed(tokens, scores)))

    def _needed(self, tokens: Tokens, scores: Tensor) -> Tensor:
        """The least number of fresh tokens that hold tau of what all fresh tokens got: `(b, h)`, the same for all h
        that have as many."""
        got = torch.where(fresh(tokens), scores * onlookers(tokens), 0.0).double()
        held = got.sort(dim=-1, descending=True).values.mean(1).cumsum(-1)  # (b, n), by the n best of every head
        enough = self.tau * (1 - 1e-6) * held[..., -1:]  # float32 sums are no more exact than that
        least = (held < enough).sum(-1) + 1
        return torch.minimum(least.unsqueeze(-1), fresh(tokens).sum(-1))  # a row of padding alone has none
