"""SCOPE (arXiv 2508.15813): chunks of sentences that belong together, each written anew in fewer words.

    chunk     a sentence joins the chunk before it while it is like its mean
    rho_i     cosine of the chunk and the question, scaled to [0, 1]; without a question, of the chunk and everything
    share_i   in proportion to  (1 + beta (2 rho_i - 1)) sqrt(mean length / length_i), so that all meet the budget
    rewrite   the least relevant chunk first, until the text fits; words most like it must be in what is written

Chunks that are too short to rewrite are apart: they stay as they are, or go whole.

Differs from the paper: its chunking, outliers, ratio, order and keyword keeping were known by their descriptions alone;
thresholds, formulas and what a keyword is are ours. The writer is the default language model, asked in words, or a
function of yours. Its text ends with its last whole sentence that fits, and is checked, but for its truth: where a
keyword is missing, or more than the chunk is written, the chunk's most relevant sentences stand instead, and a note
says so. A chunk that holds something protected is shortened by sentences too.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import regex

from fewer import checks
from fewer.prompts.chunks import allowed, best, coherent, cosine
from fewer.prompts.source import Bools, Floats, Ranking, Source, Units
from fewer.score.embed import Embedder, embedder
from fewer.score.rewriting import asking, finished
from fewer.types import Budget, Card, FewerError

Count = Callable[[str], int]
SHORT = 16  # tokens below which a chunk is not rewritten
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+(?:[.\-'’][\p{L}\p{M}\p{N}]+)*")


@dataclass(frozen=True)
class SCOPE:
    """Chunk, rank, rewrite.

    Args:
        alike, longest: cosine from which on a sentence joins a chunk, and tokens that a chunk may have.
        beta: how far a chunk's share follows its relevance.
        keywords: words of a chunk that must be in what is written; one for every eight tokens, at most.
        rewrite: a language model (a name, a pair, a `Reader`), or a function, `fewer.score.rewriting.Rewrite`.
        model: the sentence encoder: "minilm", another name, a pair, or an `Embedder`.
    """

    alike: float = 0.2
    longest: int = 256
    beta: float = 0.5
    keywords: int = 3
    rewrite: Any = "default"
    model: Any = "minilm"

    card: ClassVar[Card] = Card(
        source="arXiv 2508.15813", faithfulness="style", mechanism="rewrite",
        differs="thresholds and formulas are ours; what is written is checked, else sentences are kept",
        slugs=("scope",),
    )  # fmt: skip
    needs: ClassVar[frozenset[object]] = frozenset()

    def __post_init__(self) -> None:
        checks.shares(alike=abs(self.alike), beta=self.beta)
        checks.counts(longest=self.longest)
        checks.counts(0, keywords=self.keywords)

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        embed, sentences, count = embedder(self.model), source.sentences, source.counter.count
        texts, sizes = [source.of(span) for span in sentences], source.sizes(sentences)
        vectors = embed(texts).double().numpy()
        asked = embed([source.question])[0].double().numpy() if source.question.strip() else vectors.sum(0)
        value = cosine(vectors, asked)
        if budget is None:
            return Ranking(sentences, value)
        runs = coherent(vectors, sizes, sentences.document.tolist(), self.alike, self.longest)
        whole = np.array([sizes[run].sum() for run in map(_slice, runs)])
        centres = np.array([vectors[run].sum(0) for run in map(_slice, runs)])
        near = cosine(centres, asked)
        scaled = (near - near.min()) / max(float(np.ptp(near)), 1e-9)
        apart = whole < SHORT
        weights = (1 + self.beta * (2 * scaled - 1)) * np.sqrt(whole.mean() / whole.clip(1))
        weights[apart] = 1e6  # these stay as they are, where there is room for them
        room = budget.count(int(whole.sum()))
        share = allowed(whole, weights, float(room))
        chosen, made, faults = np.ones(len(sentences), dtype=bool), dict[int, str](), Counter[str]()
        left = whole.sum()
        for chunk in sorted(np.flatnonzero(~apart).tolist(), key=lambda i: near[i]):
            if left <= room:
                break
            run, most = _slice(runs[chunk]), int(share[chunk])
            span = _span(sentences, runs[chunk])
            said, fault = "", "it holds something protected"
            if not any(p.document == span[0] and p.start < span[2] and p.end > span[1] for p in source.protected):
                text = source.of(span)
                words = self._words(embed, text, centres[chunk], source.question, most)
                said, fault = self._written(text, words, most, int(whole[chunk]), count)
            if fault:
                faults[fault] += 1
                chosen[run] = best(value[run], sizes[run], float(most))
            else:
                made[chunk] = said
            left -= whole[chunk] - (sizes[run][chosen[run]].sum() if fault else count(said))
        notes = tuple(f"{n} of {len(runs)} chunks lost sentences, not rewritten: {why}" for why, n in faults.items())
        return _joined(sentences, runs, value, near, chosen, made, notes)

    def _words(self, embed: Embedder, text: str, centre: Floats, question: str, most: int) -> list[str]:
        """The chunk's keywords: those of the question first, then those that are most like the chunk."""
        found = {word.casefold(): word for word in _WORD.findall(text) if len(word) > 3 or word.isdecimal()}
        asked = {word.casefold() for word in _WORD.findall(question)}
        like = cosine(embed(list(found.values())).double().numpy(), centre)
        order = sorted(zip(like.tolist(), found.items(), strict=True), key=lambda row: -row[0] - (row[1][0] in asked))
        return [word for _, (_, word) in order[: min(self.keywords, max(1, most // 8))]]

    def _written(self, text: str, words: list[str], most: int, whole: int, count: Count) -> tuple[str, str]:
        """What was written, or what is wrong with it."""
        if most < 1:
            return "", "no token is left for it"
        said = (self.rewrite if callable(self.rewrite) else asking(self.rewrite))(text, words, most)
        if not isinstance(said, str):
            raise FewerError(f"SCOPE(rewrite=...): the function gave {type(said).__name__}, not text")
        if count(said) > whole:
            return "", "what was written was longer"
        said = finished(said, most, count)
        there = {word.casefold() for word in _WORD.findall(said)}
        return said, "" if said and all(word.casefold() in there for word in words) else "a keyword was missing"


def _slice(run: range) -> slice:
    return slice(run.start, run.stop)


def _span(sentences: Units, run: range) -> tuple[int, int, int]:
    return int(sentences.document[run.start]), int(sentences.start[run.start]), int(sentences.end[run[-1]])


def _joined(
    sentences: Units, runs: list[range], value: Floats, near: Floats, chosen: Bools, made: dict[int, str], notes: Any
) -> Ranking:
    """Units that are sentences, and in one piece the chunks that were written anew."""
    rows: list[tuple[tuple[int, int, int], float, bool]] = []
    texts: dict[int, str] = {}
    for chunk, run in enumerate(runs):
        if chunk in made:
            texts[len(rows)] = made[chunk]
            rows.append((_span(sentences, run), near[chunk], True))
        else:
            rows += [(_span(sentences, range(i, i + 1)), value[i], bool(chosen[i])) for i in run]
    spans, worth, stays = zip(*rows, strict=True)
    return Ranking(Units.made(spans), np.array(worth), np.array(stays, dtype=bool), written=texts, notes=notes)
