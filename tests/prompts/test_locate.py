"""Where the words of an answer came from, by hand."""

import numpy as np
import pytest

import fewer
from fewer.prompts.compression import Compression
from fewer.prompts.source import Ranking, Source
from fewer.types import Budget


class Keeps:
    """These words, by their places."""

    def __init__(self, *places: int, order: tuple[int, ...] | None = None) -> None:
        self.places, self.order = places, order

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        chosen = np.isin(np.arange(len(source.words)), self.places)
        return Ranking(source.words, np.zeros(len(source.words)), chosen=chosen, order=self.order)


def shortened(text: str | list[str], *places: int, order: tuple[int, ...] | None = None) -> Compression:
    return fewer.compress_prompt(text, Keeps(*places, order=order), tokenizer="characters")


def test_a_run_of_words_with_a_gap_in_it() -> None:
    text = "The bridge was, after a long delay, opened in 1921 by the mayor."
    done = shortened(text, 0, 1, 2, 9, 10, 11)
    assert done.text == "The bridge was opened in 1921"
    (found,) = done.locate("It was opened in 1921, I think.")
    assert "It was opened in 1921, I think."[found.start : found.end] == "was opened in 1921"
    assert found.source == (0, 11, 50) and text[11:50] == found.text == "was, after a long delay, opened in 1921"


def test_longest_runs_left_to_right_and_case() -> None:
    done = shortened("red fox and red fox cub and owl", *range(8))
    found = done.locate("RED FOX CUB or Owl and red")
    assert [(f.text, f.source.start) for f in found] == [("red fox cub", 12), ("owl", 28), ("and red", 8)]
    assert done.locate("badger") == () == done.locate("") == done.locate("?!")


def test_the_first_of_two_places() -> None:
    assert [f.source.start for f in shortened("a b a b", 0, 1, 2, 3).locate("b")] == [2]


def test_documents_and_their_order() -> None:
    done = shortened(["alpha beta", "gamma delta"], 0, 1, 2, 3, order=(1, 0))
    assert done.text == "gamma delta\n\nalpha beta"
    assert [tuple(f.source) for f in done.locate("delta. then alpha beta")] == [(1, 6, 11), (0, 0, 10)]
    apart = [tuple(f.source) for f in done.locate("delta alpha")]
    assert apart == [(1, 6, 11), (0, 0, 5)], "no place of one document reaches into another"


def test_words_that_cross_documents_are_found_where_they_stand_together() -> None:
    done = fewer.compress_prompt(["the red fox ran", "home to the den", "red fox ran home again"], "full", keep=1)
    assert [(f.text, f.source.document) for f in done.locate("fox ran home")] == [("fox ran home", 2)]


def test_accents_and_other_scripts() -> None:
    done = shortened("l’e\u0301te\u0301 STRASSE שלום עולם", *range(9))
    assert [f.text for f in done.locate("straße")] == ["STRASSE"]
    assert [f.text for f in done.locate("אז שלום")] == ["שלום"]


def test_everything_kept_traces_to_itself() -> None:
    text = "  Some words\r\nhere. "
    done = fewer.compress_prompt(text, "full")
    assert [(f.text, f.source.start) for f in done.locate("words here")] == [("words\r\nhere", 7)]


@pytest.mark.timeout(30)
def test_many_places_take_no_time_that_grows_with_their_square() -> None:
    done = fewer.compress_prompt("the " * 40_000 + "end", "full", tokenizer="characters")
    (found,) = done.locate("the " * 2_000)
    assert found.source.start == 0 and found.source.end == 4 * 2_000 - 1
