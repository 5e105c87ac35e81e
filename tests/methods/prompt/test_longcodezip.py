"""LongCodeZip: functions by what they say of the question, blocks at peaks, and code that parses."""

import ast
import inspect
from pathlib import Path

import numpy as np
import pytest

import fewer
from fewer.methods.prompt.longcodezip import LongCodeZip, shares
from fewer.prompts.source import Source
from fewer.score.perplexity import by_line, peaks, perplexities
from fewer.types import Budget, FewerError, MissingSignal, UnknownName
from tests.prompts.programs import PROGRAMS
from tests.readers import bytes_reader, pairs_reader

pytest.importorskip("tree_sitter", reason="pip install 'fewer[code]'")

FRUIT = """\
def plum():
    a = 1
    b = 2
    return plums

def apple():
    c = 1
    d = 2
    return apples

def pear():
    e = 1
    f = 2
    return pears
"""


def test_the_function_that_foresees_the_question_stays() -> None:
    # pie costs 3 nats, but 0.1 after `apples`: apple() helps by e^3 - e^0.1, the others by nothing
    model = pairs_reader({"pie": 3.0, "apples": 4.0}, {("apples", "pie"): 0.1})
    method = LongCodeZip(model=model, language="python")
    done = fewer.compress_prompt(FRUIT, method, tokens=60, question="pie", tokenizer="characters")
    assert done.text.strip() == FRUIT.split("\n\n")[1]
    ranking = method.rank(Source((FRUIT,), "pie"), None)
    assert ranking.chosen is None and not done.notes
    gain = np.exp(3) - np.exp(0.1)
    assert ranking.value.max() == pytest.approx(gain / len("\n\ndef apple():\n    c = 1\n    d = 2\n    return apples"))


def test_no_question_is_said_and_may_be_refused() -> None:
    method = LongCodeZip(model=bytes_reader(), language="python")
    done = fewer.compress_prompt(FRUIT, method, keep=0.5, tokenizer="characters")
    assert done.notes == ("no question was given: the last 10 lines stand for it, as in completion",)
    told = LongCodeZip(model=bytes_reader(), instead="instruction")
    done = fewer.compress_prompt(FRUIT, told, keep=0.5, instruction="Explain apple().", tokenizer="characters")
    assert done.notes == ("no question was given: the instruction stands for it",)
    with pytest.raises(MissingSignal, match="no question and no instruction"):
        fewer.compress_prompt(FRUIT, told, keep=0.5, tokenizer="characters")


def test_lines_are_judged_in_one_pass_as_one_by_one() -> None:
    read = bytes_reader()
    text = "def f(a):\n    b = a\n\n\n    return b  # é\n"
    ids, offsets = read.tokens(text)
    naive, at = [], 0
    for line in text.split("\n"):
        if line.strip():
            start, end = at + len(line) - len(line.lstrip()), at + len(line.rstrip())
            mine = [i for i, (a, b) in enumerate(offsets.tolist()) if a < end and b > start]
            values = read.of_ids([ids[i] for i in mine], [*read.start, *ids[: mine[0]]])
            naive.append(np.log2(np.exp(values.mean())))
        at += len(line) + 1
    np.testing.assert_allclose(by_line(read, text), naive, rtol=1e-5)


def test_perplexity_of_a_question_after_a_text() -> None:
    model = pairs_reader({"a": 1.0, "b": 2.0}, {("b", "a"): 0.5})
    alone, after = perplexities(model, "a b", ["", "a b"])
    assert (alone, after) == (pytest.approx(np.exp(1.5)), pytest.approx(np.exp(1.25)))
    assert perplexities(model, "", ["a"]).tolist() == [1.0]
    read = bytes_reader()
    whole = read.surprise("q?", "x = 1\n\n")[1]
    assert perplexities(read, "q?", ["x = 1"])[0] == pytest.approx(np.exp(whole.mean()), rel=1e-4)


def spikes(values: list[float]) -> list[int]:
    """Lines after which the authors cut, by their rule."""
    above = [value for value in values if value > 0]
    least = float(np.mean(above) + 0.2 * np.std(above)) if len(above) >= 3 else 0.5
    found = []
    for i in range(1, len(values) - 1):
        left, right = values[i] - values[i - 1], values[i] - values[i + 1]
        if (left >= least or right >= least) and left >= 0 and right >= 0:
            found.append(i)
    return found


def test_peaks_are_the_rule_in_plain_python() -> None:
    rng, seen = np.random.default_rng(0), 0
    for n in (0, 1, 2, 3, 5, 40, 200):
        values = rng.exponential(2.0, n) * (rng.random(n) > 0.2)
        assert peaks(values).tolist() == spikes(values.tolist())
        seen += len(peaks(values))
    assert seen > 5


def test_shares_follow_help_and_meet_the_budget() -> None:
    tokens, long = np.array([100.0, 100.0, 900.0, 20.0]), np.array([True, True, True, False])
    # functions are taken while those before them have no more than 55 / 0.5 + 100 tokens: the first, the short one,
    # the second. 55 - 20 are for the two long ones: r = 0.175, times 1.5 and 0.5
    out = shares(np.array([3.0, 1.0, 0.0, 2.0]), tokens, long, 55.0, 0.5, 0.5)
    np.testing.assert_allclose(out, [0.2625, 0.0875, 0.0, 1.0])
    out = shares(np.array([3.0, 1.0, 0.0, 2.0]), tokens, long, 300.0, 0.5, 0.5)
    assert (out * tokens).sum() == pytest.approx(300.0) and out[0] > out[1] > out[2] > 0
    assert shares(np.zeros(4), tokens, long, 2000.0, 0.5, 0.5).tolist() == [1, 1, 1, 1]
    even = shares(np.ones(2), np.array([50.0, 50.0]), np.ones(2, dtype=bool), 50.0, 0.5, 0.5)
    assert even.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", ["bisect", "keyword", "sched"])
def test_the_result_parses_and_keeps_what_was_chosen(name: str) -> None:
    text = (Path(ast.__file__).parent / f"{name}.py").read_text()
    method = LongCodeZip(model=bytes_reader())
    for keep in (0.7, 0.5, 0.3, 0.1):
        done = fewer.compress_prompt(text, method, keep=keep, question="How is an event cancelled?")
        ast.parse(done.text)
        assert done.tokens_after <= (done.limit or 0) and done.verify(text)
        assert fewer.restore(done.text, done.patch()) == text
        assert done.kept_units is not None and (chosen := done.kept_units.ranking.chosen) is not None
        assert (done.kept_units.mask & chosen).any() or not chosen.any()


def test_prose_goes_by_lines_and_says_so() -> None:
    text = "It was a dark night.\nThe rain fell (in torrents.\nExcept at intervals."
    done = fewer.compress_prompt([text, FRUIT], LongCodeZip(model=bytes_reader()), keep=0.5, question="Rain?")
    assert done.notes == ("no grammar reads document 0 without an error: by lines; it may not parse",)
    done = fewer.compress_prompt(text, LongCodeZip(model=bytes_reader()), keep=0.5, question="Rain?")
    assert set(done.text.split("\n")) <= set(text.split("\n"))


def test_languages_by_name() -> None:
    done = fewer.compress_prompt(
        PROGRAMS["go"], LongCodeZip(model=bytes_reader(), language="go"), keep=0.6, question="f?"
    )
    assert done.text.startswith("package p") and not done.notes
    with pytest.raises(UnknownName, match="no grammar"):
        LongCodeZip(model=bytes_reader(), language="cobol").rank(Source((FRUIT,), "q"), Budget.parse(0.5))


def test_settings_that_cannot_be() -> None:
    for wrong, said in (
        ({"fine": 0.0}, r"fine=0\.0"),
        ({"beta": 2.0}, r"beta=2\.0"),
        ({"instead": "begin"}, "choose 'end'"),
    ):
        with pytest.raises(FewerError, match=said):
            made(**wrong)


def made(**settings: object) -> None:
    """As a user makes one: under test a check of types stands before it."""
    method = LongCodeZip()
    for name, value in settings.items():
        object.__setattr__(method, name, value)
    inspect.unwrap(LongCodeZip.__post_init__)(method)
