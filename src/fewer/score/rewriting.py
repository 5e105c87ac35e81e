"""Have a causal language model write a text anew, with some words of it kept."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import regex

from fewer.prompts.source import Source
from fewer.score.surprise import reader
from fewer.score.writing import written

_END = regex.compile(r"\p{Sentence_Terminal}[\p{Pe}\p{Pf}\"']*$")

Rewrite = Callable[[str, Sequence[str], int], str]
"""From a text, words that must stay, and how many tokens there may be, to a shorter text."""


def asking(model: Any = "default") -> Rewrite:
    """One that asks this language model, greedily; see `fewer.score.surprise.reader`."""

    def rewrite(text: str, keywords: Sequence[str], tokens: int) -> str:
        words = max(1, round(0.7 * tokens))  # English has about 1.4 tokens a word
        asked = f"\n\nRewrite the text above in at most {words} words. Give the new text only."
        kept = [f"{asked} Use these words: ", ", ".join(keywords), "."] if keywords else [asked]
        return written(reader(model), ["Text:\n", text, *kept], 2 * tokens)  # room to end; who asked cuts it

    return rewrite


def finished(text: str, tokens: int, count: Callable[[str], int]) -> str:
    """A text that has room to spare as it is, else its whole sentences that fit: a last one without its end is none.

    >>> finished("One two. Three fo", 99, len), finished("One two. Three fo", 12, len), finished("One two thr", 9, len)
    ('One two. Three fo', 'One two.', '')
    """
    if count(text := text.strip()) < tokens:
        return text
    source = Source((text,))
    ends = [span.end for span in source.sentences if _END.search(source.of(span))]
    fits = bisect_right(ends, tokens, key=lambda end: count(text[:end]))
    return text[: ends[fits - 1]] if fits else ""
