"""Text to fit methods on: Python's own documentation and code, with made-up facts and records among it.

No text, sentence or name in it is one that a task of this package plants or asks for. It comes with Python, so another
version of Python gives another text.
"""

import importlib
import inspect
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

from transformers import PreTrainedTokenizerBase

from fewer_eval.tasks import base, haystack

_NAMES = ["Ada", "Bruno", "Chidi", "Dana", "Emil", "Farah", "Goran", "Hana", "Ivan", "Joy", "Kofi", "Lena", "Mateo"]
_FAMILIES = ["Adeyemi", "Brandt", "Costa", "Dubois", "Eriksen", "Fischer", "Garcia", "Haddad", "Ito", "Jansen"]
_PLACES = ["Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Leeds", "Turin", "Perth", "Boston", "Cairo", "Gdansk"]
_OBJECTS = ["pump", "sensor", "lamp", "ledger", "parcel", "engine", "cabinet", "server", "ticket", "valve", "crate"]
_COLOURS = ["red", "blue", "green", "yellow", "grey", "orange", "purple", "white", "black", "brown"]
_MONTHS = ["January", "March", "May", "July", "August", "October", "December"]
_MODULES = ["textwrap", "json.decoder", "bisect", "heapq", "shlex", "string", "calendar", "fractions", "csv", "queue"]

Draw = random.Random

_FACTS: list[Callable[[Draw], str]] = [
    lambda r: f"{_person(r)} lives at {r.randint(2, 300)} {r.choice(_FAMILIES)} Street in {r.choice(_PLACES)}.",
    lambda r: f"The {_thing(r)} has the serial {_code(r)}.",
    lambda r: f"Invoice {_digits(r, 6)} came to {r.randint(10, 9999)}.{_digits(r, 2)} euros.",
    lambda r: f"To reach {_person(r)}, dial {_digits(r, 3)}-{_digits(r, 4)}.",
    lambda r: f"The door of the {r.choice(_PLACES)} office opens with {_digits(r, r.randint(4, 8))}.",
    lambda r: f"{_person(r)} was born on {r.randint(1, 28)} {r.choice(_MONTHS)} {r.randint(1900, 2010)}.",
    lambda r: f"Remember that the {_thing(r)} is kept in room {_digits(r, 4)}.",
    lambda r: f"{r.choice(_PLACES)} had {_digits(r, 7)} visitors that year.",
    lambda r: f"The {_thing(r)} came from {r.choice(_PLACES)}, said {_person(r)}.",
    lambda r: f"Account of {_person(r)}: {_digits(r, r.randint(7, 10))}.",
]


def mixture(characters: int, seed: int = 0) -> str:
    """At least so many characters of passages, most of them documentation with facts in it, apart by empty lines."""
    rng = random.Random(seed)
    kinds = [_told, _told, _told, _told, _code_passage, _records]
    passages, length = [], 0
    while length < characters:
        passages.append(rng.choice(kinds)(rng))
        length += len(passages[-1]) + 2
    return "\n\n".join(passages)


@dataclass(frozen=True)
class Asked:
    """A text with a fact planted in it, a question about that, and its answer, which ends the fact."""

    text: str
    question: str
    fact: str
    answer: str


def asked(
    tokenizer: PreTrainedTokenizerBase, tokens: int, n: int, seed: int = 0, own: str | None = None
) -> list[Asked]:
    """Questions about facts at n even depths, each in at most `tokens` tokens of the mixture, or of an own text."""
    made = []
    for index in range(n):
        rng, depth = random.Random(f"asked/{tokens}/{seed}/{index}"), (index + 0.5) / n
        thing, number = _thing(rng), str(rng.randint(1_000_000, 9_999_999))
        fact = f"The number painted on the {thing} is {number}"
        words = re.findall(r"\S+\s*", mixture(8 * tokens, rng.randrange(1 << 30)) if own is None else own)
        words = words[rng.randrange(max(1, len(words) - tokens)) :]
        draw = base.Draw(tokenizer, tokens, seed, index, depth, rng)

        def text(count: int, words: list[str] = words, fact: str = fact, depth: float = depth) -> str:
            return haystack.plant(words[:count], [f"{fact}."], [depth])

        question = f"What is the number painted on the {thing}? Answer with the number only."
        made.append(Asked(draw.longest(text, len(words)), question, fact, number))
    return made


def _told(rng: Draw) -> str:
    """Sentences of documentation, after every few of them a fact."""
    said = list(_sentences(topics[rng.choice(sorted(topics))]))
    start = rng.randrange(max(1, len(said) - 12))
    out = []
    for sentence in said[start : start + 12]:
        out.append(sentence)
        if rng.random() < 0.25:
            out.append(rng.choice(_FACTS)(rng))
    return " ".join(out)


def prose(rng: Draw, n: int) -> list[str]:
    """Up to n sentences of documentation, one after the other."""
    said = list(_sentences(topics[rng.choice(sorted(topics))]))
    start = rng.randrange(max(1, len(said) - n))
    return said[start : start + n]


def _sentences(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph[:1].isupper() and "***" not in paragraph:  # no headings, lists and examples
            yield from re.split(r"(?<=[.:]) (?=[A-Z])", " ".join(paragraph.split()))


def _code_passage(rng: Draw) -> str:
    lines = inspect.getsource(importlib.import_module(rng.choice(_MODULES))).splitlines()
    start = rng.randrange(max(1, len(lines) - 40))
    return "\n".join(lines[start : start + 40])


def _records(rng: Draw) -> str:
    rows = [
        {"name": _person(rng), "place": rng.choice(_PLACES), "item": _thing(rng), "count": rng.randint(1, 10**6)}
        for _ in range(rng.randint(4, 10))
    ]
    form = rng.choice(["json", "table", "lines"])
    if form == "json":
        return json.dumps(rows, indent=rng.choice([None, 2]))
    if form == "table":
        return "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)])
    return "\n".join(f"{_code(rng)}: {row['item']} for {row['name']}, {row['count']}" for row in rows)


def _person(rng: Draw) -> str:
    return f"{rng.choice(_NAMES)} {rng.choice(_FAMILIES)}"


def _thing(rng: Draw) -> str:
    return f"{rng.choice(_COLOURS)} {rng.choice(_OBJECTS)}"


def _digits(rng: Draw, count: int) -> str:
    return "".join(str(rng.randint(0, 9)) for _ in range(count))


def _code(rng: Draw) -> str:
    letters = "".join(rng.choice("ABCDEFGHKLMNPQRSTUVWXYZ") for _ in range(rng.randint(2, 3)))
    return f"{letters}-{_digits(rng, rng.randint(3, 6))}"
