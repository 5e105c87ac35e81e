"""Text, and the way back: byte for byte, or not at all."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fewer
from fewer.prompts.compression import _json, _sha
from fewer.prompts.source import Ranking, Source
from fewer.types import Budget, FewerError
from tests.prompts.texts import blank, documents, edges


class Drawn:
    """Any units, any values, any order of documents; some units in other words, or in none."""

    def __init__(self, seed: int, writes: bool = False) -> None:
        self.draw, self.writes = np.random.default_rng(seed), writes

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        units = getattr(source, self.draw.choice(["words", "sentences", "lines", "paragraphs"]))
        n = len(units)
        some = np.flatnonzero(self.draw.random(n) < 0.4).tolist() if self.writes else []
        return Ranking(
            units,
            self.draw.random(n),
            chosen=self.draw.random(n) < 0.5,
            order=tuple(self.draw.permutation(len(source.documents)).tolist()),
            written={i: str(self.draw.choice(["", "so", "new\nwords ", "é\u0301"])) for i in some},
        )


@given(documents, st.integers(0, 2**32), st.booleans(), st.sampled_from([None, 0.2, 0.5, 0.9]))
@settings(max_examples=200)
def test_the_source_comes_back(given_: list[str], seed: int, writes: bool, keep: float | None) -> None:
    done = fewer.compress_prompt(given_, Drawn(seed, writes), keep=keep, tokenizer="characters")
    assert fewer.restore(done.text, done.patch()) == given_
    assert done.verify(given_)
    assert done.tokens_after == len(done.text) <= (len(done.text) if done.limit is None else done.limit)
    for i, text in enumerate(given_):
        spans = sorted((s.start, s.end) for s in (*done.kept, *done.dropped) if s.document == i)
        assert [0, *(end for _, end in spans)] == [*(start for start, _ in spans), len(text)]
        for run in done.runs:
            if run.document == i:
                assert {run.start, run.end} <= edges(text), "a grapheme is cut"
        if not writes:
            rest = iter(text)
            assert all(letter in rest for letter in done.documents[i])
    assert done.extractive or writes


@given(documents, st.integers(0, 2**32))
def test_a_string_comes_back_as_a_string(given_: list[str], seed: int) -> None:
    text = next(text for text in given_ if text.strip())
    done = fewer.compress_prompt(text, Drawn(seed), keep=0.5, tokenizer="characters")
    assert fewer.restore(done.text, done.patch()) == text


TEXT = (
    'One fine day, 12 ships came in.\r\nThe e\u0301t\u00e9 was over 👩\u200d👧; nobody had “seen” 東京 — or \\ "had".\n'
    * 3
)


@pytest.fixture
def pair() -> tuple[str, str]:
    done = fewer.compress_prompt([TEXT, "other"], "random", keep=0.5, tokenizer="characters")
    return done.text, done.patch()


def test_a_patch_altered_anywhere_is_refused(pair: tuple[str, str]) -> None:
    text, patch = pair
    assert fewer.restore(text, patch) == [TEXT, "other"]
    for at in range(len(patch)):
        for other in ("", " ", "x", "0", chr(ord(patch[at]) ^ 1), patch[at].swapcase(), patch[at] * 2):
            if other != patch[at]:
                with pytest.raises(FewerError, match=r"restore\(\)"):
                    fewer.restore(text, patch[:at] + other + patch[at + 1 :])


def test_a_patch_cut_short_or_lengthened_is_refused(pair: tuple[str, str]) -> None:
    text, patch = pair
    for broken in (
        *(patch[:at] for at in range(0, len(patch), 7)),
        patch + "\n",
        patch + "}",
        "",
        "{}",
        "[]",
        "null",
        "1",
    ):
        with pytest.raises(FewerError, match=r"restore\(\)"):
            fewer.restore(text, broken)
    with pytest.raises(FewerError, match="none that fewer made"):
        fewer.restore(text, "[" * 100_000)


def test_a_text_altered_anywhere_is_refused(pair: tuple[str, str]) -> None:
    text, patch = pair
    for at in range(len(text)):
        for broken in (text[:at] + text[at + 1 :], text[:at] + "x" + text[at:], text[:at]):
            with pytest.raises(FewerError, match="another text"):
                fewer.restore(broken, patch)


def test_a_patch_of_another_text_is_refused(pair: tuple[str, str]) -> None:
    other = fewer.compress_prompt([TEXT, "Other"], "random", keep=0.6, tokenizer="characters")
    with pytest.raises(FewerError, match="another text"):
        fewer.restore(pair[0], other.patch())
    with pytest.raises(FewerError, match="another text"):
        fewer.restore(other.text, pair[1])


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"format": "else"}, {"layout": []}, {"layout": 3}, {"layout": [{"document": 7, "steps": []}]},
        {"layout": [{"document": 0, "steps": [["x"]]}, {"document": 1, "steps": []}]},
        {"layout": [{"document": 0, "steps": [[-5, "abc"], [10**9]]}, {"document": 1, "steps": []}]},
    ],
)  # fmt: skip
def test_a_forged_patch_is_refused(pair: tuple[str, str], change: dict[str, object]) -> None:
    """With a checksum that fits: what it gives is not the source."""
    body = {**json.loads(pair[1]), **change}
    del body["sha256"]
    with pytest.raises(FewerError, match=r"restore\(\)"):
        fewer.restore(pair[0], _json({**body, "sha256": _sha(_json(body))}))


@pytest.mark.parametrize("part", ["text", "source", "single", "layout", "glue"])
def test_a_forged_patch_without_a_part_is_refused(pair: tuple[str, str], part: str) -> None:
    body = json.loads(pair[1])
    del body["sha256"], body[part]
    with pytest.raises(FewerError, match="lacks parts"):
        fewer.restore(pair[0], _json({**body, "sha256": _sha(_json(body))}))


def test_a_forged_patch_cannot_ask_for_more_than_there_is(pair: tuple[str, str]) -> None:
    """Going back and forth, a few steps would give the text a thousand times."""
    body = json.loads(pair[1])
    del body["sha256"]
    back = [[len(pair[0])], [-len(pair[0])]] * 1000
    body["layout"] = [{"document": 0, "steps": back}, {"document": 1, "steps": []}]
    body["source"] = _sha(json.dumps([pair[0] * 1000, ""]))
    with pytest.raises(FewerError, match="not the source"):
        fewer.restore(pair[0], _json({**body, "sha256": _sha(_json(body))}))


def test_written_units_are_told_apart() -> None:
    class Rewrites:
        def rank(self, source: Source, budget: Budget | None) -> Ranking:
            return Ranking(source.sentences, np.array([2.0, 3.0, 1.0]), written={1: "It rained."}, notes=("a note",))

    text = "The sun shone. Then it rained a lot, for days on end. I left."
    done = fewer.compress_prompt(text, Rewrites(), tokens=26, tokenizer="characters")
    assert done.text == "The sun shone. It rained."
    assert not done.extractive and done.notes == ("a note",)
    assert [text[s.start : s.end] for s in done.kept] == ["The sun shone. "]
    assert [text[s.start : s.end] for s in done.dropped] == ["Then it rained a lot, for days on end. I left."]
    assert fewer.restore(done.text, done.patch()) == text
    assert done.verify(text) and not done.verify(text.upper())
    assert done.locate("rained") == ()  # written anew: it comes from nowhere
    assert done.locate("sun")[0].source.start == 4
    kept = fewer.compress_prompt(text, Rewrites(), tokens=45, protect=["a lot"], tokenizer="characters")
    assert "a lot" in kept.text and "It rained." not in kept.text, "what is protected is not rewritten"
    assert fewer.restore(kept.text, kept.patch()) == text


def test_only_the_very_documents_verify() -> None:
    for sources in (["one two", "three"], ["one two"], ["one two", ""]):
        done = fewer.compress_prompt(sources, "random", keep=0.5, tokenizer="characters")
        assert done.verify(sources)
        for others in ([*sources, "more"], [*sources, ""], sources[:-1], ["", *sources]):
            assert not done.verify(others)


def test_a_document_written_away_leaves_no_blank_lines() -> None:
    class Empties:
        def rank(self, source: Source, budget: Budget | None) -> Ranking:
            every = np.ones(3, dtype=bool)
            return Ranking(source.whole, np.zeros(3), chosen=every, written={0: "", 1: "new"})

    done = fewer.compress_prompt(["gone", "old", "stays"], Empties(), tokenizer="characters")
    assert done.text == "new\n\nstays" and done.verify(["gone", "old", "stays"])
    assert fewer.restore(done.text, done.patch()) == ["gone", "old", "stays"]
    assert [tuple(found.source) for found in done.locate("stays")] == [(2, 0, 5)]


def test_documents_change_places_and_come_back() -> None:
    class Backwards:
        def rank(self, source: Source, budget: Budget | None) -> Ranking:
            return Ranking(source.words, np.arange(len(source.words), dtype=np.float64), order=(2, 0, 1))

    given_ = ["a b", "c d", "e f"]
    done = fewer.compress_prompt(given_, Backwards(), tokens=10, tokenizer="characters")
    assert done.text == "e f\n\nc d" and done.documents == ("", "c d", "e f")
    assert fewer.restore(done.text, done.patch()) == given_


@given(documents)
def test_keeping_all_changes_nothing(given_: list[str]) -> None:
    done = fewer.compress_prompt(given_, Drawn(0), keep=1.0, tokenizer="characters")
    assert done.text == "\n\n".join(text for text in given_ if text)
    assert not done.dropped and fewer.restore(done.text, done.patch()) == given_


def test_the_helpers_see_faults() -> None:
    assert blank(" e\u0301 ") == {0, 3} and edges("e\u0301\r\n") == {0, 2, 4}
