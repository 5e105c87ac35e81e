"""`fewer prompt` and `fewer restore`: bytes in, bytes out, and what is refused."""

import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fewer as library
from fewer.prompts.html import html_of
from fewer.prompts.settle import Run
from tests.front.test_cli import fewer

__all__ = ["fewer"]

PLAIN = ("--method", "truncation", "--tokenizer", "characters")
SOURCE = "One two three 12 kg.\r\n\r\nNot four, e\u0301tat \U0001f469\u200d\U0001f469 שלום <b>six</b> & so on.\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_bytes(SOURCE.encode())
    return path


def test_the_text_is_the_librarys_byte_for_byte_and_comes_back(fewer, file: Path, tmp_path: Path) -> None:
    patch = tmp_path / "p.json"
    code, out, err = fewer("prompt", str(file), *PLAIN, "--keep", "0.5", "--patch", str(patch))
    done = library.compress_prompt(SOURCE, "truncation", keep=0.5, tokenizer="characters")
    assert code == 0 and out == done.text and len(out) <= 0.5 * len(SOURCE) + 1
    assert f"{done.tokens_before} tokens to {done.tokens_after}" in err and "characters" in err
    short = tmp_path / "short.txt"
    short.write_bytes(out.encode())
    code, out, err = fewer("restore", str(short), "--patch", str(patch))
    assert (code, out.encode(), err) == (0, SOURCE.encode(), "")


def test_standard_input(fewer, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(SOURCE.encode())

    monkeypatch.setattr("sys.stdin", Stdin)
    code, out, _ = fewer("prompt", "-", *PLAIN, "--tokens", "14")
    assert (code, out) == (0, "One two three")


def test_json_is_one_line_and_nothing_else(fewer, file: Path) -> None:
    code, out, err = fewer("prompt", str(file), *PLAIN, "--tokens", "14", "--json")
    said = json.loads(out)
    assert code == 0 and err == "" and out.count("\n") == 1
    assert (said["text"], said["tokens_after"], said["kept"]) == ("One two three", 13, [[0, 0, 13]])


@pytest.mark.parametrize(
    ("flag", "value", "stays"),
    [
        ("--protect", "so on", "so on"),
        ("--protect-regex", r"<b>\w+</b>", "<b>six</b>"),
        ("--protect-class", "numbers", "12 kg"),
    ],
)
def test_what_is_protected_stays(fewer, file: Path, flag: str, value: str, stays: str) -> None:
    words = ("prompt", str(file), *PLAIN, "--tokens", "12")
    assert stays not in fewer(*words)[1]
    code, out, err = fewer(*words, flag, value)
    assert code == 0 and stays in out and "protected: 1 by" in err


def test_documents_from_a_separator_and_from_files(fewer, tmp_path: Path) -> None:
    for name, text in (("one", "alpha beta\n"), ("two", "gamma delta\n"), ("both", "alpha beta\n--\ngamma delta\n")):
        (tmp_path / name).write_bytes(text.encode())
    patch = tmp_path / "p"
    two = ("prompt", str(tmp_path / "one"), str(tmp_path / "two"), *PLAIN, "--keep", "0.9", "--json")
    split = ("prompt", str(tmp_path / "both"), "--documents", "\\n--\\n", *PLAIN, "--keep", "0.9")
    assert {span[0] for span in json.loads(fewer(*two)[1])["kept"]} == {0, 1}
    _, text, _ = fewer(*split, "--patch", str(patch))
    (tmp_path / "short").write_bytes(text.encode())
    assert text == "alpha beta\n\ngamma"
    restore = ("restore", str(tmp_path / "short"), "--patch", str(patch))
    assert fewer(*restore, "--documents", "\\n--\\n")[1] == "alpha beta\n--\ngamma delta\n"
    code, out, err = fewer(*restore)
    assert (code, out) == (2, "") and "the patch holds 2 documents" in " ".join(err.split())


def test_what_is_nowhere_is_said(fewer, file: Path) -> None:
    words = ("prompt", str(file), *PLAIN, "--keep", "0.5")
    for flag in ("--protect", "--protect-regex"):
        assert "protect='zzz' is nowhere in the text" in fewer(*words, flag, "zzz")[2]
    said = "--documents '===' is nowhere in the text"
    assert said in fewer(*words, "--documents", "===")[2]
    assert said in json.loads(fewer(*words, "--documents", "===", "--json")[1])["notes"]
    code, out, _ = fewer(*words, "--documents", "\\r\\n\\r\\n", "--json")
    assert code == 0 and "nowhere" not in str(json.loads(out)["notes"])
    assert {span[0] for key in ("kept", "dropped") for span in json.loads(out)[key]} == {0, 1}


class Page(HTMLParser):
    """What a browser would see of a page: its tags, and the text inside each document."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text, self.dropped, self.lined, self.open = "", "", [], []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not {"src", "href"} & {name for name, _ in attrs} and not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "u" and "section" in self.open:
            self.lined.append((dict(attrs)["title"], ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "section" not in self.open:
            return
        self.text += data
        self.dropped += data if "del" in self.open else ""
        if "u" in self.open:
            self.lined[-1] = (self.lined[-1][0], self.lined[-1][1] + data)


def test_the_page_shows_everything_once_and_runs_nothing(fewer, tmp_path: Path) -> None:
    text = "kept <script>alert(1)</script> \"'& dropped 5 kg then more </section><img src=x onerror=y>"
    (tmp_path / "in").write_text(text)
    page = tmp_path / "out.html"
    words = ("prompt", str(tmp_path / "in"), *PLAIN, "--tokens", "30", "--html", str(page))
    code, out, _ = fewer(*words, "--protect-class", "numbers", "--protect-regex", "<img")
    read = Page(page.read_text(encoding="utf-8"))
    assert code == 0 and read.text == text
    assert not {"script", "img", "a", "link", "iframe"} & read.tags and read.open == []
    assert read.lined == [("numbers", "1"), ("numbers", "5 kg"), ("pattern '<img'", "<img")]
    assert len(read.dropped) >= len(text) - len(out) and "dropped" in read.dropped and "kept" not in read.dropped
    assert f"{len(text)} tokens to {len(out)}" in page.read_text() and "default-src 'none'" in page.read_text()


def test_the_page_of_a_method_that_rewrites() -> None:
    done = library.compress_prompt("one two three", "full", keep=1.0, tokenizer="characters")
    runs = (Run(0, 0, 4), Run(0, 4, 7, "<2>"))
    page = html_of(replace(done, runs=runs, text="one <2>"))
    assert "one <ins>&lt;2&gt;</ins><del>two three</del>" in page


REFUSED = {
    "no such file": (("prompt", "nowhere.txt", "--keep", "0.5"), b"", "nowhere.txt: No such file"),
    "binary": (("prompt", "FILE", "--keep", "0.5"), b"ab\0cd", "there is a zero byte in it (character 2)"),
    "not UTF-8": (("prompt", "FILE", "--keep", "0.5"), b"ok \xff\xfe", "is not UTF-8 text (byte 3)"),
    "empty": (("prompt", "FILE", "--keep", "0.5"), b"", "is empty"),
    "blank": (("prompt", "FILE", "--keep", "0.5"), b" \n\t", "is empty"),
    "bad regex": (("prompt", "FILE", *PLAIN, "--keep", "0.5", "--protect-regex", "(a"), b"abc", "--protect-regex '(a'"),
    "endless regex": (
        ("prompt", "FILE", *PLAIN, "--keep", "0.5", "--protect-regex", r"^(a|aa)+$"), b"a" * 60 + b"b", "backtracks",
    ),
    "class": (("prompt", "FILE", *PLAIN, "--keep", "0.5", "--protect-class", "verbs"), b"abc", "no class 'verbs'"),
    "tokens zero": (("prompt", "FILE", *PLAIN, "--tokens", "0"), b"abc", "--tokens 0 would leave nothing"),
    "keep of two": (("prompt", "FILE", *PLAIN, "--keep", "2"), b"abc", "--keep '2'"),
    "question": (("prompt", "FILE", *PLAIN, "--keep", "1", "--question", ""), b"abc", "--question '' is empty"),
    "instruction": (("prompt", "FILE", *PLAIN, "--keep", "1", "--instruction", " "), b"abc", "--instruction ' ' is"),
    "empty regex": (("prompt", "FILE", *PLAIN, "--keep", "1", "--protect-regex", ""), b"abc", "an empty pattern"),
    "two budgets": (("prompt", "FILE", *PLAIN, "--tokens", "2", "--keep", "1"), b"abc", "give one of them"),
    "no budget": (("prompt", "FILE", *PLAIN), b"abc", "has no threshold of its own"),
    "method": (("prompt", "FILE", "--method", "truncate", "--keep", "0.5"), b"abc", "did you mean truncation"),
    "tokenizer": (
        ("prompt", "FILE", "--method", "truncation", "--keep", "0.5", "--tokenizer", "no/such"), b"abc",
        "there is no tokenizer 'no/such'",
    ),
    "separator": (("prompt", "FILE", *PLAIN, "--keep", "0.5", "--documents", ""), b"abc", "--documents ''"),
    "stdin twice": (("prompt", "-", "-", *PLAIN, "--keep", "0.5"), b"", "standard input can be read once"),
    "protected too long": (
        ("prompt", "FILE", *PLAIN, "--tokens", "3", "--protect", "five words"), b"five words are here",
        "allow at least 10",
    ),
    "nowhere to write": (("prompt", "FILE", *PLAIN, "--tokens", "3", "--html", "no/a"), b"ab cd", "--html no/a"),
    "no patch": (("restore", "FILE", "--patch", "nowhere"), b"ab", "--patch nowhere: No such file"),
    "not a patch": (("restore", "FILE", "--patch", "FILE"), b"ab", "none that fewer made"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(fewer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    words, data, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_bytes(data)
    code, out, err = fewer(*words)
    assert (code, out) == (2, "") and "Traceback" not in err
    assert message in " ".join(err.split())


def test_a_changed_text_or_patch_is_refused(fewer, file: Path, tmp_path: Path) -> None:
    short, patch = tmp_path / "short", tmp_path / "patch"
    short.write_bytes(fewer("prompt", str(file), *PLAIN, "--keep", "0.5", "--patch", str(patch))[1].encode())
    good = short.read_bytes(), patch.read_bytes()
    for path, data in ((short, good[0] + b"."), (patch, good[1].replace(b"six", b"ten"))):
        path.write_bytes(data)
        code, out, err = fewer("restore", str(short), "--patch", str(patch))
        assert (code, out) == (2, "") and "changed" in err
        short.write_bytes(good[0])
        patch.write_bytes(good[1])
    assert fewer("restore", str(short), "--patch", str(patch))[0] == 0


def test_a_fit_is_used_or_refused(fewer, file: Path, tmp_path: Path) -> None:
    asked = ("--tokens", "14", "--question", "What is not four?", "--tokenizer", "characters")
    shipped = str(Path(library.__file__).parent / "data" / "llmlingua2.fit")
    for method, path, why in (
        ("truncation", shipped, "truncation is not fitted to anything"),
        ("provence", shipped, "is a fit of llmlingua2, not of provence"),
        ("provence", str(tmp_path / "none.fit"), "cannot be read"),
        ("provence", None, "has to be fitted"),
    ):
        code, out, err = fewer("prompt", str(file), "--method", method, *asked, *(("--fit", path) if path else ()))
        assert (code, out) == (2, "") and why in " ".join(err.split()), method
