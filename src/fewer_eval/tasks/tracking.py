"""RULER's variable tracking: one chain of assignments in dull noise, every variable of the chain asked."""

import itertools
import random
import string

from fewer_eval.tasks.base import Draw, Example, Task, maker
from fewer_eval.tasks.haystack import plant

_NOISE = ["The grass is green. ", "The sky is blue. ", "The sun is yellow. ", "Here we go. ", "There and back again. "]
_VARIABLES = 5


def _tracking(draw: Draw) -> Example:
    value = str(draw.rng.randrange(10_000, 100_000))
    names = _names(draw.rng)
    chain = [f"VAR {names[0]} = {value}."]
    chain += [f"VAR {name} = VAR {before}." for before, name in itertools.pairwise(names)]
    depths = sorted(draw.rng.random() for _ in chain)
    intro = "Memorize and track the chain of variable assignments hidden in the following text.\n\n"

    def build(sentences: int) -> str:
        return intro + plant([_NOISE[i % len(_NOISE)] for i in range(sentences)], chain, depths)

    question = (
        f"Find all variables that are assigned the value {value} in the text above, directly or through another "
        f"variable. There are {_VARIABLES} of them. Answer with their names only."
    )
    return Example(draw.longest(build, draw.tokens), question, tuple(names), {"value": value})


def _names(rng: random.Random) -> list[str]:
    """Different names of five capital letters, as in RULER: of one length, so that none is part of another."""
    names: dict[str, None] = {}
    while len(names) < _VARIABLES:
        names["".join(rng.choices(string.ascii_uppercase, k=5))] = None
    return list(names)


TRACKING = Task(
    name="variable-tracking",
    description="a chain of five variable assignments in noise sentences, all its variables asked",
    max_new_tokens=64,
    make=maker("variable-tracking", _tracking),
)
