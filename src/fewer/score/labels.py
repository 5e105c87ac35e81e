"""Labels for a classifier that shortens texts by deletion: for each word, how much it should stay.

    Labeller(text) -> a number in [0, 1] for each word of `words(text)`: 1 = keep, 0 = drop, between = unsure

`aligned` makes labels from a text and its shortened version, as any writer or model gives it; `Contrastive` makes them
from a causal language model alone. A classifier is trained on either by `train_keeper.fit_keeper`.

Two things that LLMLingua-2's code does to its labels are not done here: words stay as the text has them (there they
are lemmas without commas, which the classifier never meets again), and each label stands at its own word (there the
end of a sample is padded before its last label, which moves it).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fewer.prompts.source import Bools, Floats, Ints, Source, Units
from fewer.score.surprise import Reader
from fewer.types import FewerError

Labeller = Callable[[str], Any]
"""From a text to a number in [0, 1], or a bool, for each of `words(text)`."""


NEGATIONS = re.compile(
    r"not|no|never|none|nobody|nothing|nowhere|neither|nor|cannot|without|unless|except|\w+n['’]t", re.IGNORECASE
)
"""Words that turn round what a sentence says."""


def words(text: str) -> Units:
    """The words that labels are for: those of `Source.words`, punctuation marks among them."""
    return Source((text,)).words


@dataclass(frozen=True, eq=False)
class Alignment:
    """Which words of a text its shortened version keeps, and how far the pair can be trusted.

    S are the words of the text, C those of the shortened one, case ignored:

        variation  share of C that does not stand in S: the writer made words up
        gap        (words of C that stand in S, minus words of C that were matched in order) / |S|: the writer moved
                   words, or said them again
    """

    keep: Bools
    variation: float
    gap: float


def aligned(text: str, shortened: str) -> Alignment:
    """Which of `words(text)` the shortened text keeps: those on a longest common subsequence of the words of both.

    First words that agree exactly, then, between two matched ones, words that agree with case ignored. Where a word
    of the shortened text could be several of the source, it is the one nearest before the next matched word.

    >>> aligned("The cat saw the small dog.", "Cat saw small dog").keep.tolist()
    [False, True, True, False, True, True, False]
    """
    ours, theirs = _said(text), _said(shortened)
    folded = [word.casefold() for word in ours], [word.casefold() for word in theirs]
    pairs = common(ours, theirs)
    edges = [(-1, -1), *pairs, (len(ours), len(theirs))]
    for (i, j), (k, m) in pairwise(edges):
        inside = common(folded[0][i + 1 : k], folded[1][j + 1 : m])
        pairs += [(i + 1 + a, j + 1 + b) for a, b in inside]
    keep = np.zeros(len(ours), dtype=bool)
    keep[[i for i, _ in pairs]] = True
    known = set(folded[0])
    found = sum(word in known for word in folded[1])
    return Alignment(keep, 1 - found / len(theirs) if theirs else 0.0, (found - len(pairs)) / max(len(ours), 1))


def common(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int]]:
    """A longest common subsequence of two lists of words, as pairs of places.

    difflib finds the longest common run first and is no such thing. This is Hyyrö's algorithm (2004): row i of the
    dynamic program is one whole number of len(b) bits, in which 0 says that the length grows at this place.

    >>> common("a b c d".split(), "b d c".split())
    [(1, 0), (3, 1)]
    """
    full = (1 << len(b)) - 1
    at: dict[str, int] = {}
    for j, word in enumerate(b):
        at[word] = at.get(word, 0) | 1 << j
    rows = [full]
    for word in a:
        row, hits = rows[-1], rows[-1] & at.get(word, 0)
        rows.append(((row + hits) | (row - hits)) & full)
    pairs, i, j = [], len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:  # to match two equal last words is never worse
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif rows[i] >> (j - 1) & 1:  # the last word of b adds nothing here
            j -= 1
        else:
            i -= 1
    return pairs[::-1]


def trusted(alignments: Sequence[Alignment], worst: float = 0.1) -> Ints:
    """Which of them to train on, in order: of all, without the `worst` share by variation, and of those that are left
    without the worst share by gap, as LLMLingua-2 does it. Of two alike the later goes; what is without fault stays.
    """
    if not 0 <= worst < 1:
        raise FewerError(f"trusted(): worst={worst!r} is no share in [0, 1)")
    left = np.arange(len(alignments))
    for name in ("variation", "gap"):
        faults = np.array([getattr(alignments[index], name) for index in left.tolist()])
        order = np.argsort(faults, kind="stable")
        gone = order[len(order) - int(worst * len(order)) :]
        left = np.delete(left, gone[faults[gone] > 0])
    return left


def _said(text: str) -> list[str]:
    return [text[span.start : span.end] for span in words(text)]


@dataclass(frozen=True)
class Contrastive:
    """Labels from a causal language model's own surprise, with and without the document.

    For each word w of a sentence, summed over its tokens, in nats:

        alone = -log p(w | what its sentence says before it)
        read  = -log p(w | all that the document says before it)
        worth = alone + tie * max(alone - read, 0)

    A reader knows the language but not the document. What it would guess from the rest of the sentence need not stay
    (`alone` is small): most function words, ends of idioms. What it could not guess has to: names, numbers, negations.
    The contrast `alone - read` is what the document has to do with the word: words that it leans on (its people, its
    things) are those that facts are found by, so they count more, though a reader of all of it might guess them.

    Surprise says what a reader could not guess, not what turns a sentence round: a negation is often guessed from its
    sentence, and without it the opposite is said. So negations (`NEGATIONS`) are labelled 1, whatever their worth.

    A word's label says how surely it is among the best `keep` of the words of the document, by its distance to that
    border in nats: 1 / (1 + exp(-(worth - border) / soft)); `soft=0` gives 0 and 1.

    Args:
        reader: the language model.
        keep: the share of words that get a label above a half.
        tie: what the contrast counts beside the surprise.
        soft: how far from the border a label is sure, in nats.
    """

    reader: Reader
    keep: float = 0.4
    tie: float = 0.5
    soft: float = 1.0

    def __call__(self, text: str) -> Floats:
        return self.labels(text, self.worth(text))

    def worth(self, text: str) -> Floats:
        """What each of the words is worth, in nats."""
        offsets, read = self.reader.surprise(text)
        _, alone = apart(self.reader, text)
        source, units = Source((text,)), words(text)
        summed = [source.spread(units, [offsets], [values], "sum") for values in (alone, read)]
        return summed[0] + self.tie * np.maximum(summed[0] - summed[1], 0.0)

    def labels(self, text: str, worth: Floats) -> Floats:
        """Labels of a text's words from what they are worth."""
        if not len(worth):
            return worth
        above = worth - np.quantile(worth, 1 - self.keep)
        if self.soft == 0:
            labels = (above > 0).astype(float)
        else:
            labels = 1 / (1 + np.exp(-np.clip(above / self.soft, -50, 50)))  # one "word" may be a page of base64
        labels[[NEGATIONS.fullmatch(word) is not None for word in _said(text)]] = 1.0
        return labels


def apart(reader: Reader, text: str) -> tuple[Ints, Floats]:
    """Where each token of `text` stands `(n, 2)`, and the surprise at it `(n,)` when each sentence is read alone.

    The tokens are those of the whole text. What comes first is a blank line, so that the first word of a sentence is
    as likely as where a text begins.
    """
    ids, offsets = reader.tokens(text)
    starts = Source((text,)).sentences.start
    of = np.maximum(np.searchsorted(starts, offsets[:, 1], side="left") - 1, 0)
    edges = [0, *(np.flatnonzero(np.diff(of)) + 1).tolist(), len(ids)]
    lead = reader.start + reader.tokens("\n\n")[0]
    rows = [ids[a:b] for a, b in pairwise(edges)]
    return offsets, np.concatenate([np.zeros(0), *reader.of_many(rows, [lead] * len(rows))])
