"""`fewer prompt --in --out`: every line once, in its order, whatever happens on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import typer

import fewer as library
from fewer.cli.bulk import shorten_file
from fewer.methods.prompt.truncation import Truncation
from fewer.prompts.bulk import Item, Outcome, Shortener, items, local
from fewer.prompts.checkpoint import Summary, shorten_lines
from fewer.types import FewerError
from tests.front.test_cli import fewer

__all__ = ["fewer"]

PLAIN = ("--method", "truncation", "--tokenizer", "characters", "--keep", "0.5")
CUT = Shortener("truncation", keep=0.5, tokenizer="characters")


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def many(n: int) -> list[bytes]:
    return [line(id=i, text=f"Document {i} says that {i * i} is {i} times {i}. And so on.", tag="x") for i in range(n)]


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"".join(many(20)))
    return path


def test_a_line_by_hand() -> None:
    raw = '{"id": 7, "text": "one two three", "café": [1, {"a": null}]}'.encode()
    done = CUT(Item(3, raw))
    # 13 characters, of which 7 may stay: "one two"
    assert json.loads(done.line) == {
        "id": 7, "café": [1, {"a": None}], "text": "one two", "tokens_before": 13, "tokens_after": 7,
        "method": "truncation", "line": 3, "digest": Item(3, raw).digest,
    }  # fmt: skip
    assert "café".encode() in done.line
    assert (done.before, done.after, done.size, done.failed, done.wrong) == (13, 7, len(raw), False, "")


def test_lines_are_the_librarys_and_come_back(tmp_path: Path) -> None:
    rows = [
        {"text": "alpha beta gamma. delta 12 kg."},
        {"documents": ["one two three", "four five six"], "question": "four?", "instruction": "Be short."},
    ]
    out = tmp_path / "out"
    shortener = replace(CUT, method="bm25", question="What of gamma?", protect_class=("numbers",), patches=True)
    shorten_lines([line(**row) for row in rows], out, shortener)
    for row, got in zip(rows, written(out), strict=True):
        prompt: Any = row.get("text", row.get("documents"))
        asked = {"question": row.get("question", "What of gamma?"), "protect": [library.protect.NUMBERS]}
        done = library.compress_prompt(prompt, "bm25", keep=0.5, tokenizer="characters", **asked)
        assert got["text"] == done.text and got["tokens_after"] == done.tokens_after
        assert library.restore(got["text"], got["patch"]) == prompt
        assert "documents" not in got and got.get("question") == row.get("question")


@pytest.mark.parametrize("rule", ["protect", "protect_regex"])
def test_a_rule_that_protects_nothing_in_a_line_is_said_there(rule: str) -> None:
    shortener = replace(CUT, **{rule: ("beta",)})
    lines = b'{"text": "a beta c"}', b'{"text": "one two three"}'
    said = [json.loads(shortener(Item(1, line)).line) for line in lines]
    assert "notes" not in said[0] and said[1]["notes"] == ["protect='beta' is nowhere in the text"]


def test_blank_lines_count_and_have_no_output(tmp_path: Path) -> None:
    source = b"\xef\xbb\xbf" + line(text="a b c d") + b"\n  \r\n" + line(text="e f g h").replace(b"\n", b"\r\n")
    shorten_lines(source.splitlines(keepends=True), tmp_path / "out", CUT)
    assert [(row["line"], row["text"]) for row in written(tmp_path / "out")] == [(1, "a b"), (4, "e f")]


def test_a_line_that_cannot_be_shortened_says_why(fewer, data: Path, tmp_path: Path) -> None:
    data.write_bytes(many(1)[0] + line(text=" ", id="empty") + line(text="'long quote'", id=3) + many(1)[0])
    out = tmp_path / "out"
    words = ("prompt", "--in", str(data), "--out", str(out), *PLAIN, "--protect", "'long quote'")
    code, said, _ = fewer(*words)
    rows = written(out)
    assert code == 1 and "4 lines" in said and "2 could not be shortened" in said
    assert [row.get("id") for row in rows] == [0, "empty", 3, 0] and [row["line"] for row in rows] == [1, 2, 3, 4]
    assert "the prompt is empty" in rows[1]["error"] and "at least 12" in rows[2]["error"]
    assert all(("text" in row) != ("error" in row) for row in rows)


def test_the_source_is_never_held(tmp_path: Path) -> None:
    taken = [0]

    def source() -> Iterator[bytes]:
        for raw in many(50):
            taken[0] += 1
            yield raw

    ahead = []
    shorten_lines(source(), tmp_path / "out", CUT, tick=lambda total: ahead.append(taken[0] - total.lines))
    assert len(ahead) == 50 and set(ahead) == {0}


class Stop(Exception):
    """What stands for an interruption."""


def stopping(after: int):
    def engine(shortener: Shortener, coming: Iterator[Item]) -> Iterator[Outcome]:
        for i, outcome in enumerate(local(shortener, coming)):
            if i == after:
                raise Stop
            yield outcome

    return engine


def test_it_goes_on_after_the_last_whole_line(tmp_path: Path) -> None:
    lines, whole, out = [*many(9), b"\n", line(text=" ")], tmp_path / "whole", tmp_path / "out"
    wanted = shorten_lines(lines, whole, CUT)
    with pytest.raises(Stop):
        shorten_lines(lines, out, CUT, stopping(4))
    partial = tmp_path / "out.partial"
    assert len(written(partial)) == 4 and not out.exists()
    with partial.open("ab") as file:
        file.write(b'{"id": 4, "text": "half of')  # as a process leaves it that was killed while it wrote
    with pytest.raises(Stop):  # interrupted again
        shorten_lines(lines, out, CUT, stopping(3))
    assert len(written(partial)) == 7
    begun = []

    def engine(shortener: Shortener, coming: Iterator[Item]) -> Iterator[Outcome]:
        return local(shortener, (item for item in coming if not begun.append(item.number)))

    assert shorten_lines(lines, out, CUT, engine) == replace(wanted, resumed=7)
    assert begun == [8, 9, 11] and out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_changed_input_or_setting_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    lines, out, partial = many(9), tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(Stop):
        shorten_lines(lines, out, CUT, stopping(4))
    before = partial.read_bytes()
    state = tmp_path / "out.partial.json"
    settings = state.read_bytes()
    changed = [*lines[:2], lines[2].replace(b"that", b"what"), *lines[3:]]
    for source, shortener, why in (
        (changed, CUT, "line 3 of the input is not what it was"),
        (lines[:3], CUT, "line 4 of the input is not what it was"),
        ([b"\n", *lines], CUT, "line 1 of the input is not what it was"),
        (lines, replace(CUT, keep=0.3), "keep was '0.5' and is '0.3'"),
        (lines, replace(CUT, protect=("x",), patches=True), r"protect was \[\] and is \['x'\], patches was False"),
    ):
        with pytest.raises(FewerError, match=why):
            shorten_lines(source, out, shortener)
        assert partial.read_bytes() == before and state.read_bytes() == settings
    # lines behind those that were written may change
    shorten_lines([*lines[:4], line(text="a b c d")], out, CUT)
    assert [row["line"] for row in written(out)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("planted", [b"no JSON\n", b'{"line": 1}\n', b"[]\n", b'{"line": 1, "digest": "0"}\n'])
def test_a_partial_that_is_none_of_ours_is_refused(tmp_path: Path, planted: bytes) -> None:
    partial = tmp_path / "out.partial"
    with pytest.raises(Stop):
        shorten_lines(many(5), tmp_path / "out", CUT, stopping(3))
    partial.write_bytes(planted)
    with pytest.raises(FewerError, match=r"line 1 of .*out\.partial is none that fewer wrote"):
        shorten_lines(many(5), tmp_path / "out", CUT)
    (tmp_path / "out.partial.json").unlink()
    with pytest.raises(FewerError, match="cannot be read; remove both to begin anew"):
        shorten_lines(many(5), tmp_path / "out", CUT)
    assert partial.read_bytes() == planted


WRONG = {
    "not JSON": (b'{"text": "a b"', "is not JSON: Expecting ',' delimiter at column 15"),
    "no object": (b"[1]", "is no JSON object"),
    "neither": (b'{"id": 1}', "has neither text nor documents"),
    "both": (b'{"text": "a", "documents": []}', "has both text and documents"),
    "text": (b'{"text": 5}', "text is int, not a string"),
    "documents": (b'{"documents": "ab"}', "documents is no list of strings"),
    "question": (b'{"text": "a", "question": [1]}', "question is list, not a string"),
    "ours": (b'{"text": "a", "method": "mine"}', "has a field 'method', which the output has of its own"),
    "twice": (b'{"text": "a", "id": 1, "id": 2}', "'id' stands there twice"),
    "NaN": (b'{"text": "a", "x": NaN}', "NaN is no number"),
    "infinite": (b'{"text": "a", "x": 1e999}', "1e999 is no number"),
    "bytes": (b'{"text": "\xff"}', "is not UTF-8 text (byte 10)"),
    "deep": (b"[" * 100_000, "is not JSON that can be read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_line_that_cannot_be_read_stops_and_can_be_mended(fewer, data: Path, tmp_path: Path, case: str) -> None:
    bad, why = WRONG[case]
    whole, out = tmp_path / "whole", tmp_path / "out"
    lines = many(6)
    shorten_lines(lines, whole, CUT)
    data.write_bytes(b"".join([*lines[:3], bad + b"\n", *lines[4:]]))
    words = ("prompt", "--in", str(data), "--out", str(out), *PLAIN)
    code, said, err = fewer(*words)
    assert (code, said) == (2, "") and not out.exists()
    flat = " ".join(err.split())
    assert "line 4 of the input " in flat.replace("input:", "input ") and why in flat and "Traceback" not in flat
    assert f"; mend line 4 of {data}, then the same command goes on there" in flat
    assert "The 3 lines before it are in" in flat and len(written(tmp_path / "out.partial")) == 3
    data.write_bytes(b"".join(lines))
    assert fewer(*words)[0] == 0 and out.read_bytes() == whole.read_bytes()


def test_half_of_a_surrogate_pair_is_carried_or_is_an_error(tmp_path: Path) -> None:
    shorten_lines([b'{"text": "a b c d", "x": "\\ud800"}', b'{"text": "\\ud800 b"}'], tmp_path / "out", CUT)
    first, second = written(tmp_path / "out")
    assert first["x"] == "\ud800" and "half of a surrogate pair" in second["error"]


def test_a_disk_without_room_loses_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="this system has no limits for files")
    lines, whole, out = many(9), tmp_path / "whole", tmp_path / "out"
    shorten_lines(lines, whole, CUT)
    room = len(b"".join(whole.read_bytes().splitlines(keepends=True)[:4])) + 30  # in the middle of line 5
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def engine(shortener: Shortener, coming: Iterator[Item]) -> Iterator[Outcome]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # the settings, which are longer, are written
        return local(shortener, coming)

    try:
        with pytest.raises(FewerError, match=r"File too large\). The 4 lines before it are in .*partial"):
            shorten_lines(lines, out, CUT, engine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "out.partial").stat().st_size == room
    assert shorten_lines(lines, out, CUT).resumed == 4 and out.read_bytes() == whole.read_bytes()


def test_one_run_at_a_time(tmp_path: Path) -> None:
    def engine(shortener: Shortener, coming: Iterator[Item]) -> Iterator[Outcome]:
        with pytest.raises(FewerError, match="is being written by another run"):
            shorten_lines(many(3), tmp_path / "out", CUT)
        return local(shortener, coming)

    assert shorten_lines(many(3), tmp_path / "out", CUT, engine).lines == 3


def test_wrong_settings_leave_nothing_behind(fewer, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for extra, why in (
        (("--method", "truncate", "--keep", "0.5"), "did you mean truncation"),
        (("--method", "truncation"), "has no threshold of its own"),
        (("--method", "truncation", "--keep", "2"), "--keep '2'"),
        (("--method", "truncation", "--tokens", "0"), "--tokens 0"),
        (("--method", "provence", "--keep", "0.5"), "has to be fitted"),
        (("--method", "truncation", "--keep", "0.5", "--protect-regex", "(a"), "--protect-regex '(a'"),
        (("--method", "truncation", "--keep", "0.5", "--protect-class", "verbs"), "no class 'verbs'"),
        (("--method", "truncation", "--keep", "0.5", "--engine", "spark"), "known are local, ray"),
    ):
        code, said, err = fewer(
            "prompt", "--in", str(data), "--out", str(out), "--tokenizer", "characters", "--question", "What?", *extra
        )
        assert (code, said) == (2, "") and why in " ".join(err.split()), (extra, err)
        assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_mixtures_are_refused(fewer, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").write_text("kept")
    both = ("--in", "data.jsonl", "--out", "out")
    for words, why in (
        ((), "give a FILE"),
        (("--in", "data.jsonl"), "--in and --out go together"),
        (("--out", "out"), "--in and --out go together"),
        ((*both, "file.txt"), "FILES is for single texts"),
        ((*both, "--html", "a.html"), "--html is for single texts"),
        ((*both, "--patch", "a.patch"), "--patch is for single texts"),
        ((*both, "--documents", ";"), "--documents is for single texts"),
        (("data.jsonl", "--patches"), "--patches goes with --in"),
        (("data.jsonl", "--engine", "ray"), "--engine goes with --in"),
        (("data.jsonl", "--overwrite"), "--overwrite goes with --in"),
        (("--in", "nowhere", "--out", "out"), "--in nowhere: No such file"),
        (("--in", ".", "--out", "out"), "--in .: Is a directory"),
        (("--in", "data.jsonl", "--out", "no/such/out"), "there is no folder no/such"),
        (("--in", "data.jsonl", "--out", "."), "it is a folder"),
        (("--in", "data.jsonl", "--out", "-"), "name one"),
        (("--in", "data.jsonl", "--out", "there"), "there is there already"),
        (("--in", "data.jsonl", "--out", "data.jsonl", "--overwrite"), "is what is read"),
        (("--in", "there.partial", "--out", "there", "--overwrite"), "--out there.partial is what is read"),
    ):
        code, said, err = fewer("prompt", *words, *PLAIN)
        assert (code, said) == (2, "") and why in " ".join(err.split()), (words, err)
    assert sorted(path.name for path in Path().iterdir()) == ["data.jsonl", "there"]
    code, said, _ = fewer("prompt", "--in", "data.jsonl", "--out", "there", "--overwrite", "--json", *PLAIN)
    assert code == 0 and json.loads(said)["lines"] == len(written(Path("there"))) == 20


def test_an_empty_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FewerError, match="the input has no lines"):
        shorten_lines([b"\n", b" "], tmp_path / "out", CUT)
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class Broken(Truncation):
    """A method with a fault."""

    def rank(self, source: Any, budget: Any) -> Any:
        if "Document 2" in source.documents[0]:
            raise ZeroDivisionError("oops")
        return super().rank(source, budget)


def test_a_fault_of_a_method_is_no_error_of_a_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="line 3 of the input: the method failed"):
        shorten_lines(many(5), tmp_path / "out", replace(CUT, method=Broken()))
    assert len(written(tmp_path / "out.partial")) == 2


def test_stdout_holds_the_sum_alone(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def chatty(shortener: Shortener, coming: Iterator[Item]) -> Iterator[Outcome]:
        print("(raylet) A worker died")  # noqa: T201
        return local(shortener, coming)

    shorten_file(data, tmp_path / "out", CUT, chatty, overwrite=False, as_json=True)
    said = capsys.readouterr()
    assert json.loads(said.out)["lines"] == 20 and "(raylet)" in said.err


def test_stopped_by_hand(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def engine(shortener: Shortener, coming: Iterator[Item]) -> Iterator[Outcome]:
        for i, outcome in enumerate(local(shortener, coming)):
            if i == 4:
                raise KeyboardInterrupt
            yield outcome

    with pytest.raises(typer.Exit) as left:
        shorten_file(data, tmp_path / "out", CUT, engine, overwrite=False, as_json=False)
    said = capsys.readouterr()
    assert left.value.exit_code == 130 and said.out == "" and "the same command goes on" in " ".join(said.err.split())
    assert len(written(tmp_path / "out.partial")) == 4


def test_items_are_numbered_from_one() -> None:
    assert [(item.number, item.raw) for item in items([b"a\n", b"\n", b" b \n"])] == [(1, b"a"), (3, b"b")]


def test_the_sum_says_what_happened() -> None:
    said = str(Summary(lines=4, errors=1, resumed=2, tokens_before=100, tokens_after=25))
    assert "100 tokens to 25 (25.0%)" in said and "2 of them were there" in said and "1 could not" in said


SLOW = """
import sys, time
from dataclasses import dataclass
from fewer.cli.bulk import shorten_file
from fewer.methods.prompt.truncation import Truncation
from fewer.prompts.bulk import Shortener
from fewer.prompts.checkpoint import shorten_lines

@dataclass(frozen=True)
class Slow(Truncation):
    def rank(self, source, budget):
        time.sleep(0.005)
        return super().rank(source, budget)

    def __repr__(self):
        return "Slow"

shortener = Shortener(Slow(), keep=0.5, tokenizer="characters")
shorten_lines(open(sys.argv[1], "rb"), sys.argv[2], shortener)
"""


def test_killed_in_the_middle_and_run_again(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    data, out, partial = tmp_path / "data", tmp_path / "out", tmp_path / "out.partial"
    data.write_bytes(b"".join(many(150)))
    with data.open("rb") as lines:
        shorten_lines(lines, tmp_path / "whole", CUT)
    wanted = (tmp_path / "whole").read_bytes().replace(b'"method": "truncation"', b'"method": "Slow"')
    command = [sys.executable, str(tmp_path / "slow.py"), str(data), str(out)]
    process = subprocess.Popen(command)  # noqa: S603
    try:
        while process.poll() is None and not (partial.exists() and partial.stat().st_size > len(wanted) // 4):
            time.sleep(0.002)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    left = partial.read_bytes()
    assert len(wanted) // 4 < len(left) < len(wanted) and wanted.startswith(left) and not out.exists()
    subprocess.run(command, check=True)  # noqa: S603
    assert out.read_bytes() == wanted and not partial.exists()
