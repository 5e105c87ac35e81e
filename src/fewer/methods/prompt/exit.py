"""EXIT (arXiv 2412.12559): keep the sentences of which a language model, with the whole context before it, says that
they help to answer.

    p_i = P(Yes) / (P(Yes) + P(No))   after  query, full context, sentence i, "Is this sentence useful in answering
                                      the query? Answer only "Yes" or "No"."
    keep i if p_i >= 0.5, in the order of the source; with a budget, those first, then by p_i

Query and context are read once for all sentences, whose short endings are then read in batches on what the model
remembers of that: the numbers are those of a whole pass for each sentence, at about the cost of reading the text twice.

Differs from the paper: the default model is SmolLM2-135M-Instruct as it is, where theirs is Gemma-2B fine-tuned for
this on HotpotQA. Untuned, it ranks sentences no better than chance (area under the curve 0.47 on 32 passages of
`fewer_eval.cited`), so give a tuned model of your own. The model's own chat template takes the place of Gemma's.
Sentences are found by sentencex, not spaCy. A context longer than the model's window is split into runs of sentences,
where the authors cut it off at 4,096 tokens; of a sentence beyond a quarter of the window, the beginning is read.
Query, context and sentences are tokenised apart, and what looks like a special token in them is plain text.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from fewer.prompts.source import Ranking, Source
from fewer.score.passages import passages, question_of, together
from fewer.score.surprise import reader
from fewer.score.yes_no import plain, turn, yes
from fewer.types import Budget, BudgetError, Card, UnknownName

ASKED = 'Is this sentence useful in answering the query? Answer only "Yes" or "No".'


@dataclass(frozen=True)
class EXIT:
    """Sentences that a language model calls useful.

    Args:
        model: the language model: "default", a hub name or folder, a pair of model and tokenizer, or a `Reader`.
        threshold: probability from which on a sentence is kept where there is no budget.
        context: what counts as the full context: the sentence's own "document", as in the authors' training, or "all",
            as in their quick start.
    """

    model: Any = "default"
    threshold: float = 0.5
    context: Literal["document", "all"] = "document"

    card: ClassVar[Card] = Card(
        source="arXiv 2412.12559",
        faithfulness="paper",
        mechanism="extract",
        differs="an untuned 135M model by default; its own chat template; long contexts are read in parts",
        slugs=("exit",),
    )
    needs: ClassVar[frozenset[object]] = frozenset()

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise BudgetError(f"EXIT(threshold={self.threshold!r}): a probability is in [0, 1]")
        if self.context not in ("document", "all"):
            raise UnknownName(f"EXIT(context={self.context!r}): known are 'document' and 'all'")

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        query, units, read = question_of(source, "exit"), source.sentences, reader(self.model)
        longest = max(read.window // 4, 1)
        ids = [plain(read.tokenizer, source.of(span))[:longest] for span in units]
        fixed = turn(read, ["Query:\n", query, "\nFull context:\n", "", "\nSentence:\n", "", f"\n{ASKED}"])
        room = read.window - sum(map(len, fixed)) - max(map(len, ids), default=0)
        if room < 1:
            raise BudgetError(
                f"the query takes {len(fixed[1]):,} tokens of the model's window of {read.window:,}, which leaves none "
                f"for the context; shorten it"
            )
        value, spans = np.zeros(len(units)), list(units)
        for run in passages(units, [len(one) + 1 for one in ids], room, across=self.context == "all"):
            context = plain(read.tokenizer, together(source, spans[run.start : run.stop]))[:room]
            before = [*fixed[0], *fixed[1], *fixed[2], *context, *fixed[4]]
            value[run.start : run.stop] = yes(read, before, [ids[i] + fixed[6] for i in run])
        return Ranking(units, value, chosen=value >= self.threshold)
