"""Truncation: the beginning, the end, or both."""

import pytest

import fewer
from fewer.methods.prompt.truncation import Truncation
from fewer.types import UnknownName

TEXT = "one two three four five six"


@pytest.mark.parametrize(
    ("keep", "stays"),
    [("start", "one two three"), ("end", "four five six"), ("both", "one two six")],
)
def test_by_hand(keep: str, stays: str) -> None:
    """14 characters hold three of these words. From both ends the outer words come first: one and six, then two before
    five, since of two that are as far from an end the earlier one stays."""
    done = fewer.compress_prompt(TEXT, Truncation(keep), tokens=14, tokenizer="characters")
    assert done.text == stays


def test_documents_are_one_text() -> None:
    """The last document takes 10 characters; "two" and the blank line before it would take 5 more."""
    done = fewer.compress_prompt(["one two", "three four"], Truncation("end"), tokens=14, tokenizer="characters")
    assert done.documents == ("", "three four")


def test_an_unknown_end_is_refused() -> None:
    with pytest.raises(UnknownName, match=r"keep='middle'.*'start', 'end' and 'both'"):
        Truncation("middle")
