"""Units of text: in order, without overlap, never in the middle of a grapheme, and all that is to be read is in one."""

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from fewer.prompts.shape import Shape, paired
from fewer.prompts.source import _WORD, Source, Units, graphemes
from tests.prompts.texts import blank, documents, edges, texts

KINDS = ("words", "sentences", "lines", "paragraphs", "whole")


def check(source: Source, units: Units, whole: bool = True) -> None:
    last = (0, 0)
    seen: list[set[int]] = [set() for _ in source.documents]
    for document, start, end in units:
        text = source.documents[document]
        assert (document, start) >= last and start < end <= len(text)
        assert {start, end} <= edges(text), "a grapheme is cut"
        white = blank(text)
        assert start not in white and end - 1 not in white
        seen[document].update(range(start, end))
        last = (document, end)
    for text, found in zip(source.documents, seen, strict=True):
        assert not whole or found | blank(text) == set(range(len(text)))


@given(documents)
def test_units_of_every_kind(given_: list[str]) -> None:
    source = Source(tuple(given_))
    for kind in KINDS:
        check(source, getattr(source, kind))
    assert not any({"\r", "\n"} & set(source.of(span)) for span in source.lines)


@given(documents, st.randoms(use_true_random=False))
def test_tokens_anywhere(given_: list[str], draw: object) -> None:
    """A model's tokens may begin and end where they like, overlap in one character, and be empty."""
    offsets = []
    for text in given_:
        cuts = sorted(draw.choices(range(len(text) + 1), k=8))  # type: ignore[attr-defined]
        pairs = list(zip([0, *cuts], [*cuts, len(text)], strict=True))
        offsets.append(np.array(pairs, dtype=np.int64))
    source = Source(tuple(given_))
    check(source, source.tokens(offsets))
    as_lists = source.tokens([pairs.tolist() for pairs in offsets])
    assert list(as_lists) == list(source.tokens(offsets))


def test_pieces_of_a_character_are_one_unit() -> None:
    source = Source(("a👍🏽b",))
    offsets = [[(0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (3, 4)]]
    assert [source.of(span) for span in source.tokens(offsets)] == ["a", "👍🏽", "b"]


@given(texts)
def test_shapes_are_the_graphemes(text: str) -> None:
    shape, known, at = Shape.of(text), sorted(edges(text)), np.arange(len(text) + 1)
    assert shape.floor(at).tolist() == [max(e for e in known if e <= i) for i in range(len(text) + 1)]
    assert shape.ceil(at).tolist() == [min(e for e in known if e >= i) for i in range(len(text) + 1)]
    assert [graphemes(text)(i) for i in range(len(text) + 1)] == shape.ceil(at).tolist()
    white = {i for a, b in zip(shape.left.tolist(), shape.right.tolist(), strict=True) for i in range(a, b)}
    assert white == blank(text)
    assert shape.breaks.tolist() == [
        text.count("\n", a, b) for a, b in zip(shape.left.tolist(), shape.right.tolist(), strict=True)
    ]


@given(st.text("🇩🇪e\u0301\u200d\u0600👩\ufe0fक\u094d\u1161\u11ab §\n.", max_size=30))
def test_flags_among_all_that_joins(text: str) -> None:
    for pattern in (regex.compile(r"\X"), _WORD):
        assert [match.span() for match in pattern.finditer(paired(text))] == [
            match.span() for match in pattern.finditer(text)
        ]


def test_the_fast_words_are_the_words() -> None:
    """ASCII has a pattern of its own; one character beyond it brings the other."""
    text = "see a.b/c:d-e_f@g#h%i+j~k\\l'm?n=o&p; http://x.y/z (it's) --no .5 a..b x_ _y 1,000\x1c\x0b!"
    plain = [Source((text,)).of(span) for span in Source((text,)).words]
    other = Source((f"{text} é",))
    assert plain == [other.of(span) for span in other.words][:-1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's 3.5 kg, no?", ["It's", "3.5", "kg", ",", "no", "?"]),
        ("don’t e-mail a@b.org", ["don’t", "e-mail", "a@b.org"]),
        ("https://x.y/z?a=1#b", ["https://x.y/z?a=1#b"]),
        ("東京は大", ["東", "京", "は", "大"]),
        ("GPU上で", ["GPU", "上", "で"]),
        ("กำ ดี", ["กำ", "ดี"]),
        ("한국어 text", ["한국어", "text"]),
        ("e\u0301te\u0301 👩\u200d👧!", ["e\u0301te\u0301", "👩\u200d👧", "!"]),
        ("(שלום)", ["(", "שלום", ")"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    source = Source((text,))
    assert [source.of(span) for span in source.words] == words


@pytest.mark.parametrize("space", ["\u00a0", "\u202f", "\u3000", "\u2009", "\u2028", "\u0085"])
def test_a_capital_letter_before_wide_white_space(space: str) -> None:
    """sentencex panics on it as it stands."""
    text = f"Take vitamin A{space}. Then J{space}. Smith came. It rained."
    source = Source((text,))
    check(source, source.sentences)
    assert "It rained." in [source.of(span) for span in source.sentences]


def test_a_line_on_which_the_segmenter_panics_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    panic = type("PanicException", (BaseException,), {})

    def segment(language: str, text: str) -> list[str]:
        raise panic if "B" in text else KeyboardInterrupt

    monkeypatch.setattr("fewer.prompts.source.sentencex.segment", segment)
    source = Source(("A B. C.",))
    assert [source.of(span) for span in source.sentences] == ["A B. C."]
    with pytest.raises(KeyboardInterrupt):
        len(Source(("A C.",)).sentences)


def test_sentences_lines_and_paragraphs() -> None:
    source = Source(("Mr. Fox ran. He\r\nstopped! \n \nWhy? ", " \n"))
    read = {kind: [source.of(span) for span in getattr(source, kind)] for kind in KINDS[1:]}
    assert read == {
        "sentences": ["Mr. Fox ran.", "He", "stopped!", "Why?"],
        "lines": ["Mr. Fox ran. He", "stopped!", "Why?"],
        "paragraphs": ["Mr. Fox ran. He\r\nstopped!", "Why?"],
        "whole": ["Mr. Fox ran. He\r\nstopped! \n \nWhy?"],
    }


def test_a_line_without_end_is_read_in_windows() -> None:
    text = "It went on. And on it went, e.g. here. " * 1000
    found = [Source((text,)).of(span) for span in Source((text,)).sentences]
    assert len(text) > 30_000 and set(found) == {"It went on.", "And on it went, e.g. here."}


@pytest.mark.parametrize(
    "made",
    ["«" * 60_000, " " * 300_000 + "x", "\n \n" * 60_000 + "x", "a" * 300_000, "." * 300_000, "🇩🇪" * 50_000],
)
@pytest.mark.timeout(60)
def test_no_text_takes_time_that_grows_with_its_square(made: str) -> None:
    source = Source((made,))
    for kind in KINDS:
        assert len(getattr(source, kind)) > 0


@given(texts, st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_spread_is_what_a_loop_gives(text: str, values: list[float]) -> None:
    source = Source((text,))
    cuts = np.linspace(0, len(text), len(values) + 1).astype(np.int64)
    pairs = np.stack([cuts[:-1], cuts[1:]], 1)
    for how, fold in (("mean", lambda x: sum(x) / len(x)), ("sum", sum), ("max", max)):
        got = source.spread(source.words, [pairs], [values], how)
        for (_, start, end), value in zip(source.words, got.tolist(), strict=True):
            touch = [v for (a, b), v in zip(pairs.tolist(), values, strict=True) if a < end and b > start and a < b]
            if touch and (pairs[:, 0] < pairs[:, 1]).all():
                assert value == pytest.approx(fold(touch), abs=1e-9)


def test_the_checks_see_faults() -> None:
    source = Source(("ab e\u0301 c",))
    for spans in ([(0, 0, 3)], [(0, 3, 4)], [(0, 0, 2), (0, 1, 2)], [(0, 0, 0)], [(0, 0, 2)]):
        with pytest.raises(AssertionError):
            check(source, Units.made(spans))
