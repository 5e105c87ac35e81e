"""TCRA-LLM (arXiv 2310.15556): words without which a text still means the same go first; or a summary is written.

    semantic       for each word i:  d_i = 1 - cos(e(text), e(text without word i)),  keep the words of greatest d
    summarising    some sentences at a time are put in fewer words by a language model, each at the same share

Differs from the paper: leaving out is done within windows of whole sentences, of at most `window` of the encoder's
tokens, so that a text costs `window` times itself, not its square; a word moves a short window more than a long one.
The encoder is MiniLM-L6. Words are ranked once, not again after each deletion. The summariser is the default language
model, asked in words, or a function of yours, where theirs is a T5 fine-tuned on summaries of several lengths; what is
beyond the share is cut off after its last whole sentence, or word. Written from the abstract and from accounts of the
paper; the distance and the window are ours.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fewer.prompts.source import Ranking, Source, Units
from fewer.score.embed import embedder
from fewer.score.leave_one_out import moved
from fewer.score.passages import holders, passages, together
from fewer.score.writing import Writer, summariser, within
from fewer.types import Budget, BudgetError, Card, FewerError

SHARE = 0.35
"""Of its tokens that a summary keeps where there is no budget: the paper's."""

PIECE = 512
"""Tokens, of whole sentences, that are summarised at once."""


@dataclass(frozen=True)
class TCRA:
    """Words that matter to a text's vector, or summaries.

    Args:
        model: the encoder: "minilm", a hub name or folder, a pair of model and tokenizer, or an `Embedder`.
        window: tokens of the encoder within which a word is left out.
        summarise: None for the semantic method; "default", or another name of a causal language model, to summarise
            with that; or a function from a text and the tokens it may have to a shorter text.
    """

    model: Any = "minilm"
    window: int = 64
    summarise: str | Writer | None = None

    card: ClassVar[Card] = Card(
        source="arXiv 2310.15556",
        faithfulness="style",
        mechanism="extract",
        differs="words are left out within windows; MiniLM; the default language model summarises",
        slugs=("tcra-llm",),
    )
    needs: ClassVar[frozenset[object]] = frozenset()

    def __post_init__(self) -> None:
        if self.window < 2:
            raise BudgetError(f"TCRA(window={self.window!r}): a window holds at least two tokens")

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        return self._semantic(source) if self.summarise is None else self._summaries(source, budget)

    def _semantic(self, source: Source) -> Ranking:
        embed, words = embedder(self.model), source.words
        spans, texts, cuts = list(words), [], []
        for mine in _windows(source, embed.tokenizer, self.window):
            start = spans[mine.start].start
            texts.append(together(source, spans[mine.start : mine.stop]))
            cuts.append([(span.start - start, span.end - start) for span in spans[mine.start : mine.stop]])
        return Ranking(words, moved(embed, texts, cuts))

    def _summaries(self, source: Source, budget: Budget | None) -> Ranking:
        write = summariser(self.summarise) if isinstance(self.summarise, str) else self.summarise
        assert write is not None
        count, spans = source.counter.count, list(source.sentences)
        runs = passages(source.sentences, [count(source.of(span)) for span in spans], PIECE)
        units = Units.made([(spans[run.start][0], spans[run.start].start, spans[run[-1]].end) for run in runs])
        long = [count(source.of(span)) for span in units]
        share = SHARE
        if budget is not None and budget.tokens is not None:  # what parts the pieces stays
            share = max(0.0, budget.tokens - 2 * len(units)) / max(sum(long), 1)
        made = {}
        for index, span in enumerate(units):
            allowed = max(1, int(share * long[index]))
            text = write(source.of(span), allowed)
            if not isinstance(text, str):
                raise FewerError(f"TCRA(summarise=...): the function gave {type(text).__name__}, not text")
            if text := within(text.strip(), allowed, count):
                made[index] = text
        value = np.array([float(index in made) - 1e-6 * index for index in range(len(units))])
        notes = tuple(
            [f"{len(units) - len(made)} pieces came back empty and were left out"] if len(made) < len(units) else []
        )
        return Ranking(units, value, chosen=value > 0.5, written=made, notes=notes)


def _windows(source: Source, tokenizer: Any, window: int) -> list[range]:
    """Runs of words: those of whole sentences with at most `window` tokens, or of a part of a longer sentence."""
    words, sentences = source.words, source.sentences
    sizes = np.zeros(len(words), dtype=np.int64)
    for document, text in enumerate(source.documents):
        read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts, mine = np.array([a for a, _ in read["offset_mapping"]], dtype=np.int64), words.of(document)
        sizes[mine] = np.diff(np.searchsorted(starts, [*words.start[mine], len(text)]))
    first = np.searchsorted(holders(words, sentences), np.arange(len(sentences) + 1))
    total = np.concatenate([[0], np.cumsum(sizes)])
    out = []
    for run in passages(sentences, (total[first[1:]] - total[first[:-1]]).tolist(), window):
        start, end = int(first[run.start]), int(first[run.stop])
        some = Units(words.document[start:end], words.start[start:end], words.end[start:end])
        out += [range(start + r.start, start + r.stop) for r in passages(some, sizes[start:end].tolist(), window)]
    return out
