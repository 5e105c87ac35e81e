"""RULER's needles in a haystack: magic numbers planted in real text.

Sample i of n has the number that is asked for at depth i / (n - 1), at the sentence end nearest to it.
"""

import random

from fewer_eval.tasks.base import Draw, Example, Task, maker
from fewer_eval.tasks.haystack import plant, window

_QUALITIES = ["amber", "bitter", "brisk", "copper", "distant", "eager", "frozen", "gentle", "hollow", "humble"]
_THINGS = ["anchor", "basket", "bridge", "candle", "compass", "falcon", "garden", "harbor", "lantern", "meadow"]


def _needle(key: str, number: str) -> str:
    return f"The special magic number for {key} is: {number}."


def _single(draw: Draw) -> Example:
    return _planted(draw, keys=1, values=1)


def _multikey(draw: Draw) -> Example:
    return _planted(draw, keys=4, values=1)


def _multivalue(draw: Draw) -> Example:
    return _planted(draw, keys=1, values=4)


def _planted(draw: Draw, keys: int, values: int) -> Example:
    names = _names(draw.rng, keys)
    numbers = [str(number) for number in draw.rng.sample(range(1_000_000, 10_000_000), keys * values)]
    needles = [_needle(names[i // values], number) for i, number in enumerate(numbers)]
    depths = [draw.depth, *(draw.rng.random() for _ in needles[1:])]
    text = window(draw.rng, draw.tokens)
    several = keys * values > 1
    intro = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
        "I will quiz you about the numbers afterwards.\n\n"
        if several
        else "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n\n"
    )
    context = draw.longest(lambda words: intro + plant(text[:words], needles, depths), len(text))
    question = (
        f"What are all the special magic numbers for {names[0]} mentioned in the text? Answer with the numbers only."
        if values > 1
        else f"What is the special magic number for {names[0]} mentioned in the text? Answer with the number only."
    )
    return Example(context, question, tuple(numbers[:values]), {"depth": draw.depth, "key": names[0]})


def _names(rng: random.Random, count: int) -> list[str]:
    """Different names that share no word, so that no key is nearly another."""
    pairs = zip(rng.sample(_QUALITIES, count), rng.sample(_THINGS, count), strict=True)
    return [f"{quality}-{thing}" for quality, thing in pairs]


SINGLE = Task(
    name="needle-single",
    description="one magic number planted in real text, asked by its key",
    max_new_tokens=32,
    make=maker("needle-single", _single),
)
MULTIKEY = Task(
    name="needle-multikey",
    description="four magic numbers with different keys planted in real text, one asked",
    max_new_tokens=32,
    make=maker("needle-multikey", _multikey),
)
MULTIVALUE = Task(
    name="needle-multivalue",
    description="one key with four magic numbers planted in real text, all asked",
    max_new_tokens=96,
    make=maker("needle-multivalue", _multivalue),
)
