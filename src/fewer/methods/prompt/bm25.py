"""BM25 (Robertson and others, TREC-3, 1994): sentences that share rare words with the question. A baseline.

    s_i = sum over the question's words w of  idf(w) tf / (tf + k1 (1 - b + b |i| / mean length))
    idf(w) = ln(1 + (n - n_w + 0.5) / (n_w + 0.5)),  n sentences, n_w of them with w, tf times w in sentence i

Computed by the library bm25s, in its default form (Lucene's).

Differs from the paper: the form with Lucene's idf and without the constant k1 + 1, which change no order but where idf
would be negative. Sentences are ranked, not documents. Words are compared in lower case, without stemming; identifiers
count in their parts; of scripts that part no words, each character is one.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import regex

from fewer import checks
from fewer.prompts.source import Floats, Ranking, Source, Units
from fewer.score.passages import holders, question_of
from fewer.types import Budget, Card

_TERM = regex.compile(r"[\p{L}\p{M}\p{N}]+")


@dataclass(frozen=True)
class BM25:
    """Sentences by the words they share with the question.

    Args:
        k1: how soon another time of the same word adds no more.
        b: how much long sentences are marked down, in [0, 1].
    """

    k1: float = 1.5
    b: float = 0.75

    card: ClassVar[Card] = Card(
        source="Robertson and others, TREC-3 (1994)",
        faithfulness="paper",
        mechanism="extract",
        differs="Lucene's form, by the library bm25s; sentences, in lower case, not stemmed",
    )
    needs: ClassVar[frozenset[object]] = frozenset()

    def __post_init__(self) -> None:
        checks.numbers(k1=self.k1)
        checks.shares(b=self.b)

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        asked = Source((question_of(source, "bm25"),))
        query = terms(asked, asked.whole)[0]
        scores = self._scores(query, terms(source, source.sentences))
        none = "no word of the question stands in the text, so bm25 has nothing to go by: the first sentences stay"
        return Ranking(source.sentences, scores, notes=() if scores.any() else (none,))

    def _scores(self, query: list[str], sentences: list[list[str]]) -> Floats:
        import bm25s

        known = {term for sentence in sentences for term in sentence}
        if not known.intersection(query):  # bm25s wants a word to look up, and one to index
            return np.zeros(len(sentences))
        index = bm25s.BM25(k1=self.k1, b=self.b, dtype="float64", backend="numpy")
        index.index(sentences, show_progress=False)
        return np.asarray(index.get_scores([term for term in query if term in known]), dtype=np.float64)


def terms(source: Source, units: Units) -> list[list[str]]:
    """What words of each unit are compared."""
    out: list[list[str]] = [[] for _ in units]
    for unit, span in zip(holders(source.words, units).tolist(), source.words, strict=True):
        out[unit] += _TERM.findall(source.of(span).casefold())
    return out
