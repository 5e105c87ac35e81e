"""What commands refuse before they work: outputs without room, inputs that would be lost, options that say nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fewer.cli.common import check_outputs
from fewer.types import FewerError
from tests.front.test_cli import fewer, model
from tests.front.test_prompt_cli import PLAIN

__all__ = ["fewer", "model"]

SHORT = ("prompt", "t.txt", *PLAIN, "--keep", "0.5")
ASK = ("image", "p.png", "--question", "what?")
REFUSED = {
    "a report in a file": (("compare", "--out", "t.txt"), "--out t.txt/report.html cannot be written:"),
    "a report below a file": (("compare", "--out", "t.txt/a/b"), "t.txt is in the way"),
    "a fit in a folder": (("fit", "kvzap", "--out", "d"), "--out d cannot be written: it is a folder; name a file"),
    "the root": ((*SHORT, "--patch", "/"), "--patch / cannot be written: it is a folder"),
    "a patch nowhere": ((*SHORT, "--patch", "no/x"), "--patch no/x cannot be written: there is no folder no"),
    "a page in a folder": ((*SHORT, "--html", "d"), "--html d cannot be written: it is a folder"),
    "patch is read": ((*SHORT, "--patch", "t.txt"), "--patch t.txt is what is read; name another file"),
    "page is read": ((*SHORT, "--html", "d/../t.txt"), "--html d/../t.txt is what is read"),
    "patch is the page": ((*SHORT, "--patch", "p", "--html", "p"), "--patch p is what is written by --html"),
    "a fit of itself": (("fit", "kvzap", "--data", "t.txt", "--out", "t.txt"), "--out t.txt is what is read"),
    "a drawing of itself": (("image", "p.png", "--out", "p.png"), "--out p.png is what is read"),
    "a plan of itself": (("tune", "--data", "e.jsonl", "--plan", "e.jsonl"), "--plan e.jsonl is what is read"),
    "no methods": (("compare", "--methods", ""), "--methods '' names nothing"),
    "commas": (("compare", "--methods", ", ,"), "--methods ', ,' names nothing"),
    "no budgets": (("compare", "--keep", ""), "--keep '' names nothing"),
    "no tasks": (("compare", "--tasks", ""), "--tasks '' names nothing"),
    "nothing to tune": (("tune", "--data", "e.jsonl", "--loss", "0.9", "--methods", ""), "--methods '' names nothing"),
    "no method": (("generate", "x", "--method", ""), "--method '' is empty"),
    "no budget": (("generate", "x", "--keep", ""), "--keep '' is empty"),
    "no question": (("generate", "x", "--question", " "), "--question ' ' is empty"),
    "no question of a picture": (("image", "p.png", "--question", ""), "--question '' is empty"),
    "a budget beside a plan": (("generate", "x", "--plan", "p", "--every", "0"), "leave out --every"),
    "a cache's method": ((*ASK, "--method", "snapkv"), "--method snapkv shortens a cache"),
    "a size and a question": ((*ASK, "--method", "fastv", "--size", "100"), "--size 100: with --question"),
    "a size": (("image", "p.png", "--size", "100"), "multiple of 14"),
    "a picture's method": (("image", "p.png", "--method", "fastv"), "`fewer methods --family vit` lists them"),
    "a picture's name": (("image", "p.png", "--method", "tomme"), "did you mean tome"),
    "a count of patches": (("image", "p.png", "--keep", "64"), "in (0, 1], such as 0.5, or a share of the FLOPs"),
    "every without when": (("generate", "x", "--every", "5"), "add --when decode, or both"),
    "every of none": (("generate", "x", "--every", "0"), "--every 0: a number of decoding steps"),
    "a store": (("generate", "x", "--store", "snapkv"), "--store 'snapkv' names no form of storage"),
    "full and a budget": (("generate", "x", "--method", "full", "--keep", "0.2"), "--keep 0.2: full keeps everything"),
    "a store in the name": (("generate", "x", "--method", "snapkv+kivi-4bit"), "--method snapkv --store kivi-4bit"),
    "a plan as a method": (("generate", "x", "--method", "plan.toml"), "--plan plan.toml"),
    "a size of no pictures": (("fit", "kvzap", "--size", "7", "--out", "f"), "--size 7 means nothing for kvzap"),
    "a length of pictures": (("fit", "diffrate", "--length", "64", "--out", "f"), "--length 64 means nothing"),
    "above one": (("prompt", "t.txt", *PLAIN, "--keep", "1.5"), "(0, 1], such as 0.5, or give --tokens"),
    "percent": (("prompt", "t.txt", *PLAIN, "--keep", "50%"), "--keep 50%: write 0.5"),
    "percent of a cache": (("generate", "x", "--keep", "12.5%"), "--keep 12.5%: write 0.125"),
    "serving nothing": (("serve", "--keep", "0"), "--keep '0': it is the share that may stay"),
    "percent of chats": (("serve", "--keep", "50%"), "--keep 50%: write 0.5"),
    "no threshold": (("prompt", "t.txt", *PLAIN), "give --keep, or --tokens"),
    "a limit": (("serve", "--limit-mb", "0"), "--limit-mb 0.0 lets nothing through"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_loaded(fewer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    words, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    for loader in ("fewer.models.load", "fewer.vision.load_vision", "fewer.reference_vlm.load"):
        monkeypatch.setattr(loader, lambda *a, **k: pytest.fail("a model was loaded"))
    Path("t.txt").write_text("one two three")
    Path("e.jsonl").write_text('{"context": "a b", "question": "c?", "answer": "d"}\n' * 60)
    Path("d").mkdir()
    Image.new("RGB", (60, 60)).save("p.png")
    before = {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    code, out, err = fewer(*words)
    assert (code, out) == (2, "") and "Traceback" not in err
    assert message in " ".join(err.split())
    assert before == {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}


def test_devices_may_be_named_twice_and_rights_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    null = Path("/dev/null")
    check_outputs(("--html", null), ("--patch", null), read=[null])
    check_outputs(("--out", tmp_path / "a/b"), makes_folders=True)
    with pytest.raises(FewerError, match="File name too long"):
        check_outputs(("--out", tmp_path / ("a" * 300)))
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(FewerError, match="no right to write there"):
        check_outputs(("--out", tmp_path / "a"))


def test_a_report_that_cannot_be_written_is_printed(fewer, model: str, tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fewer_eval.report.write_html", full)
    (tmp_path / "e.jsonl").write_text('{"context": "a b c d e f", "question": "c?", "answer": "d"}\n')
    code, out, err = fewer(
        "compare", "--model", model, "--data", str(tmp_path / "e.jsonl"), "--methods", "knorm", "--keep", "0.5",
        "--samples", "1", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 2 and "knorm" in out and "wrote" not in out
    assert "cannot be written: No space left on device" in " ".join(err.split())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "words", [("methods",), ("methods", "--json"), ("prompt", "t.txt", *PLAIN, "--keep", "0.9")], ids=" ".join
)
def test_standard_output_without_room_or_reader(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "t.txt").write_text("one two three " * 9_000)
    command = [sys.executable, "-c", "from fewer.cli import main; main()", *words]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=tmp_path, check=False)  # noqa: S603
    said = done.stderr.decode()
    assert done.returncode == 1 and said.count("\n") == 1
    assert "standard output cannot be written (No space left on device)" in said
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as gone:  # noqa: S603
        assert gone.stdout is not None and gone.stderr is not None
        gone.stdout.close()
        assert gone.stderr.read() == b"" and gone.wait() == 1
