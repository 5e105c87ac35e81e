"""Statistical: words by what the text itself says of them. No model, nothing to load; the same on every machine.

    rare     r(w) = -log p(w),  p(w) = (times of w in the source + PRIOR 2^-length) / (words + PRIOR): what is
             said often tells little, and of what is said once, what is short; stop words fall out of both, in any
             language that parts words, without a list
    shape    more for digits, for capitals where no sentence begins, and for names as code writes them
    again    what a word is worth is divided by 1 + again log(times it came before)
    near     a share of a word's worth is that of its sentence's words, so that a fact stays or goes in one piece
    asked    more for words of the question, if there is one, and by `near` for the sentences that hold them

Differs from the paper: there is none. Blind to meaning: "not" is a short and frequent word to it, so protect negations
where they matter.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import regex

from fewer import checks
from fewer.prompts.source import Floats, Ranking, Source
from fewer.score.passages import holders
from fewer.types import Budget, Card

PRIOR = 50.0
"""Words that are taken to be read before the text."""

_SHAPE = regex.compile(r"[\p{N}\p{Sc}%‰°]|\p{Ll}\p{Lu}|\p{Lu}{2}|\w[_/\\:@#~.]\w")
_SIGN = regex.compile(r"[^\p{L}\p{N}\p{Sc}%‰°]+")


@dataclass(frozen=True)
class Statistical:
    """Words by statistics of the text.

    Args:
        shape: nats more for numbers, signs of currency and the like, names and identifiers.
        again: how fast a word that comes back loses worth.
        near: the share of a word's worth that is its sentence's.
        asked: nats more for the rarest words of the question, and as much less as they are more common.
    """

    shape: float = 4.0
    again: float = 0.3
    near: float = 0.6
    asked: float = 6.0

    card: ClassVar[Card] = Card(source="ours", faithfulness="own", mechanism="extract")
    needs: ClassVar[frozenset[object]] = frozenset()

    def __post_init__(self) -> None:
        checks.numbers(shape=self.shape, again=self.again, asked=self.asked)
        checks.shares(near=self.near)

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        units = source.words
        said = [source.of(span) for span in units]
        folded = [text.casefold() for text in said]
        sentence = holders(units, source.sentences)
        question = Source((source.question,))
        asked = {question.of(span).casefold() for span in question.words}
        rare, value, times = _rare(folded), np.zeros(len(units)), dict.fromkeys(folded, 0)
        most = rare.max(initial=1.0)
        word = np.array([_SIGN.fullmatch(text) is None for text in said], dtype=bool)
        for i in np.flatnonzero(word):
            begins = i == 0 or sentence[i - 1] != sentence[i] or not word[i - 1]
            special = _SHAPE.search(said[i]) or (said[i][0].isupper() and not begins)
            value[i] = rare[i] + (self.shape if special else 0.0)
            value[i] /= 1 + self.again * math.log1p(times[folded[i]])
            if folded[i] in asked:
                value[i] += self.asked * rare[i] / most
            times[folded[i]] += 1
        many = np.bincount(sentence, word, minlength=len(source.sentences))
        mean = np.bincount(sentence, value, minlength=len(source.sentences)) / np.maximum(many, 1)
        return Ranking(units, (1 - self.near) * value + self.near * mean[sentence])


def _rare(words: list[str]) -> Floats:
    """Surprise at each word, in nats, if the text were drawn word by word."""
    count = Counter(words)
    total = len(words) + PRIOR
    known = {kind: -math.log((n + PRIOR * 0.5 ** len(kind)) / total) for kind, n in count.items()}
    return np.array([known[word] for word in words])
