"""Selective Context (Li et al., EMNLP 2023, arXiv 2310.06201): drop what carries the least information.

    I(x_i) = -log p(x_i | x_<i), each sentence read by itself
    I(u)   = mean of its tokens, for the units: sentences, phrases or tokens
    those below the (1 - keep) quantile of I(u) go

Differs from the paper: the reader is fewer's default model instead of GPT-2. Phrases are noun chunks in the paper, for
which it takes a tagger; here a phrase is what stands between function words and marks on a line, at most `LONGEST`
words, with the articles and the like before it: verbs go with the nouns beside them. A function word or a mark is a
phrase by itself, as there. The function words are English; in other languages phrases are runs of words between marks.
A token across two units counts for both, not half for each. White space stays as it is, and line breaks end sentences.
With a budget the quantile is the one that meets it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fewer.prompts.source import Ranking, Source, Units
from fewer.score.surprise import reader
from fewer.types import Budget, BudgetError, Card, UnknownName

LONGEST = 5

_LEADS = "a an the this that these those my your his her its our their some any no every each all both another"
_FUNCTION = """
i me you he him she it we us they them who whom whose which what where when why how there here about above across after
against along among around as at before behind below beneath beside between beyond by down during except for from in
inside into like near of off on onto out outside over past per since than through to toward under until up upon via with
within without and but or nor so yet if unless because although though while whether be am is are was were been being
have has had having do does did will would shall should can could may might must not also too very just then now only
even"""
LEADS, FUNCTION = frozenset(_LEADS.split()), frozenset(_FUNCTION.split())


@dataclass(frozen=True)
class SelectiveContext:
    """Pruning by self-information.

    Args:
        model: the causal language model: a name, a pair of model and tokenizer, or a `Reader`.
        unit: what goes or stays whole: "sentences", "phrases" or "tokens".
        keep: the share of units that stays where no budget is given; the authors' `reduce_ratio` is one minus this.
    """

    model: Any = "default"
    unit: str = "phrases"
    keep: float = 0.65

    card: ClassVar[Card] = Card(
        source="Li et al., EMNLP 2023, arXiv 2310.06201",
        faithfulness="paper",
        mechanism="extract",
        differs="phrases are cut at function words, not by a tagger; SmolLM2 reads instead of GPT-2",
        slugs=("selective-context",),
    )
    needs: ClassVar[frozenset[object]] = frozenset()

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        if self.unit not in ("sentences", "phrases", "tokens"):
            raise UnknownName(f"selective-context: unit={self.unit!r} is none of 'sentences', 'phrases', 'tokens'")
        if not 0 < self.keep <= 1:
            raise BudgetError(f"selective-context: keep={self.keep!r} is not a share in (0, 1]")
        lm, sentences = reader(self.model), source.sentences
        read = [lm.tokens(source.of(span)) for span in sentences]
        found = lm.of_many([ids for ids, _ in read], [lm.start] * len(read))
        offsets, values = [], []
        for document in range(len(source.documents)):
            mine = sentences.of(document)
            moved = [read[i][1] + sentences.start[i] for i in range(mine.start, mine.stop)]
            offsets.append(np.concatenate([np.zeros((0, 2), dtype=np.int64), *moved]))
            values.append(np.concatenate([np.zeros(0), *found[mine]]))
        units = {"sentences": lambda: sentences, "phrases": lambda: phrases(source)}.get(
            self.unit, lambda: source.tokens(offsets)
        )()
        value = source.spread(units, offsets, values)
        chosen = value >= np.quantile(value, 1 - self.keep) if budget is None and len(value) else None
        return Ranking(units, value, chosen)


def phrases(source: Source) -> Units:
    """Runs of content words, with the articles and the like before them; other words and marks by themselves.

    >>> source = Source(("The old man sat on his red chair.",))
    >>> [source.of(span) for span in phrases(source)]
    ['The old man sat', 'on', 'his red chair', '.']
    """
    out: list[tuple[int, int, int]] = []
    size, kind = 0, ""  # of the last phrase: its words, and what it ends in
    for span in source.words:
        word = source.of(span).casefold()
        now = "lead" if word in LEADS else "content" if word[:1].isalnum() and word not in FUNCTION else ""
        document, start, last = out[-1] if out else (-1, 0, 0)
        near = document == span.document and source.documents[document][last : span.start] in (" ", "  ", "\t")
        if near and size < LONGEST and kind and now and not (kind == "content" and now == "lead"):
            out[-1], size = (document, start, span.end), size + 1
        else:
            out.append((span.document, span.start, span.end))
            size = 1
        kind = now
    return Units.made(out)
