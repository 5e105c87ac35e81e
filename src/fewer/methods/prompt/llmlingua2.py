"""LLMLingua-2 (arXiv 2403.12968): a small classifier says of each word whether it should stay.

    p_i = probability of "keep" at piece i, read with what is before and after it
    s_w = mean of p_i over the pieces of word w; the words with the highest s_w of the whole prompt stay

Differs from the paper: one threshold for the whole prompt, where the authors' package gives every chunk of 512 pieces
the same share. Chunks are slices of the text's own pieces, cut at the ends of sentences or lines. Words are fewer's,
identifiers and numbers whole, and white space is the source's. Without a budget, words with s_w above one half stay.
A forced word comes first wherever it stands as a word, a forced digit brings its whole word, line breaks need no force.
The head that comes with fewer is MiniLM-L6's top layer, fitted to what a small language model finds surprising, not to
a large one's deletions. `compat=True` is package llmlingua 0.2.2 with its quirks (`score.llmlingua022`): the same words
at the same rate, though as they stand in the source, and with a budget brought to its exact ceiling.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from fewer.fit import Fit, load
from fewer.prompts.source import Bools, Floats, Ranking, Source, Units
from fewer.score.keepers import Keeper, keeper
from fewer.score.llmlingua022 import Options, shorten
from fewer.types import Budget, BudgetError, Card


@dataclass(frozen=True)
class LLMLingua2:
    """Words by a token classifier.

    Args:
        fit: what the classifier learned, from `fit_to`; `load` reads it from a file; None for what comes with fewer.
        model: the encoder that it was fitted to, "minilm"; or a token classifier with labels drop and keep: a folder or
            hub name, a pair of model and tokenizer, or a `Keeper`.
        bits: 8 reads with linear layers in 8 bits, about twice as fast on a CPU (`score.int8`).
        threshold: of s_w, above which a word stays where there is no budget.
        pool: s_w is the mean of the word's pieces, or its first piece's.
        force_tokens: words that come before all others; what must stay whatever the budget goes to `protect`.
        force_reserve_digit: words with a digit in them come before all others.
        drop_consecutive: a forced word goes where it stands again with nothing that stays between.
        compat: do as package llmlingua 0.2.2 does.
        rate: compat's, where there is no budget.
    """

    fit: Fit | None = None
    model: Any = "minilm"
    bits: int | None = None
    threshold: float = 0.5
    pool: Literal["mean", "first"] = "mean"
    force_tokens: tuple[str, ...] = ()
    force_reserve_digit: bool = False
    drop_consecutive: bool = False
    compat: bool = False
    rate: float | None = None

    card: ClassVar[Card] = Card(
        source="arXiv 2403.12968",
        faithfulness="official",
        mechanism="classify",
        training="fit",
        differs="one threshold for the whole prompt; our own small head; compat=True keeps the package's words",
        slugs=("llmlingua2",),
    )
    needs: ClassVar[frozenset[object]] = frozenset()
    fit_optional: ClassVar[bool] = True
    fits_on: ClassVar[str] = "documents"

    def __post_init__(self) -> None:
        object.__setattr__(self, "force_tokens", tuple(self.force_tokens))
        if not 0 <= self.threshold < 1:
            raise BudgetError(f"LLMLingua2(threshold={self.threshold!r}): a probability is in [0, 1)")
        if self.rate is not None and not (self.compat and 0 < self.rate <= 1):
            raise BudgetError(f"LLMLingua2(rate={self.rate!r}): with compat=True, the share that stays, in (0, 1]")

    @classmethod
    def load(cls, path: str | Path, **settings: Any) -> "LLMLingua2":
        """With the fit in this file; see `fewer.fit.load` for what is refused."""
        return cls(load(path, "llmlingua2"), **settings)

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        read = keeper(self.model, self.fit, self.bits)
        if self.compat:
            return self._compat(read, source, budget)
        units = source.words
        offsets, p = zip(*read(source.documents), strict=True)
        forced = self._forced(source, units)
        value = source.spread(units, offsets, p, self.pool) + forced
        if self.drop_consecutive:
            value[self._again(source, units, value, forced, budget)] = -1.0
        return Ranking(units, value, chosen=value > self.threshold if budget is None else None)

    def _forced(self, source: Source, units: Units) -> Bools:
        """Which units hold what was named as forced."""
        words = [re.escape(word.strip()) for word in self.force_tokens if word.strip()]
        found = [rf"(?<!\w){word}(?!\w)" if word[-1].isalnum() else word for word in words]
        pattern = re.compile("|".join([*found, *([r"\d+"] if self.force_reserve_digit else [])]) or r"(?!)")
        spans = [[match.span() for match in pattern.finditer(text)] for text in source.documents]
        forced: Bools = source.spread(units, spans, [np.ones(len(each)) for each in spans], "max") > 0
        return forced

    def _again(self, source: Source, units: Units, value: Floats, forced: Bools, budget: Budget | None) -> list[int]:
        """Forced units that say what the forced one before them says, with nothing between them that would stay."""
        stays = value > self.threshold
        if budget is not None:
            order = np.argsort(-value, kind="stable")
            stays[order] = np.cumsum(source.sizes(units)[order]) <= budget.count(sum(map(len, source.ends)))
        out, before = [], None
        spans = list(units)
        for unit in np.flatnonzero(forced | stays).tolist():
            said = source.of(spans[unit]) if forced[unit] else None
            if said and said == before:
                out.append(unit)
            before = said
        return out

    def _compat(self, read: Keeper, source: Source, budget: Budget | None) -> Ranking:
        """The package's words, and what it loses on its way, which it does not keep."""
        if budget is None and self.rate is None:
            raise BudgetError("LLMLingua2(compat=True) has no threshold of its own: give keep=, tokens=, or it a rate=")
        if budget is None and self.rate == 1:
            return Ranking(source.words, np.ones(len(source.words)), chosen=np.ones(len(source.words), dtype=bool))
        options = Options(self.pool, self.force_tokens, self.force_reserve_digit, self.drop_consecutive)
        share = self.rate if budget is None else budget.keep if isinstance(budget.keep, float) else None
        tokens = budget.tokens if budget and share is None else None
        done = shorten(read, source.documents, share or 1.0, options, tokens=tokens)
        places = []
        for text, document in zip(source.documents, done, strict=True):
            at, mine = 0, []
            for word in document.words:
                if word.start >= 0:
                    mine += [(at, word.start, -1.0, False), (word.start, word.end, word.p, word.kept)]
                    at = word.end
            places.append([place for place in [*mine, (at, len(text), -1.0, False)] if place[0] < place[1]])
        spans = [[place[:2] for place in each] for each in places]
        units = source.tokens(spans)
        value = source.spread(units, spans, [[place[2] for place in each] for each in places], "max")
        chosen = source.spread(units, spans, [[place[3] for place in each] for each in places], "max") > 0
        return Ranking(units, value, chosen=chosen)

    @staticmethod
    def fit_to(
        model: Any, texts: Sequence[str], *, seed: int = 0, tick: Callable[[str, float], None] | None = None
    ) -> Fit:
        """Train on what a causal language model (`score.surprise.reader`) is surprised by in these texts."""
        from fewer.train_keeper import fit_from_reader

        return fit_from_reader(model, texts, seed=seed, tick=tick)
