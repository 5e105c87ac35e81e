"""Truncation: keep the beginning, or the end. What most programs do when a prompt is too long.

    s_i = -i, or i from the end

Differs from the paper: there is none.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fewer.prompts.source import Ranking, Source
from fewer.types import Budget, Card, UnknownName


@dataclass(frozen=True)
class Truncation:
    """The first words, or the last.

    Args:
        keep: "start", "end", or "both" for the first and the last alike, with the middle gone.
    """

    keep: str = "start"

    card: ClassVar[Card] = Card(source="baseline", faithfulness="own", mechanism="extract")
    needs: ClassVar[frozenset[object]] = frozenset()

    def __post_init__(self) -> None:
        if self.keep not in ("start", "end", "both"):
            raise UnknownName(f"Truncation(keep={self.keep!r}): known are 'start', 'end' and 'both'")

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        place = np.arange(len(source.words), dtype=np.float64)
        after = place[::-1]
        value = {"start": -place, "end": -after, "both": -np.minimum(place, after)}[self.keep]
        return Ranking(source.words, value)
