"""Units that need others: what a settled text may hold, against a search of all subsets; protection; bad pairs."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest

import fewer
from fewer.prompts.counting import Counter
from fewer.prompts.needs import closed, pulling, recut, steps
from fewer.prompts.settle import settle, text_of
from fewer.prompts.source import Protected, Ranking, Source
from fewer.types import BudgetError, FewerError

WORDS = "def f if x one two end last"
NEEDS = np.array([[1, 0], [2, 1], [3, 2], [4, 3], [5, 3], [6, 1], [1, 6]])  # f and end need each other


def naive(units: set[int]) -> set[int]:
    while True:
        more = units | {b for a, b in NEEDS.tolist() if a in units}
        if more == units:
            return units
        units = more


def settled(value: Any, limit: int | None, protected: tuple[Protected, ...] = (), **more: Any) -> tuple[str, set[int]]:
    source = Source((WORDS,), protected=protected, counter=Counter("words", lambda text: len(text.split())))
    ranking = Ranking(source.words, np.asarray(value, dtype=np.float64), needs=NEEDS, **more)
    done = settle(source, ranking, limit, "\n\n")
    return text_of(source.documents, done.runs, "\n\n"), set(np.flatnonzero(done.mask).tolist())


def test_a_unit_comes_with_all_that_it_needs() -> None:
    assert settled([0, 0, 0, 0, 9, 0, 0, 1], 6)[0] == "def f if x one end"
    # all that `one` needs does not fit; `last` needs none, and then come those that are worth nothing
    assert settled([0, 0, 0, 0, 9, 0, 0, 1], 5)[0] == "def f if end last"
    assert settled([0, 0, 9, 0, 0, 0, 0, 0], 4)[0] == "def f if end"


def test_no_text_ever_lacks_what_it_needs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        limit = int(rng.integers(1, 9))
        text, kept = settled(rng.random(8), limit, chosen=rng.random(8) < 0.3)
        assert kept == naive(set(kept)) and len(text.split()) <= limit
    broken = [set(some) for n in range(9) for some in combinations(range(8), n) if set(some) != naive(set(some))]
    assert len(broken) > 200, "most subsets are no text, so the loop above can fail"


def test_what_a_method_chose_is_completed_without_a_budget() -> None:
    chosen = np.zeros(8, dtype=bool)
    chosen[5] = True
    assert settled(np.zeros(8), None, chosen=chosen)[0] == "def f if x two end"


def test_what_is_protected_keeps_what_it_needs() -> None:
    at = WORDS.index("two")
    inside = (Protected(0, at + 1, at + 2, "w"),)  # a letter of `two`: the others of it stay too
    assert settled([0, 0, 0, 0, 9, 0, 0, 9], 6, inside)[0] == "def f if x two end"
    with pytest.raises(BudgetError, match="takes 6 tokens"):
        settled(np.zeros(8), 5, inside)
    over = (Protected(0, at, at + 7, "w"),)  # "two end" in one piece
    assert settled(np.zeros(8), 6, over)[0] == "def f if x two end"


def test_steps_and_closure_agree_with_a_naive_search() -> None:
    rng = np.random.default_rng(1)
    pull = pulling(NEEDS, 8)
    for _ in range(50):
        mask = rng.random(8) < 0.3
        assert set(np.flatnonzero(closed(mask, pull)).tolist()) == naive(set(np.flatnonzero(mask).tolist()))
        order, cuts = steps(rng.permutation(8), NEEDS)
        assert sorted(order.tolist()) == list(range(8)) and cuts[0] == 0 and cuts[-1] == 8
        for cut in cuts.tolist():
            assert set(order[:cut].tolist()) == naive(set(order[:cut].tolist()))
    plain, cuts = steps(np.array([2, 0, 1]), None)
    assert plain.tolist() == [2, 0, 1] and cuts.tolist() == [0, 1, 2, 3]


def test_pieces_of_a_unit_need_each_other_if_it_needs_any() -> None:
    assert recut(np.array([[1, 1]]), np.array([0, 2]), np.array([2, 4])).tolist() == [[2, 2], [2, 3], [3, 2]]
    assert recut(np.array([[1, 0]]), np.array([0, 1]), np.array([1, 4])).tolist() == [[1, 0], [1, 2], [2, 3], [3, 1]]


class Asks:
    """Ranks words, with these needs."""

    def __init__(self, needs: Any) -> None:
        self.pairs = needs

    def rank(self, source: Source, budget: Any) -> Ranking:
        return Ranking(source.words, np.zeros(len(source.words)), needs=self.pairs)


@pytest.mark.parametrize("needs", [[[0, 9]], [[-1, 0]], [0, 1], [[0, 1, 2]]])
def test_pairs_that_name_no_units_are_refused(needs: Any) -> None:
    with pytest.raises(FewerError, match="needs that are no pairs of its 3 units"):
        fewer.compress_prompt("one two three", Asks(np.array(needs)), tokens=4, tokenizer="characters")


def test_lines_keep_their_indentation_and_their_ends() -> None:
    text = "if a:\n    b\n\n        c\n    d\ne\n"
    source = Source((text,))
    kept = [True, True, False, True, False]
    needs = np.array([[1, 0], [2, 0], [3, 0]])
    value = np.array(kept, dtype=np.float64)
    done = settle(source, Ranking(source.lines, value, chosen=np.array(kept), needs=needs), None, "")
    assert text_of(source.documents, done.runs, "") == "if a:\n    b\n    d\n"
