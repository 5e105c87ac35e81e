"""LongLLMLingua (Jiang et al., ACL 2024, arXiv 2310.06839): LLMLingua with an eye on the question.

    documents   r_k = -1/m sum_j log p(question_j | document k), the lowest first, the question followed by "We can get
                the answer to this question in the given documents."; until k times the budget is used
    shares      from tau + d for the best to tau - d for the last of those taken, in equal steps, within [0, 1]
    windows     s_i = -log p(x_i | prefix) + log p(x_i | question, prefix), over what stayed before; those above the
                quantile of their window and document stay
    order       of documents: the best first, where readers look first

Differs from the paper: mapping answers back is `Compression.locate`, which every method has. tau is solved for so that
the shares give the budget however long the documents are. A blank line parts document and question, as it parts
documents. A document that is too long for the reader's window is ranked by its best piece. Windows are as in
`llmlingua` here (see there); quantiles are of a document within a window, as in the authors' package. `reorder`,
`slope` and the restrictive sentence are what its description gives; the instruction is not looked at.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fewer.prompts.source import Floats, Ranking, Source
from fewer.score.surprise import Reader, reader
from fewer.score.windows import GLUE, Read, pruned, target, until
from fewer.types import Budget, Card, MissingSignal, UnknownName

RESTRICT = " We can get the answer to this question in the given documents."


@dataclass(frozen=True)
class LongLLMLingua:
    """Contrastive pruning for a question.

    Args:
        model: the causal language model: a name, a pair of model and tokenizer, or a `Reader`.
        window: tokens that are judged at once.
        coarse: documents are taken until they hold so many times the budget.
        slope: d, how much more than the mean share the best document keeps, and the last one less.
        reorder: "sort" puts the best documents first, "two_stage" alternates between both ends, "original" leaves them.
    """

    model: Any = "default"
    window: int = 200
    coarse: float = 2.0
    slope: float = 0.3
    reorder: str = "sort"

    card: ClassVar[Card] = Card(
        source="Jiang et al., ACL 2024, arXiv 2310.06839",
        faithfulness="paper",
        mechanism="extract",
        differs="shares are solved for so that they give the budget; windows as in llmlingua",
        slugs=("longllmlingua",),
    )
    needs: ClassVar[frozenset[object]] = frozenset()

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        if not source.question.strip():
            raise MissingSignal(
                "longllmlingua keeps what a question makes more likely, and there is none: give question=, or take "
                "llmlingua, which needs none"
            )
        if self.reorder not in ("sort", "two_stage", "original"):
            raise UnknownName(f"longllmlingua: reorder={self.reorder!r} is none of 'sort', 'two_stage', 'original'")
        if budget is None:  # it has no threshold without a share, and reading first would be for nothing
            return Ranking(source.whole, np.zeros(len(source.whole)))
        lm = reader(self.model)
        read = Read.of(source, lm)
        goal = target(source, budget, read)
        ranked = list(range(len(source.documents)))
        if len(ranked) > 1:
            loss = losses(lm, read, source.question)
            ranked.sort(key=lambda document: loss[document])
        taken = until(read, ranked, self.coarse * goal)
        rest = ranked[len(taken) :]
        slopes = np.linspace(self.slope, -self.slope, len(taken)) if len(taken) > 1 else np.zeros(len(taken))
        share = dict(zip(taken, shared(slopes, [len(read.ids[i]) for i in taken], goal).tolist(), strict=True))
        order = {"sort": taken, "original": sorted(taken), "two_stage": taken[::2] + taken[1::2][::-1]}[self.reorder]
        prefixes = lm.prefix(), lm.prefix(source.question + GLUE)
        value, chosen = pruned(source, read, order, [share[i] for i in order], prefixes, self.window, rest)
        return Ranking(read.units, value, chosen, None if self.reorder == "original" else (*order, *rest))


def losses(lm: Reader, read: Read, question: str) -> list[float]:
    """Of each document, the mean loss of the question after it; infinite for an empty one."""
    asked = lm.tokens(GLUE + question + RESTRICT)[0][-(lm.window // 2) :]
    room = lm.window - len(asked) - len(lm.start) - 1
    pieces = [(i, ids[at : at + room]) for i, ids in enumerate(read.ids) for at in range(0, len(ids), room)]
    found = lm.of_many([asked] * len(pieces), [lm.start + piece for _, piece in pieces])
    best = [float("inf")] * len(read.ids)
    for (document, _), loss in zip(pieces, found, strict=True):
        best[document] = min(best[document], float(loss.mean()))
    return best


def shared(slopes: Floats, lengths: list[int], goal: float) -> Floats:
    """Shares in [0, 1], tau plus these slopes, that leave `goal` of documents that are so long."""
    low, high = -2.0, 2.0
    for _ in range(50):
        tau = (low + high) / 2
        low, high = (tau, high) if np.clip(slopes + tau, 0, 1) @ lengths < goal else (low, tau)
    return np.clip(slopes + high, 0, 1)
