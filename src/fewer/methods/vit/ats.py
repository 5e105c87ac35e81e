"""ATS, Adaptive Token Sampling (arXiv 2111.15667, section 3): as many tokens as the image needs, at most K.

    S_j    the class token's attention to j times the norm of j's value, summed over heads; then scaled to sum to one
    CDF    the cumulative sum of S, in the order of the image
    draw   K samples at 1/2K, 3/2K ... (2K-1)/2K of it; each takes the token whose CDF is nearest
    keep   every token that was taken, once: many where attention is spread, few where it dwells on some

Differs from the paper: attention is computed for all tokens and those that leave are dropped after it, where the paper
drops their rows of the attention matrix before it meets the values, which comes to the same. It acts at three places, a
quarter, half and three quarters of the way, and K falls by the same share at each; the paper has K fixed, at blocks of
its choice. An encoder without a class token is rated by what each token adds to all. A budget of everything keeps
everything. The authors' code differs from their text: it sorts the tokens by S before it sums, takes the norm of the
values of all heads together, and spreads samples from the least CDF to one; here it is as in the text.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fewer.allocate.sampled import Sampled, quantiles
from fewer.score.heads import quarters, significance
from fewer.signals.heads import Attended, Heads
from fewer.types import Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class ATS:
    """Pruning by inverse transform sampling. What is asked for is the number of samples, and the most that can stay."""

    card: ClassVar[Card] = Card(
        source="arXiv 2111.15667",
        faithfulness="paper",
        mechanism="prune",
        differs="as in the text, which the authors' code is not; places and K of each are set by `keep`",
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Heads()})
    schedule: ClassVar[str] = "geometric"
    exact: ClassVar[bool] = False

    def places(self, layers: int) -> list[int]:
        return quarters(layers)

    def score(self, tokens: Tokens) -> Tensor:
        return significance(tokens.signal(Heads, Attended), tokens.site.prefix)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Sampled:
        return quantiles(tokens, scores, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Sampled) -> Plan:
        return Plan.keep(allocation.kept)
