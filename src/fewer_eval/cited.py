"""Questions, passages, and the sentences of them that answer: what a sentence selector is fitted to and tried on.

Facts about made-up people, machines, firms and towns, among facts that mislead (the same asked of another, another
thing said of the same) and sentences of Python's documentation. Some passages answer nothing. Each kind of fact is said
and asked in several wordings, and the kinds in `HELD_OUT` come in no passage made without them, so that what was
learned can be tried on what was never seen.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from fewer.score.joint import Cited
from fewer_eval.fitting import prose

Draw = random.Random

_FIRST = ["Alma", "Bela", "Carlo", "Dina", "Edgar", "Freya", "Gustav", "Helga", "Igor", "Jana", "Karim", "Luisa"]
_LAST = ["Abbott", "Bakker", "Castro", "Dahl", "Engel", "Foster", "Grant", "Hoang", "Ivanov", "Jensen", "Keller"]
_TOWNS = ["Arles", "Bergen", "Cork", "Delft", "Essen", "Faro", "Ghent", "Haifa", "Izmir", "Jena", "Kyoto", "Lund"]
_COLOURS = ["amber", "black", "bronze", "copper", "crimson", "grey", "indigo", "olive", "silver", "teal", "violet"]
_THINGS = ["compressor", "conveyor", "crane", "drill", "freezer", "generator", "lathe", "mixer", "press", "printer"]
_FIRMS = ["Altura", "Brightwell", "Corvane", "Dorsal", "Elmgate", "Fennimore", "Gantry", "Hollis", "Inkwell", "Juniper"]
_ENDINGS = ["Foods", "Freight", "Labs", "Mills", "Motors", "Optics", "Steel", "Textiles"]
_JOBS = ["an architect", "a baker", "a chemist", "a dentist", "an editor", "a florist", "a geologist", "a nurse"]
_PETS = ["a parrot", "a greyhound", "two goats", "a tortoise", "a rabbit", "three hens", "a pony"]
_DISHES = ["lentil soup", "smoked eel", "plum dumplings", "almond cake", "grilled sardines", "barley stew"]
_RIVERS = ["the Aven", "the Brisk", "the Corrow", "the Dunmere", "the Eskle", "the Farrow"]


@dataclass(frozen=True)
class Fact:
    """One kind of fact: who it is about, what its answer can be, and how it is said and asked. {} is the subject."""

    about: str
    answer: Callable[[Draw], str]
    said: tuple[str, ...]
    asked: tuple[str, ...]


def _pick(words: list[str]) -> Callable[[Draw], str]:
    return lambda rng: rng.choice(words)


def _number(low: int, high: int, form: str = "{}") -> Callable[[Draw], str]:
    return lambda rng: form.format(rng.randint(low, high))


def _code(rng: Draw) -> str:
    return f"{''.join(rng.choice('ABCDEFGHKLMNPRSTUVWX') for _ in range(2))}-{rng.randint(1000, 99999)}"


def _person(rng: Draw) -> str:
    return f"{rng.choice(_FIRST)} {rng.choice(_LAST)}"


FACTS: dict[str, Fact] = {
    "home": Fact("person", _pick(_TOWNS), ("{} lives in {a}.", "{} moved to {a} years ago.", "{} has a house in {a}."),
                 ("Where does {} live?", "In which town is the home of {}?")),
    "job": Fact("person", _pick(_JOBS), ("{} works as {a}.", "{} was trained as {a} and never left the trade."),
                ("What does {} do for a living?", "What is the profession of {}?")),
    "born": Fact("person", _number(1931, 2004), ("{} was born in {a}.", "The birth of {} fell in the year {a}."),
                 ("When was {} born?", "What is the birth year of {}?")),
    "phone": Fact("person", _number(200, 999, "{}-0146"), ("Call {} at {a}.", "{} answers the telephone under {a}."),
                  ("What is the phone number of {}?", "How can I reach {} by telephone?")),
    "pet": Fact("person", _pick(_PETS), ("{} keeps {a}.", "At home {} looks after {a}."),
                ("Which animal does {} have?", "What pet does {} own?")),
    "meal": Fact("person", _pick(_DISHES), ("{} always orders {a}.", "Nothing tastes better to {} than {a}."),
                 ("What does {} like to eat?", "What is the favourite dish of {}?")),
    "serial": Fact("thing", _code, ("{} carries the serial number {a}.", "Stamped on {} is {a}, its serial."),
                   ("What is the serial number of {}?", "Which serial does {} have?")),
    "room": Fact("thing", _number(100, 999), ("{} is kept in room {a}.", "You will find {} in room {a}."),
                 ("Where is {}?", "In which room is {} stored?")),
    "weight": Fact("thing", _number(20, 900, "{} kilograms"), ("{} weighs {a}.", "On the scales {} comes to {a}."),
                   ("How heavy is {}?", "What is the weight of {}?")),
    "price": Fact("thing", _number(300, 9000, "{} euros"), ("{} cost {a}.", "The invoice for {} was {a}."),
                  ("How much did {} cost?", "What was paid for {}?")),
    "maker": Fact("thing", _pick(_FIRMS), ("{} was built by {a}.", "{a} made {}."),
                  ("Who made {}?", "Which manufacturer built {}?")),
    "checked": Fact("thing", _pick(["Monday", "Tuesday", "Thursday", "Friday"]),
                    ("{} is inspected every {a}.", "Each {a} someone looks over {}."),
                    ("On which day is {} inspected?", "When is {} checked?")),
    "founded": Fact("firm", _number(1850, 2015), ("{} was founded in {a}.", "The doors of {} first opened in {a}."),
                    ("When was {} founded?", "In what year did {} start?")),
    "head": Fact("firm", _person, ("{} is led by {a}.", "{a} runs {}."),
                 ("Who is the director of {}?", "Who leads {}?")),
    "staff": Fact("firm", _number(40, 9000, "{} people"), ("{} employs {a}.", "On the payroll of {} there are {a}."),
                  ("How many employees does {} have?", "How large is the staff of {}?")),
    "seat": Fact("firm", _pick(_TOWNS), ("{} has its head office in {a}.", "The headquarters of {} are in {a}."),
                 ("Where is {} based?", "In which town does {} have its headquarters?")),
    "turnover": Fact("firm", _number(2, 900, "{} million"), ("{} took in {a} last year.", "Sales of {} reached {a}."),
                     ("What was the turnover of {}?", "How much did {} sell?")),
    "river": Fact("town", _pick(_RIVERS), ("{} lies on {a}.", "{a} flows through {}."),
                  ("Which river runs through {}?", "On what river does {} lie?")),
    "people": Fact("town", _number(3000, 800000), ("{} has {a} inhabitants.", "The census counted {a} people in {}."),
                   ("How many people live in {}?", "What is the population of {}?")),
    "mayor": Fact("town", _person, ("The mayor of {} is {a}.", "{} elected {a} as its mayor."),
                  ("Who is the mayor of {}?", "Who governs {}?")),
    "dish": Fact("town", _pick(_DISHES), ("{} is known for its {a}.", "Visitors to {} come for the {a}."),
                 ("What food is {} famous for?", "Which dish is typical of {}?")),
}  # fmt: skip
"""Every kind of fact, by name."""

HELD_OUT = ("pet", "weight", "head", "river", "born")
"""Kinds that are left for trying."""

_PRONOUN = {"person": "They", "thing": "It", "firm": "It", "town": "It"}
_OPENING = {
    "person": "{} came up in the report again.",
    "thing": "The audit began with {}.",
    "firm": "{} appears twice in the ledger.",
    "town": "The route passes {}.",
}


def subject(about: str, rng: Draw) -> str:
    """Someone or something of that kind."""
    if about == "person":
        return _person(rng)
    if about == "thing":
        return f"the {rng.choice(_COLOURS)} {rng.choice(_THINGS)}"
    return f"{rng.choice(_FIRMS)} {rng.choice(_ENDINGS)}" if about == "firm" else rng.choice(_TOWNS)


def told(fact: Fact, who: str, answer: str, rng: Draw) -> str:
    """The fact as a sentence."""
    said = rng.choice(fact.said).replace("{a}", answer).replace("{}", who)
    return said[0].upper() + said[1:]


def passage(rng: Draw, kinds: tuple[str, ...], answered: bool = True) -> Cited:
    """A question and a passage of five to twelve sentences that answers it, or does not."""
    kind = rng.choice(kinds)
    fact = FACTS[kind]
    who, question = subject(fact.about, rng), rng.choice(fact.asked)
    blocks: list[list[tuple[str, bool]]] = []
    alike = [FACTS[name] for name in kinds if FACTS[name].about == fact.about and name != kind]
    if answered:
        answer = fact.answer(rng)
        if rng.random() < 0.25:  # said of a pronoun: the sentence before is needed to know of whom
            said = next((one for one in fact.said if one.startswith("{}")), None)
            opening = _OPENING[fact.about].replace("{}", who)
            if said is not None and "{a}" in said and fact.about != "person":
                said = said.replace("{}", _PRONOUN[fact.about]).replace("{a}", answer)
                blocks.append([(opening[0].upper() + opening[1:], True), (said, True)])
        if not blocks:
            blocks.append([(told(fact, who, answer, rng), True)])
    for _ in range(rng.randint(1, 3)):  # the same, of others
        other = subject(fact.about, rng)
        if other != who:
            blocks.append([(told(fact, other, fact.answer(rng), rng), False)])
    for _ in range(rng.randint(1, 3)):  # something else, of the same
        if alike:
            other_fact = rng.choice(alike)
            blocks.append([(told(other_fact, who, other_fact.answer(rng), rng), False)])
    for _ in range(rng.randint(0, 2)):
        any_fact = FACTS[rng.choice(kinds)]
        if any_fact is not fact:
            blocks.append([(told(any_fact, subject(any_fact.about, rng), any_fact.answer(rng), rng), False)])
    blocks += [[(sentence, False)] for sentence in prose(rng, rng.randint(1, 4))]
    rng.shuffle(blocks)
    flat = [pair for block in blocks for pair in block]
    return Cited(question.replace("{}", who), tuple(s for s, _ in flat), tuple(u for _, u in flat))


def passages(n: int, seed: int = 0, held_out: bool = False) -> list[Cited]:
    """So many passages, a fifth of which answer nothing; of the kinds held out alone, or of all the others."""
    kinds = HELD_OUT if held_out else tuple(name for name in FACTS if name not in HELD_OUT)
    out = []
    for index in range(n):
        rng = random.Random(f"cited/{held_out}/{seed}/{index}")
        out.append(passage(rng, kinds, answered=rng.random() >= 0.2))
    return out
