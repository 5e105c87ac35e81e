"""Provence (arXiv 2501.16214): one pass over question and passage reranks the passage and marks what to keep of it.

    [question; passage] -> a rerank score from the first token, a keep probability p_j for each token of the passage
    keep a sentence if the mean of its p_j is above the threshold (0.1); or, "majority", if more than half of them are

Needs a fit: two heads and the encoder's upper layers, from `fit_to` (loss: cross-entropy of tokens + 0.05 squared error
of the rerank score).

Differs from the paper: the encoder is MiniLM-L6, trained as a sentence encoder, where theirs is a DeBERTa reranker; all
but its two last layers stay as they are. It is fitted on generated passages of templated facts (`fewer_eval.cited`),
not MS MARCO; labels are known, not cited by a language model; the rerank score learns 1 and 0, not a teacher's score.
The mean rule and 0.1 are OpenProvence's, "majority" the paper's as we know it. Passages are runs of whole sentences of
up to 256 tokens with the question. Documents are put in the order of their scores only if `reorder` says so. No title
is kept by force. Fitted to 450 such passages it ranks sentences better than plain cosine on facts of the kinds it saw
(area under the curve 0.98 to 0.94), and worse on kinds it did not see (0.95 to 0.99): RECOMP is the safer choice there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from fewer.fit import Fit, check, load
from fewer.prompts.source import Ranking, Source
from fewer.score.embed import embedder
from fewer.score.joint import Cited, keep_probabilities
from fewer.score.passages import passages, question_of
from fewer.score.yes_no import plain, plain_offsets
from fewer.types import Budget, BudgetError, Card, UnknownName


@dataclass(frozen=True)
class Provence:
    """Sentences by a joint head.

    Args:
        fit: the head, from `fit_to`; `load` reads it from a file.
        model: the encoder that it was fitted to: "minilm", a pair of model and tokenizer, or an `Embedder`.
        threshold: of keep probability, above which a sentence is kept where there is no budget.
        rule: what of a sentence's tokens has to be above it.
        reorder: put out the documents by their rerank scores, best first.
    """

    fit: Fit | None = None
    model: Any = "minilm"
    threshold: float = 0.1
    rule: Literal["mean", "majority"] = "mean"
    reorder: bool = False

    card: ClassVar[Card] = Card(
        source="arXiv 2501.16214",
        faithfulness="paper",
        mechanism="extract",
        training="fit",
        differs="MiniLM, its upper layers fitted on generated passages; hard labels for the rerank score",
    )
    needs: ClassVar[frozenset[object]] = frozenset()
    fits_on: ClassVar[str] = "cited"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise BudgetError(f"Provence(threshold={self.threshold!r}): a probability is in [0, 1]")
        if self.rule not in ("mean", "majority"):
            raise UnknownName(f"Provence(rule={self.rule!r}): known are 'mean' and 'majority'")

    @classmethod
    def load(cls, path: str | Path, **settings: Any) -> "Provence":
        """With the fit in this file; see `fewer.fit.load` for what is refused."""
        return cls(load(path, "provence"), **settings)

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        question, units, embed = question_of(source, "provence"), source.sentences, embedder(self.model)
        check(self, embed.model)
        assert self.fit is not None
        asked = plain(embed.tokenizer, question)[: embed.longest // 2]
        room = embed.longest - 3 - len(asked)
        ids, offsets, parts = [], [], []
        for document, text in enumerate(source.documents):
            mine, where = plain_offsets(embed.tokenizer, text)
            ids.append(mine)
            offsets.append(where)
            first = np.searchsorted(offsets[-1][:, 0], [*units.start[units.of(document)], len(text)]).tolist()
            parts += [(document, a, b) for a, b in pairwise(first)]
        spans = [
            (parts[run.start][0], at, min(at + room, parts[run[-1]][2]))
            for run in passages(units, [b - a for _, a, b in parts], room)
            for at in range(parts[run.start][1], parts[run[-1]][2], room)
        ]
        scores, keep = keep_probabilities(embed, self.fit.tensors, asked, [ids[d][a:b] for d, a, b in spans])
        each = [np.zeros(len(one)) for one in ids]
        rerank = np.full(len(ids), -np.inf)
        for (document, a, b), score, p in zip(spans, scores, keep, strict=True):
            each[document][a:b] = p
            rerank[document] = max(rerank[document], score)
        value = source.spread(units, offsets, each)
        above = source.spread(units, offsets, [p > self.threshold for p in each]) > 0.5
        order = tuple(np.argsort(-rerank, kind="stable").tolist())
        said = ", ".join(f"{score:.2f}" for score in rerank)
        return Ranking(
            units,
            value,
            chosen=value > self.threshold if self.rule == "mean" else above,
            order=order if self.reorder else None,
            notes=(f"rerank scores: {said}",) if len(ids) > 1 else (),
        )

    @staticmethod
    def fit_to(
        model: Any,
        examples: Sequence[Cited],
        *,
        seed: int = 0,
        tick: Callable[[str, float], None] = lambda what, share: None,
        **recipe: Any,
    ) -> Fit:
        """Train the head on questions and passages whose useful sentences are known.

        Args:
            model: the encoder, as the field of that name.
            examples: such as `fewer_eval.cited.passages` makes.
            recipe: see `fewer.train_joint.train`.
        """
        from fewer.train_joint import train

        return train(model, examples, seed=seed, tick=tick, **recipe)
