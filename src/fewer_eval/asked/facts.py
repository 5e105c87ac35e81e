"""Facts in templates: one document of many that answers, two that must be put together, minutes of a meeting."""

import random

from fewer_eval.asked.base import Asked, Setting
from fewer_eval.text import prose

_FIRST = ("Mara", "Orin", "Tessa", "Bram", "Ilse", "Corin", "Pavla", "Dorian", "Sunniva", "Quill", "Renske", "Aldous")
_LAST = (
    "Vance",
    "Tolle",
    "Brandt",
    "Okoro",
    "Lindqvist",
    "Maddox",
    "Petrov",
    "Achterberg",
    "Silvan",
    "Croft",
    "Yarrow",
)
_PLACES = (
    "Velmar",
    "Keswin",
    "Ostrava",
    "Drummore",
    "Halden",
    "Port Sable",
    "Quennel",
    "Brackwater",
    "Tarn",
    "Lisbeth",
)
_KINDS = (
    "harbour",
    "library",
    "mill",
    "observatory",
    "bridge",
    "brewery",
    "archive",
    "foundry",
    "chapel",
    "market hall",
)
_OTHER = (
    "The {0} of {1} has {2} windows.",
    "{2} people work in the {0} of {1}.",
    "The {0} of {1} was painted by {2} children.",
    "A tour of the {0} of {1} takes {2} minutes.",
    "The {0} of {1} lies {2} feet above the river.",
    "The roof of the {0} of {1} cost {2} crowns.",
)
_TOPICS = ("road repairs", "the school roof", "flood defences", "the night bus", "street lighting", "the public pool")


def _sentences(rng: random.Random, count: int) -> str:
    paragraphs = [p for p in prose().split("\n\n") if 200 < len(p) < 900]
    sentences = [s.strip() + "." for s in rng.choice(paragraphs).split(". ") if 40 < len(s) < 220]
    return " ".join(rng.sample(sentences, min(count, len(sentences))))


def _document(rng: random.Random, fact: str) -> str:
    """A fact among a few sentences of old books."""
    return f"{_sentences(rng, 1)} {fact} {_sentences(rng, 2)}"


def multi_document(rng: random.Random, place: float) -> Asked:
    """The answer in one document; the others say other things, one of them the same of another."""
    towns, kinds = rng.sample(_PLACES, 6), rng.sample(_KINDS, 6)
    gold, other = round(place * 5), (round(place * 5) + 1 + rng.randrange(5)) % 6
    years = rng.sample(range(1702, 1988), 2)
    facts = [
        said.format(kind, town, rng.randint(20, 900))
        for said, kind, town in zip(rng.sample(_OTHER, 6), kinds, towns, strict=True)
    ]
    facts[gold] = f"The {kinds[gold]} of {towns[gold]} was opened in {years[0]}."
    facts[other] = f"The {kinds[other]} of {towns[other]} was closed in {years[1]}."
    question = f"In which year was the {kinds[gold]} of {towns[gold]} opened?"
    documents = tuple(_document(rng, fact) for fact in facts)
    return Asked(documents, question, str(years[0]), (towns[gold], str(years[0])))


def two_hop(rng: random.Random, place: float) -> Asked:
    count = 2
    people = [f"{a} {b}" for a, b in zip(rng.sample(_FIRST, count), rng.sample(_LAST, count), strict=True)]
    firms = [f"{a} {b}" for a, b in zip(rng.sample(_LAST, count), rng.sample(_KINDS, count), strict=True)]
    towns = rng.sample(_PLACES, count)
    facts = [f"{person} works at the {firm}." for person, firm in zip(people, firms, strict=True)]
    facts += [f"The {firm} stands in the town of {town}." for firm, town in zip(firms, towns, strict=True)]
    gold = round(place * (count - 1))
    facts += [said.format(*rng.sample(_KINDS, 1), "Halm", rng.randint(20, 900)) for said in rng.sample(_OTHER, 2)]
    rng.shuffle(facts)
    documents = tuple(_document(rng, fact) for fact in facts)
    needed = (people[gold], firms[gold], towns[gold])
    return Asked(documents, f"In which town does {people[gold]} work?", towns[gold], needed)


def meeting(rng: random.Random, place: float) -> Asked:
    topics = rng.sample(_TOPICS, 4)
    amounts = rng.sample(range(1_150, 98_700, 50), 4)
    speakers = [f"{first} {last}" for first, last in zip(rng.sample(_FIRST, 4), rng.sample(_LAST, 4), strict=True)]
    lines = []
    for topic, amount, speaker in zip(topics, amounts, speakers, strict=True):
        second = rng.choice([name for name in speakers if name != speaker])
        lines += [
            f"{speaker}: So, um, I think we should, you know, come to {topic} now, if nobody minds.",
            f"{second}: {_sentences(rng, 1)}",
            f"{speaker}: Well, I move that we grant ${amount:,} for {topic}. It must not come out of the reserve.",
            f"{second}: I second that. All in favour? {rng.choice(('Carried.', 'It is carried.', 'So carried.'))}",
        ]
    gold = round(place * 3)
    answer = f"{amounts[gold]:,}"
    question = f"How many dollars were granted for {topics[gold]}?"
    return Asked(("\n".join(lines),), question, answer, (answer, topics[gold]))


MULTI_DOCUMENT = Setting("multi-document", "six documents, one of which says in which year", multi_document)
TWO_HOP = Setting("two-hop", "who works where, and where that is, in two documents of six", two_hop)
MEETINGS = Setting("meeting", "minutes with four grants of money, and talk", meeting)
