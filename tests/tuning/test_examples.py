"""A user's own file: what is read, what is refused, and its parts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fewer.tuning.examples
from fewer.tuning import risk
from fewer.tuning.examples import Example, by_context, gather, parts, read, says
from fewer.types import FewerError
from tests.tuning.talking import examples
from tests.unit.test_types import unchecked


def written(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines), encoding="utf-8")
    return path


def test_what_is_read(tmp_path: Path) -> None:
    path = written(
        tmp_path / "mine.jsonl",
        {"context": "a\u2028b", "question": "?", "answer": "x", "task": "t", "more": 1},
        "",
        {"image": "cat.png", "question": "?", "answer": ["x", "y"]},
        {"context": "c", "question": "?"},
    )
    one, two, three = read(path)
    assert one == Example("a\u2028b", "?", ("x",), (), "t", 1)
    assert (two.images, two.answers, two.line) == ((str(tmp_path / "cat.png"),), ("x", "y"), 3)
    assert three.answers == () and two.score("Y") == 0.5
    assert gather([{"context": "c", "question": "?"}]) == [Example("c", "?", line=1)]


@pytest.mark.parametrize(
    ("text", "answer", "says_"),
    [
        ("Nobody knows.", "no", False), ("No, never.", "no", True), ("It is 42.", "4", False), ("It is 4.", "4", True),
        ("$31,250", "1,250", False), ("$1,250,000", "1,250", False), ("4.5", "4", False), ("a b  c", "B", True),
        ("C++ it is", "c++", True), ("C++x", "c++", True), ("(x)", "(x)", True), ("Straße", "STRASSE", True),
        ("東京都", "東京", True), ("naïveté", "naïve", False), ("x-ray", "ray", True), ("-4", "4", True),
        ("4.5", ".5", False), ("a .5 b", ".5", True),
    ],
)  # fmt: skip
def test_an_answer_is_said_in_whole_words(text: str, answer: str, says_: bool) -> None:
    assert says(text, answer) is says_


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"),
        ([1], "line 2 holds a list"),
        ({"question": "?"}, "line 2 lacks context"),
        ({"context": "c"}, "line 2 lacks question"),
        ({"context": " ", "question": "?"}, "line 2: context is empty"),
        ({"context": "c", "question": 3}, "question is a number"),
        ({"context": "c", "question": "?", "answer": ""}, "answer is empty"),
        ({"context": "c", "question": "?", "answer": []}, "answer is empty"),
        ({"context": "c", "question": "?", "answer": [1]}, "answer is a list, not a string or a list of strings"),
        ({"image": 3, "question": "?"}, "image is a number"),
        ({"context": "c", "question": "?", "task": 3}, "task is a number"),
        ('{"context": "\\ud800", "question": "?"}', "context holds half a surrogate pair"),
        ('{"context": ' + "[" * 100_000, "is not JSON"),
        ('{"context": ' + "1" * 5000 + "}", "is not JSON that can be read"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, said: str) -> None:
    path = written(tmp_path / "mine.jsonl", {"context": "c", "question": "?"}, line)
    with pytest.raises(FewerError, match=said):
        read(path)


def test_files_that_hold_no_examples(tmp_path: Path) -> None:
    with pytest.raises(FewerError, match="cannot be read"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(FewerError, match="has no lines"):
        read(written(tmp_path / "empty.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes("{'ä'}".encode("latin-1"))
    with pytest.raises(FewerError, match=r"is not UTF-8 text \(byte 2\)"):
        read(tmp_path / "latin.jsonl")
    with pytest.raises(FewerError, match="holds no examples"):
        gather([])


def test_no_example_is_in_two_parts_or_twice() -> None:
    many = examples(300)
    search, calibrate, check = parts([*many, *many[:50]], 149, seed=3)
    keys = [one.key for one in (*search, *calibrate, *check)]
    assert len(keys) == len(set(keys)) == 300
    assert (len(search), len(calibrate), len(check)) == (75, 195, 30)
    assert parts(many, 149, seed=3)[1] == calibrate and parts(many, 149, seed=4)[1] != calibrate


def test_pictures_tie_what_is_asked_of_them_together(tmp_path: Path) -> None:
    """Whatever the captions: a picture that is lost is lost with all its questions. Its copy is the same picture."""
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "copy of a").write_bytes(b"a")
    a, b, c, copied = (str(tmp_path / name) for name in ("a", "b", "c", "copy of a"))
    pictures = [(a,), (b,), (c,), (copied,), (b, c)]
    asked = [Example(f"caption {i}", "what?", images=images, line=i) for i, images in enumerate(pictures)]
    assert [[one.line for one in group] for group in by_context(asked)] == [[0, 3], [1, 2, 4]]
    assert asked[0].key != replace(asked[0], images=(b,)).key == replace(asked[0], images=(b,), line=9).key
    before = asked[0].key
    (tmp_path / "a").write_bytes(b"another picture")
    assert replace(asked[0], line=0).key != before
    captioned = [Example("look at this", "what?", images=(one,)) for one in (a, b, c)]
    assert len(by_context(captioned)) == 3, "one instruction for all pictures ties nothing"


def test_the_same_question_with_two_answers_is_refused() -> None:
    twice = [Example("c", "q", ("A",), line=3), Example("c", "q", ("B",), line=9)]
    others = [Example(f"c{i}", "q", ("A",), line=10 + i) for i in range(20)]
    with pytest.raises(FewerError, match="lines 3 and 9 ask the same and expect different answers"):
        parts([*twice, *others], 3, 0)
    assert sum(map(len, parts([twice[0], replace(twice[0], line=9), *others], 3, 0))) == 21


@pytest.mark.parametrize("fields", [{"answers": "blue"}, {"answers": (" ",)}, {"answers": (3,)}, {"images": "a.png"}])
def test_an_example_made_by_hand_is_looked_at(fields: dict[str, Any]) -> None:
    with pytest.raises(FewerError, match=r"give a tuple of texts"):
        unchecked(fewer.tuning.examples).Example("c", "q", **fields)


@pytest.mark.parametrize("data", [5, None, {"context": "c", "question": "q"}])
def test_what_is_no_list_of_examples(data: Any) -> None:
    with pytest.raises(FewerError, match="give a JSONL file, or a list of objects"):
        unchecked(fewer.tuning.examples).gather(data)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "marked.jsonl").write_bytes(b'\xef\xbb\xbf{"context": "c", "question": "q"}\n')
    assert read(tmp_path / "marked.jsonl")[0].context == "c"


def test_the_fewest_that_will_do() -> None:
    search, calibrate, check = parts(examples(151), 149, 0)
    assert (len(search), len(calibrate), len(check)) == (1, 149, 1)
    with pytest.raises(FewerError, match=r"150 examples are too few.*takes 149 to calibrate.*at least 151"):
        parts(examples(150), 149, 0)
    with pytest.raises(FewerError, match=r"20 examples with 10 different contexts are too few"):
        parts([*examples(10), *examples(10)], risk.needed(0.02, 0.05), 0)


def test_a_context_is_in_one_part_with_all_its_questions() -> None:
    many = [replace(one, question=f"{one.question} {i}") for one in examples(40) for i in range(5)]
    cuts = parts(many, 20, seed=1)
    contexts = [{one.context for one in cut} for cut in cuts]
    assert sum(map(len, cuts)) == 200 and [len(cut) for cut in contexts] == [10, 26, 4]
    assert not contexts[0] & contexts[1] and not contexts[1] & contexts[2]
    assert [len(group) for group in by_context(cuts[0])] == [5] * 10
