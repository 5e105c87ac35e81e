"""What a question about documents is."""

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """Documents, a question about them, the answer, and the strings without which nobody could answer."""

    documents: tuple[str, ...]
    question: str
    answer: str
    needed: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """A family of questions. `draw(rng, place)` makes one whose answer stands at `place` in [0, 1] of the documents;
    the default language model can answer those that are `answerable` when it sees everything."""

    name: str
    description: str
    draw: Callable[[random.Random, float], Asked]
    answerable: bool = True

    def make(self, n: int, seed: int = 0) -> list[Asked]:
        """`n` examples; the answer's place sweeps from the first document to the last. The same every time.

        >>> from fewer_eval.asked import SETTINGS
        >>> SETTINGS["multi-document"].make(2) == SETTINGS["multi-document"].make(2)
        True
        """
        places = [i / (n - 1) if n > 1 else 0.5 for i in range(n)]
        return [self.draw(random.Random(f"{self.name}/{seed}/{i}"), place) for i, place in enumerate(places)]
