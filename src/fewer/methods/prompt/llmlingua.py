"""LLMLingua (Jiang et al., EMNLP 2023, arXiv 2310.05736): keep the tokens that surprise a small language model.

    documents   the most surprising ones, -1/n sum_i log p(x_i | x_<i), until k times the budget is used
    windows     of these, 200 tokens at a time: s_i = -log p(x_i | what stayed before the window, the window up to i);
                those above the quantile of the window that leaves the budget's share stay

What stayed of a window is read again without what went, so that the next is judged after the text that its reader sees.

Differs from the paper: its other controls (a model tuned to the reader, budgets of their own for instruction and
question, a filter of sentences) are left out: the documents alone are shortened, and the question is not looked at.
Shares are met over windows of any length, the last and the only one too; the authors' package 0.2.2 keeps those below
200 tokens whole, and takes its quantile over all that stayed and all that is still to come, which the paper does not
(with that rule in place of ours, the same weights gave the package's text). Tokens of white space are always part of
what stayed. When the reader's window is full, a quarter of it is read anew; the package drops the oldest keys and
leaves the others where they stood. Documents are ranked only where the budget leaves some out; k is the paper's, the
package adds 100 tokens instead. The model's first token comes before the text, there nothing does. A token's value is
its distance in nats from its window's quantile, by which the budget is then met exactly.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fewer.prompts.source import Ranking, Source
from fewer.score.surprise import reader
from fewer.score.windows import Read, pruned, target, until
from fewer.types import Budget, Card


@dataclass(frozen=True)
class LLMLingua:
    """Iterative pruning by perplexity.

    Args:
        model: the causal language model: a name, a pair of model and tokenizer, or a `Reader`.
        window: tokens that are judged at once.
        coarse: documents are taken until they hold so many times the budget.
    """

    model: Any = "default"
    window: int = 200
    coarse: float = 2.0

    card: ClassVar[Card] = Card(
        source="Jiang et al., EMNLP 2023, arXiv 2310.05736",
        faithfulness="paper",
        mechanism="extract",
        differs="no filter of sentences, no tuning to the reader; the share is met in short and last windows too",
        slugs=("llmlingua",),
    )
    needs: ClassVar[frozenset[object]] = frozenset()

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        if budget is None:  # it has no threshold without a share, and reading first would be for nothing
            return Ranking(source.whole, np.zeros(len(source.whole)))
        lm = reader(self.model)
        read = Read.of(source, lm)
        goal = target(source, budget, read)
        ranked = list(range(len(source.documents)))
        if self.coarse * goal < len(read) and len(ranked) > 1:
            mean = [loss.mean() if len(loss) else -1.0 for loss in lm.of_many(read.ids, [lm.start] * len(ranked))]
            ranked.sort(key=lambda document: -mean[document])
        taken = until(read, ranked, self.coarse * goal)
        share = min(goal / max(sum(len(read.ids[document]) for document in taken), 1), 1.0)
        value, chosen = pruned(
            source, read, sorted(taken), [share] * len(taken), (lm.prefix(),), self.window, ranked[len(taken) :]
        )
        return Ranking(read.units, value, chosen)
