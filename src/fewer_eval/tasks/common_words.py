"""RULER's common words extraction: the ten words that a shuffled, numbered list repeats most."""

import functools
import random
import re

from fewer_eval.tasks.base import Draw, Example, Task, maker
from fewer_eval.text import prose

_COMMON = 10


def _common_words(draw: Draw) -> Example:
    # RULER repeats common and uncommon words 30 and 3 times, below 4,096 tokens 6 times and once.
    often, seldom = (30, 3) if draw.tokens >= 4096 else (6, 1)
    words = list(_vocabulary())
    draw.rng.shuffle(words)
    common, rest = words[:_COMMON], words[_COMMON:]
    # A common word inside an uncommon one would be graded as found where the model named the other.
    rest = [word for word in rest if not any(part in word for part in common)]
    intro = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    order = draw.rng.random()

    def build(uncommon: int) -> str:
        entries = common * often + rest[:uncommon] * seldom
        random.Random(order).shuffle(entries)
        return intro + " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))

    question = f"What are the {_COMMON} most common words in the above list? Answer with the words only."
    return Example(draw.longest(build, len(rest)), question, tuple(common), {"often": often, "seldom": seldom})


@functools.cache
def _vocabulary() -> tuple[str, ...]:
    """The plain words of five to nine letters in the real text, none of them part of another."""
    words = sorted(set(re.findall(r"(?<![\w'-])[a-z]{5,9}(?![\w'-])", prose())))
    longer = " ".join(word for word in words if len(word) > 5)
    return tuple(word for word in words if longer.count(word) == (len(word) > 5))


COMMON_WORDS = Task(
    name="common-words",
    description="the ten most repeated words of a numbered list",
    max_new_tokens=120,
    make=maker("common-words", _common_words),
)
