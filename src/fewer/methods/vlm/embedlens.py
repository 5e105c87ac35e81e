"""EmbedLens (2026, "What Do Visual Tokens Really Encode?"): tokens that say nothing look alike to the language model.

    ids_j    the three words whose input embeddings have the greatest cosine with token j
    useless    those that have one of a few ids among them: of sinks of the tower, sinks of the language model, and dead
               tokens; all others are alive
    s_j      = alive or not, and then minus how many of the picture's tokens have the commonest of ids_j too

`alive` tells them apart, and `words` says what they look like, for drawings of what a model sees.

Differs from the paper: the authors name the ids of one model (`ids=(1141, 26673, 30296)` for LLaVA-1.5) and drop all
useless tokens. Here ids are found, as the words that are nearest for more than a `crowd` of the picture's tokens, where
they are not named; and as many tokens stay as were asked for, so that among the alive, and among the others, those with
rarer words come first. It tells the classes at the input alone, so it cuts before the first layer.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.errors import FewerError
from fewer.reduce.select import top_k
from fewer.score.vocabulary import Words, common, named, nearest_words
from fewer.signals.visual import Vocabulary
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class EmbedLens:
    """Tokens whose nearest words are not everybody's.

    Args:
        ids: the ids of words that mean nothing, where they are known; found in each picture if empty.
        crowd: the share of a picture's tokens from which on an id is taken for such a one.
        nearest: how many words of each token are looked at.
    """

    ids: tuple[int, ...] = ()
    crowd: float = 0.1
    nearest: int = 3

    card: ClassVar[Card] = Card(
        source="arXiv 2603.00510",
        faithfulness="official",
        mechanism="prune",
        differs="ids are found, not named; exact counts",
        slugs=("embedlens",),
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Vocabulary()})

    def __post_init__(self) -> None:
        if not 0 < self.crowd <= 1:
            raise FewerError(f"EmbedLens(crowd={self.crowd!r}): a share of a picture's tokens, above 0 and up to 1")
        if self.nearest < 1:
            raise FewerError(f"EmbedLens(nearest={self.nearest!r}): at least one word, 3 in the paper")

    def words(self, tokens: Tokens) -> Words:
        """The nearest words of each token."""
        return nearest_words(tokens.features[0], tokens.signal(Vocabulary, Tensor), self.nearest)

    def alive(self, tokens: Tokens) -> Tensor:
        """Which tokens say something."""
        return self._alive(self.words(tokens).ids)

    def score(self, tokens: Tokens) -> Tensor:
        ids = self.words(tokens).ids
        return (self._alive(ids).float() - common(ids).amax(-1)).unsqueeze(0)  # shares are never above one

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)

    def _alive(self, ids: Tensor) -> Tensor:
        if self.ids:
            return ~named(ids, self.ids)
        return (common(ids) <= self.crowd).all(-1)
