"""Code that loses statements still parses: one file line by line, every language, and the standard library."""

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fewer
from fewer.prompts.code import LANGUAGES, code, parses
from fewer.prompts.counting import Counter
from fewer.prompts.needs import closed, pulling
from fewer.prompts.settle import settle, text_of
from fewer.prompts.source import Protected, Ranking, Source
from fewer.types import FewerError, UnknownName
from tests.prompts.programs import PROGRAMS, PYTHON

pytest.importorskip("tree_sitter", reason="pip install 'fewer[code]'")

KEEPS = (0.7, 0.5, 0.3, 0.1)
LIBRARY = Path(ast.__file__).parent


def lines_of(units: list[int], text: str = PYTHON) -> list[str]:
    """The first line of each of these units."""
    spans = list(code(Source((text,)), "python").units)
    return [text[spans[unit].start : spans[unit].end].split("\n")[0] for unit in units]


def test_units_are_statements_and_frames() -> None:
    found = code(Source((PYTHON,)), "python")
    assert lines_of(list(range(len(found.units)))) == [
        "import os", "def first(a):", '"""Says nothing."""', "# why", "if a:", "b = 1; c = 2", "else:", "d(",
        "return a", "class Second:", "x = 1", "def third(self): return 4",
    ]  # fmt: skip
    assert found.part.tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3]
    assert [lines_of([unit])[0] for unit in np.flatnonzero(found.frame)] == [
        "def first(a):", "class Second:", "def third(self): return 4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("unit", "needed"),
    [
        ("import os", []),
        ("return a", ["def first(a):", "if a:", "b = 1; c = 2", "else:", "d("]),  # a suite needs its first statement
        ("d(", ["def first(a):", "if a:", "b = 1; c = 2", "else:"]),
        ("x = 1", ["class Second:"]),
        ("def third(self): return 4", ["class Second:", "x = 1"]),
    ],
)
def test_what_a_statement_needs(unit: str, needed: list[str]) -> None:
    found = code(Source((PYTHON,)), "python")
    n = len(found.units)
    mask = np.array([first == unit for first in lines_of(list(range(n)))])
    assert lines_of(np.flatnonzero(closed(mask, pulling(found.needs, n)) & ~mask).tolist()) == needed


def outputs(text: str, language: str, seed: int = 0, protected: tuple[Protected, ...] = ()) -> list[str]:
    """The text at each share, by random values."""
    source = Source((text,), protected=protected, counter=Counter("characters", len))
    found = code(source, language)
    assert found.languages == (language,)
    out = []
    for keep in KEEPS:
        value = np.random.default_rng(seed).random(len(found.units))
        done = settle(source, Ranking(found.units, value, needs=found.needs), int(keep * len(text)) + 1, "")
        out.append(text_of(source.documents, done.runs, ""))
        assert len(out[-1]) <= keep * len(text) + 1
    return out


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_still_parses(language: str) -> None:
    text = PROGRAMS[language]
    assert parses(text, language)
    seen = set()
    for seed in range(25):
        for out in outputs(text, language, seed):
            assert parses(out, language), out
            seen.add(out)
    assert len(seen) > 8
    lines = text.split("\n")
    broken = ["\n".join(lines[:i] + lines[i + 1 :]) for i in range(len(lines))]
    assert not all(parses(one, language) for one in broken), "dropping any line would do, so this test says nothing"


def test_the_standard_library_still_parses() -> None:
    names = sorted(path for path in LIBRARY.glob("*.py") if 2000 < path.stat().st_size < 60000)[::4]
    assert len(names) > 20
    for path in names:
        text = path.read_bytes().decode()
        for out in outputs(text, "python"):
            ast.parse(out)


@pytest.mark.parametrize("word", ["self", "return", '"""', "=", "(", "\n\n", "    "])
def test_protection_does_not_break_it(word: str) -> None:
    text = Path(LIBRARY / "bisect.py").read_text()
    at = [i for i in range(len(text)) if text.startswith(word, i)][::7]
    spans = tuple(Protected(0, i, i + len(word), "w") for i in at)
    source = Source((text,), protected=spans, counter=Counter("characters", len))
    found = code(source, "python")
    done = settle(
        source, Ranking(found.units, np.zeros(len(found.units)), chosen=None, needs=found.needs), len(text), ""
    )
    for limit in (done.tokens, len(text)):
        done = settle(source, Ranking(found.units, np.zeros(len(found.units)), needs=found.needs), limit, "")
        out = text_of(source.documents, done.runs, "")
        ast.parse(out)
        assert out.count(word) >= len(at)


@pytest.mark.parametrize(
    "text",
    [
        "if a:\n\tb\n\tc\nelse:\n\td\n\te\n",
        "class A:\r\n    x = 1\r\n    y = 2\r\n",
        "a = 1 + \\\n    2\nb; \\\nc\nd\n",
        "s = '''\n    a\n  b'''\nt = (1,\n2); u = 3\n",
        "if a: b\nelif c:\n    # only\n    d\n    # a comment\n",
        "x = 1\n\x0cy = 2",
        "def f():\n    'é👩\u200d👩\u200d👧'\n    return 'ü'\n",
        "for a in b:\n    for c in d:\n        e\n    else:\n        f\n",
    ],
)
def test_odd_python(text: str) -> None:
    ast.parse(text)
    for seed in range(30):
        for out in outputs(text, "python", seed):
            ast.parse(out)


def test_what_does_not_parse_goes_by_lines() -> None:
    found = code(Source(("def f(:\n  x\n", PYTHON)), "python")
    assert found.languages == ("", "python") and len(found.units.of(0 + 0).indices(99)) == 3
    assert found.units.of(0) == slice(0, 2) and found.needs.min() >= 2
    assert code(Source(("It was a dark and stormy night.",))).languages == ("",)


def test_auto_takes_the_first_that_reads_it() -> None:
    for language in ("python", "javascript", "java", "go", "rust", "tsx"):
        assert code(Source((PROGRAMS[language],))).languages == (language,)


def test_text_has_its_indentation() -> None:
    source = Source((PYTHON,))
    found = code(source, "python")
    assert found.text(source, np.array([5, 8])) == "        b = 1; c = 2\n    return a"
    assert found.lines(source, np.arange(len(found.units))).tolist() == [1, 1, 1, 1, 1, 1, 1, 3, 1, 1, 1, 1]


def test_errors_name_what_would_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match=r"language='cobol'.*known are auto, python"):
        code(Source(("x",)), "cobol")
    monkeypatch.setitem(LANGUAGES, "python", ("tree_sitter_nowhere", "language"))
    from fewer.prompts import code as module

    module._parser.cache_clear()
    with pytest.raises(FewerError, match=r"tree_sitter_nowhere is not installed; pip install 'fewer\[code\]'"):
        code(Source(("x",)), "python")
    module._parser.cache_clear()


def test_a_patch_gives_the_code_back() -> None:
    class ByLength:
        def rank(self, source: Source, budget: Any) -> Ranking:
            found = code(source, "python")
            return Ranking(found.units, (found.units.start - found.units.end).astype(np.float64), needs=found.needs)

    done = fewer.compress_prompt(PYTHON, ByLength(), keep=0.5, tokenizer="characters")
    ast.parse(done.text)
    assert done.verify(PYTHON) and fewer.restore(done.text, done.patch()) == PYTHON
