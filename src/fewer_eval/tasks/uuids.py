"""Needle Threading (Roberts and others, 2024): JSON objects of UUID pairs, the worst case for a compressor.

Every character is random, so nothing that was dropped can be guessed. The pairs are 128-bit draws, in the published
form: with seed 0 the first sample starts with the published pairs. A pair has many tokens, so a passage of real text
ahead of the object takes up what is left of the wanted length.
"""

import itertools
import random
import uuid

from fewer.types import FewerError
from fewer_eval.tasks.base import Draw, Example, Task, maker
from fewer_eval.tasks.haystack import window

_STEPS = 3
# Nothing writes a pair (two UUIDs, six quotes and signs) in fewer tokens than this: at least one for four digits.
_FEWEST_TOKENS = 16


def _single(draw: Draw) -> Example:
    pairs = _fitting_pairs(draw)
    at = round(draw.depth * (len(pairs) - 1))
    key, value = pairs[at]
    question = f'What is the value of the key "{key}" in the JSON object above? Answer with the value only.'
    return Example(_context(draw, pairs), question, (value,), {"depth": draw.depth, "pairs": len(pairs)})


def _chain(draw: Draw) -> Example:
    pairs = _fitting_pairs(draw)
    if len(pairs) <= _STEPS:
        raise FewerError(f"uuid-chain does not fit into {draw.tokens} tokens: {_STEPS + 1} pairs are needed")
    # The first pair stays as published.
    links = draw.rng.sample(range(1, len(pairs)), _STEPS)
    for here, there in itertools.pairwise(links):
        pairs[here] = (pairs[here][0], pairs[there][0])
    question = (
        f'Start with the key "{pairs[links[0]][0]}" of the JSON object above. Its value is another key of the object: '
        f"look that one up, and go on for {_STEPS} steps in all. Answer with the last value only."
    )
    return Example(_context(draw, pairs), question, (pairs[links[-1]][1],), {"steps": _STEPS, "pairs": len(pairs)})


def _fitting_pairs(draw: Draw) -> list[tuple[str, str]]:
    stream = random.Random(draw.seed) if draw.index == 0 else random.Random(f"uuid/{draw.seed}/{draw.index}")
    drawn = [(_uuid(stream), _uuid(stream)) for _ in range(draw.tokens // _FEWEST_TOKENS)]
    # Linking pairs to a chain puts keys where values were, which can change the number of tokens a little.
    spare = 12
    fits = draw.longest(lambda pairs: _object(drawn[:pairs]) + " -" * spare, len(drawn)).count("\n")
    return drawn[: fits + 1]


def _uuid(stream: random.Random) -> str:
    return str(uuid.UUID(int=stream.getrandbits(128)))


def _object(pairs: list[tuple[str, str]]) -> str:
    return "{" + ",\n".join(f'"{key}": "{value}"' for key, value in pairs) + "}"


def _context(draw: Draw, pairs: list[tuple[str, str]]) -> str:
    text = window(draw.rng, draw.tokens)
    return draw.longest(lambda words: "".join(text[:words]).rstrip() + "\n\n" + _object(pairs), len(text)).strip()


SINGLE = Task(
    name="uuid-single",
    description="a JSON object of UUID pairs, the value of one key asked",
    max_new_tokens=96,
    make=maker("uuid-single", _single),
)
CHAIN = Task(
    name="uuid-chain",
    description="a JSON object of UUID pairs, a chain of three look-ups asked",
    max_new_tokens=96,
    make=maker("uuid-chain", _chain),
)
