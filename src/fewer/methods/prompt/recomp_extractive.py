"""RECOMP, extractive (arXiv 2310.04408): the sentences whose vectors are nearest to the question's.

    s_i = <e(question), e(sentence i)>,  e the mean over the tokens of an encoder's last layer
    without a budget, keep the best one, or two for questions in two steps

Differs from the paper: the encoder is MiniLM-L6 as it is, where theirs is Contriever fine-tuned so that what helps the
reader's language model comes first; its vectors are of length one, so the product is a cosine. Kept sentences stay in
the order of the source. Nothing is prepended to a sentence.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fewer.prompts.source import Ranking, Source
from fewer.score.embed import embedder
from fewer.score.passages import question_of
from fewer.types import Budget, BudgetError, Card


@dataclass(frozen=True)
class RECOMPExtractive:
    """Sentences like the question.

    Args:
        model: the encoder: "minilm", a hub name or folder, a pair of model and tokenizer, or an `Embedder`.
        top: how many sentences are kept where there is no budget; the paper's numbers are 1, and 2 for HotpotQA.
    """

    model: Any = "minilm"
    top: int = 1

    card: ClassVar[Card] = Card(
        source="arXiv 2310.04408",
        faithfulness="paper",
        mechanism="extract",
        differs="MiniLM, untuned, for the tuned Contriever; cosine",
    )
    needs: ClassVar[frozenset[object]] = frozenset()

    def __post_init__(self) -> None:
        if self.top < 1:
            raise BudgetError(f"RECOMPExtractive(top={self.top!r}): at least one sentence stays")

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        question, units = question_of(source, "recomp-extractive"), source.sentences
        vectors = embedder(self.model)([question, *map(source.of, units)]).double()
        value = (vectors[1:] @ vectors[0]).numpy()
        chosen = np.zeros(len(units), dtype=bool)
        chosen[np.argsort(-value, kind="stable")[: self.top]] = True
        return Ranking(units, value, chosen=chosen)
