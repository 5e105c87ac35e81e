"""Who stays within the ceiling: the best units, what is protected, and text that a reader can follow."""

from itertools import pairwise

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

import fewer
from fewer.prompts.counting import Counter, counter
from fewer.prompts.protect import protected
from fewer.prompts.settle import render, settle, text_of
from fewer.prompts.source import Ranking, Source, Units
from fewer.types import BudgetError
from tests.laws.prompt_battery import pieces
from tests.prompts.texts import blank, documents, edges

GLUE = "\n\n"
COUNTERS = {"characters": counter("characters"), "pieces": counter(pieces), "words": counter(lambda t: len(t.split()))}


def slow_between(text: str, start: int, end: int) -> str:
    """What parts two units, in plain words: of what was dropped between them the white space with the most line breaks,
    the last of these; a space of it where there are none; without any, the first mark if two words would be one."""
    white = blank(text)
    stretches = [
        m.group() for m in regex.finditer("_+", "".join("_" if i in white else "x" for i in range(start, end)))
    ]
    if stretches:
        found, at, best = [], start, ""
        while at < end:
            stop = at
            while stop < end and stop in white:
                stop += 1
            if stop > at:
                found.append(text[at:stop])
            at = max(stop, at + 1)
        for one in found:
            best = one if one.count("\n") >= best.count("\n") else best
        return best if "\n" in best else best[0]
    words = r"[\w\p{M}]"
    dense = r"[\p{Han}\p{Hiragana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
    sides = [text[start - 1 : start], text[end : end + 1]] if start and end < len(text) else []
    if sides and all(regex.match(words, c) and c != "_" and not regex.match(dense, c) for c in sides):
        for match in regex.finditer(r"\X", text):
            inside = start <= match.start() and match.end() <= end
            if inside and any(not regex.match(words, c) or c == "_" for c in match.group()):
                return match.group()
    return ""


@given(documents, st.integers(0, 2**32))
@settings(max_examples=150)
def test_the_text_is_what_plain_words_say(given_: list[str], seed: int) -> None:
    draw = np.random.default_rng(seed)
    source = Source(tuple(given_))
    units = getattr(source, draw.choice(["words", "sentences", "paragraphs"]))
    mask = draw.random(len(units)) < draw.random()
    ranking = Ranking(units, np.zeros(len(units)))
    parts = []
    for document, text in enumerate(given_):
        mine = list(units)[units.of(document)]
        kept = np.flatnonzero(mask[units.of(document)]).tolist()
        if not kept:
            continue
        out = text[: mine[0].start] if kept[0] == 0 else ""
        for one, other in pairwise([*kept, None]):
            out += text[mine[one].start : mine[one].end]
            if other is None:
                out += text[mine[one].end :] if one == len(mine) - 1 else ""
            elif other == one + 1:
                out += text[mine[one].end : mine[other].start]
            else:
                out += slow_between(text, mine[one].end, mine[other].start)
        parts.append(out)
    runs = render(source, ranking, mask)
    assert text_of(source.documents, runs, GLUE) == GLUE.join(part for part in parts if part)
    assert all(a.end < b.start or a.document != b.document for a, b in pairwise(runs)), "what touches is one run"


@pytest.mark.parametrize(
    ("text", "kept", "said"),
    [
        ("one two three four", [0, 2], "one three"),
        ("one two three four", [0, 1, 3], "one two four"),
        ("  one two  ", [0, 1], "  one two  "),
        ("one,\ntwo three", [0, 2], "one\ntwo"),
        ("one two\n\n  three\n\nfour", [0, 3], "one\n\nfour"),
        ("one two\n\n  three four", [0, 3], "one\n\n  four"),
        ("a(b)c", [0, 4], "a(c"),
        ("東京、大阪", [0, 3], "東大"),
        ("x 漢字 y", [0, 3], "x y"),
    ],
)
def test_what_parts_two(text: str, kept: list[int], said: str) -> None:
    source = Source((text,))
    words = (
        Source((text,)).cut(lambda t: (m.span() for m in regex.finditer(r"\p{Han}|\w|\S", t)))
        if "(" in text
        else source.words
    )
    mask = np.zeros(len(words), dtype=bool)
    mask[kept] = True
    assert text_of(source.documents, render(source, Ranking(words, np.zeros(len(words))), mask), GLUE) == said


@given(documents, st.integers(0, 2**32), st.floats(0.05, 0.95), st.sampled_from(sorted(COUNTERS)))
@settings(max_examples=150)
def test_the_ceiling_holds_and_little_is_left(given_: list[str], seed: int, keep: float, name: str) -> None:
    draw = np.random.default_rng(seed)
    count = COUNTERS[name]
    source = Source(tuple(given_), counter=count)
    ranking = Ranking(source.words, draw.random(len(source.words)))
    limit = max(1, int(keep * count.count(GLUE.join(given_))))
    kept = settle(source, ranking, limit, GLUE)
    assert count.count(text_of(source.documents, kept.runs, GLUE)) == kept.tokens <= limit
    if name != "characters" or kept.tokens == limit:  # what takes no token, or makes others fewer, may be left
        return
    rest = [unit for unit in np.argsort(-ranking.value, kind="stable").tolist() if not kept.mask[unit]]
    for unit in rest[:1]:  # the best that went does not fit
        more = kept.mask.copy()
        more[unit] = True
        assert count.count(text_of(source.documents, render(source, ranking, more), GLUE)) > limit


@given(documents, st.integers(0, 2**32), st.sampled_from(sorted(COUNTERS)))
@settings(max_examples=150)
def test_protection_and_budget(given_: list[str], seed: int, name: str) -> None:
    """Protected spans are in the text whole, or the error names how many tokens they take."""
    draw = np.random.default_rng(seed)
    count = COUNTERS[name]
    spans = []
    for i, text in enumerate(given_):
        for _ in range(3):
            start, end = sorted(draw.integers(0, len(text) + 1, 2).tolist())
            spans.append((i, start, end))
    source = Source(tuple(given_), protected=protected(given_, spans), counter=count)
    units = getattr(source, draw.choice(["words", "sentences", "paragraphs"]))
    ranking = Ranking(units, draw.random(len(units)))
    limit = max(1, int(draw.random() * count.count(GLUE.join(given_))))
    least = settle(source, Ranking(units, ranking.value, np.zeros(len(units), dtype=bool)), None, GLUE)
    if least.tokens > limit:
        with pytest.raises(BudgetError, match=rf"takes {least.tokens} tokens .* {limit} may stay; allow at least"):
            settle(source, ranking, limit, GLUE)
        limit = least.tokens
    for kept in (least, settle(source, ranking, limit, GLUE)):
        assert count.count(text_of(source.documents, kept.runs, GLUE)) == kept.tokens <= limit
        stands = [
            {i for run in kept.runs if run.document == d for i in range(run.start, run.end)} for d in range(len(given_))
        ]
        for document, start, end in spans:
            assert set(range(start, end)) <= stands[document]
        for run in kept.runs:
            assert {run.start, run.end} <= edges(given_[run.document])
        units_ = kept.ranking.units
        order = list(zip(units_.document.tolist(), units_.start.tolist(), units_.end.tolist(), strict=True))
        assert order == sorted(order) and all(a[2] <= b[1] for a, b in pairwise(order) if a[0] == b[0])
        assert all(kept.mask[i] for i, rule in enumerate(kept.rules) if rule)


def test_what_a_method_chose_comes_first() -> None:
    source = Source(("a bb ccc dddd",), counter=counter("characters"))
    value, chosen = np.array([4.0, 3.0, 2.0, 1.0]), np.array([False, False, True, True])
    assert _said(source, Ranking(source.words, value, chosen), None) == "ccc dddd"
    assert _said(source, Ranking(source.words, value, chosen), 8) == "ccc dddd"
    assert _said(source, Ranking(source.words, value, chosen), 10) == "a ccc dddd"  # one more, by value
    assert _said(source, Ranking(source.words, value, chosen), 7) == "a ccc"  # one less, and what still fits


def _said(source: Source, ranking: Ranking, limit: int | None) -> str:
    return text_of(source.documents, settle(source, ranking, limit, GLUE).runs, GLUE)


def test_an_overlap_of_rules_is_named_by_the_first() -> None:
    text = "pay 30 euros now"
    source = Source((text,), protected=protected([text], [(4, 9), (7, 12), "now"]), counter=counter("characters"))
    kept = settle(source, Ranking(source.words, np.zeros(len(source.words))), 12, GLUE)
    named = {source.of(span): rule for span, rule in zip(kept.ranking.units, kept.rules, strict=True)}
    assert named == {"pay": "", "30 euros": "range 4:9", "now": "literal 'now'"}


def test_both_numbers_are_in_the_error() -> None:
    text, rules = "keep this and drop that", ["keep this", "dr"]
    with pytest.raises(BudgetError, match="takes 12 tokens of characters and 11 may stay; allow at least 12"):
        fewer.compress_prompt(text, "random", tokens=11, tokenizer="characters", protect=rules)
    assert (
        fewer.compress_prompt(text, "random", tokens=12, tokenizer="characters", protect=rules).text == "keep this dr"
    )


def test_counts_are_few() -> None:
    """Each count reads the whole text again: a long one must not be read for every unit."""
    asked = []

    def count(text: str) -> int:
        asked.append(text)
        return pieces(text)

    text = "The quick brown fox jumps over a lazy dog, twice.\n" * 3000
    done = fewer.compress_prompt(text, "random", keep=0.3, tokenizer=count)
    assert done.tokens_after <= (done.limit or 0) and len(asked) <= 9
    assert done.tokens_after > 0.997 * (done.limit or 0)


@pytest.mark.parametrize("limit", [1, 2, 7, 50])
def test_a_counter_that_is_not_even(limit: int) -> None:
    """Counts that jump: the text fits whatever they do, since it was counted."""
    count = Counter("odd", lambda text: len(text) + 13 * (len(text) % 3) if text else 0)
    source = Source(("one two three four five six seven eight",), counter=count)
    kept = settle(source, Ranking(source.words, np.arange(8.0)), limit, GLUE)
    assert count.count(text_of(source.documents, kept.runs, GLUE)) == kept.tokens <= limit


def test_units_that_take_no_tokens_and_none_at_all() -> None:
    source = Source(("... one",), counter=Counter("letters", lambda text: sum(map(str.isalpha, text))))
    assert _said(source, Ranking(source.words, np.array([1.0, 1, 1, 0])), 2) == "..."
    empty = Ranking(Units.made([]), np.zeros(0))
    assert settle(source, empty, 3, GLUE).runs == () and settle(source, empty, 3, GLUE).tokens == 0
