"""Texts that break what was tried on English only."""

import regex
from hypothesis import strategies as st

HARD = (
    "\r\n", "\n", "\r", "\n\n", "\r\n\r\n", " ", "  ", "\t", "\u00a0", "\u3000", "\x1c", "\x85", "\u200b", "\ufeff",
    "e\u0301", "\u0301", " \u0301", "a\u0308\u0323", "👩\u200d👩\u200d👧", "👍🏽", "🇩🇪🇫🇷🇩", "❤\ufe0f", "\u200d",
    "שלום", "مرحبا ", "\u202eabc\u202c", "\u0600 1", "東京", "漢字。", "かな", "カナ", "ท่าเรือ", "กำ", "ខ្មែរ", "क्षत्रिय",
    "한국어", "ᄒ\u1161\u11ab", "word", "Word.", "A\u00a0.", "don’t", "a_b", "x=1;", "1,000.5", "“q”", "\x00",
    "I. ", "A! ", "...",
)  # fmt: skip

anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
hard = st.lists(st.sampled_from(HARD), max_size=25).map("".join)
plain = st.lists(st.sampled_from(["one", "two.", "Three", "4", "\n", "\r\n", "five-six", "(x)"]), max_size=30).map(
    " ".join
)
texts = st.one_of(anything, hard, plain)
documents = st.lists(texts, min_size=1, max_size=4).filter(lambda made: any(text.strip() for text in made))


def edges(text: str) -> set[int]:
    """Where graphemes begin and end."""
    return {0, *(match.end() for match in regex.finditer(r"\X", text))}


def blank(text: str) -> set[int]:
    """Places of white space: of graphemes that are nothing else."""
    return {i for match in regex.finditer(r"\X", text) if match.group().isspace() for i in range(*match.span())}
