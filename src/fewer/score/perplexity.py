"""Perplexity of a text after another, and of each line of a text; where lines are a peak of it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fewer.prompts.source import Source
from fewer.score.surprise import Reader


def perplexities(read: Reader, text: str, before: Sequence[str]) -> NDArray[np.float64]:
    """exp of the text's mean surprise, read after each of these and a blank line, or alone after ""; 1 for no text."""
    ids = read.tokens(text)[0]
    heads = [[*read.start, *(read.tokens(one + "\n\n")[0] if one else [])][-(read.window // 2) :] for one in before]
    found = read.of_many([ids] * len(heads), heads) if ids else [np.zeros(1)] * len(heads)
    return np.array([np.exp(min(values.mean(), 700.0)) for values in found])  # 700: what a float can hold


def by_line(read: Reader, text: str) -> NDArray[np.float64]:
    """log2 of each line's perplexity given all before it, of lines that are not blank; one pass gives all."""
    offsets, values = read.surprise(text)
    source = Source((text,))
    found: NDArray[np.float64] = source.spread(source.lines, [offsets], [values]) / np.log(2)
    return found


def peaks(values: NDArray[np.float64], k: float = 0.2) -> NDArray[np.int64]:
    """Where a value is no lower than both neighbours and higher than one of them by mean + k std, of values above 0;
    by 0.5 where fewer than three are. The ends are none.

    >>> peaks(np.array([1.0, 9.0, 1.0, 1.5, 1.0]))
    array([1])
    """
    above = values[values > 0]
    least = above.mean() + k * above.std() if len(above) >= 3 else 0.5
    left, right = values[1:-1] - values[:-2], values[1:-1] - values[2:]
    found: NDArray[np.int64] = 1 + np.flatnonzero((np.maximum(left, right) >= least) & (left >= 0) & (right >= 0))
    return found
