"""The front door: what it gives, and what it refuses in one clear sentence."""

import json
import re
import resource
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fewer
from fewer.methods.any.random import Random
from fewer.prompts.front import KEPT
from fewer.prompts.source import Ranking, Source, Units
from fewer.types import Budget, BudgetError, FewerError, UnknownName
from tests.tiny import tiny

TEXT = "One two three. Four five, six! Seven?"


def shorten(prompt: Any = TEXT, method: Any = "random", **options: Any) -> fewer.Compression:
    return fewer.compress_prompt(prompt, method, **{"keep": 0.5, "tokenizer": "characters", **options})


# --- what it gives ---


def test_a_compression_tells_all() -> None:
    done = shorten(method="truncation", tokens=19, keep=None, question="How many?", instruction="Count.")
    assert done.text == "One two three. Four" and (done.tokens_before, done.tokens_after, done.limit) == (37, 19, 19)
    assert (done.method, done.tokenizer, done.share) == ("truncation", "characters", 19 / 37)
    assert done.prompt == "Count.\n\nOne two three. Four\n\nHow many?"
    assert [TEXT[s.start : s.end] for s in done.kept] == ["One two three. Four"]
    assert [TEXT[s.start : s.end] for s in done.dropped] == [" five, six! Seven?"]
    assert [(TEXT[u.start : u.end], u.kept, u.score) for u in done.units[3:6]] == [
        (".", True, -3.0), ("Four", True, -4.0), ("five", False, -5.0),
    ]  # fmt: skip
    assert json.loads(json.dumps(done.to_dict()))["kept"] == [[0, 0, 19]]
    assert str(done).startswith("truncation: 37 tokens to 19 (51.4%), 19 allowed; counted by characters; ")


def test_documents_are_joined_by_blank_lines_that_count() -> None:
    given = ["ab cd", "", "ef gh", " "]
    done = shorten(given, "full")
    assert (done.text, done.tokens_before, done.tokens_after) == ("ab cd\n\nef gh\n\n ", 15, 15)
    done = shorten(given, "truncation", keep=None, tokens=9)
    assert (done.text, done.documents) == ("ab cd\n\nef", ("ab cd", "", "ef", ""))
    assert fewer.restore(done.text, done.patch()) == given


def test_nothing_fits() -> None:
    done = shorten("incomprehensibilities everywhere", keep=None, tokens=4)
    assert (done.text, done.tokens_after, done.kept) == ("", 0, ())
    assert done.notes == ("nothing stayed: every unit takes more than 4 tokens",)
    assert fewer.restore("", done.patch()) == "incomprehensibilities everywhere"


@pytest.mark.parametrize("keep", [1, 1.0, "1.0", "1"])
def test_everything_stays(keep: Any) -> None:
    done = shorten(keep=keep)
    assert (done.text, done.units, done.dropped) == (TEXT, (), ())
    assert shorten(keep=None, tokens=10**9).text == TEXT


def test_full_says_that_it_kept_too_much() -> None:
    done = fewer.compress_prompt(TEXT, "full", keep=0.5, tokenizer="characters")
    assert done.text == TEXT and done.limit == 19 and done.notes == (KEPT,)
    assert shorten(method="full", keep=None, tokens=10**9).limit == 10**9


# --- what it refuses ---

NO_TEXT = {
    "empty": ("", "the prompt is empty"),
    "blanks": ([" ", "\n", ""], "the prompt is empty"),
    "no documents": ([], "the prompt is empty"),
    "half a pair": ("ok \ud83d then", r"document 0 holds half of a surrogate pair at character 3 ('\ud83d')"),
    "half a pair later": (["fine", "x\udc00"], "document 1 holds half of a surrogate pair at character 1"),
}


@pytest.mark.parametrize("case", NO_TEXT)
def test_what_is_no_text(case: str) -> None:
    given, said = NO_TEXT[case]
    with pytest.raises(FewerError, match=re.escape(said)):
        shorten(given)


def test_half_a_pair_in_a_question() -> None:
    for what in ("question", "instruction"):
        with pytest.raises(FewerError, match=f"{what} holds half of a surrogate pair"):
            shorten(**{what: "\ud800"})


WRONG_TYPES = {
    "b'bytes'": "document 0 is bytes, not text",
    "bytearray(b'x')": "document 0 is bytearray, not text",
    "['a', b'b']": "document 1 is bytes, not text",
    "['a', None]": "document 1 is None, not text",
    "None": "the prompt is NoneType",
    "3": "the prompt is int",
    "{'role': 'user'}": "the prompt is dict",
    "[{'role': 'user'}]": "document 0 is dict, not text",
    "'a b', 'random', keep=0.5, question=b'x'": "question is bytes, not text",
    "'a b', fewer.METHODS['random'], keep=0.5": "neither a name nor an object with rank",
    "'a b', 3, keep=0.5": "neither a name nor an object with rank",
    "'a b', 'random', keep=[0.5]": "keep=[0.5] cannot be read",
    "'a b', 'random', keep=True": "keep=True cannot be read",
    "'a b', 'random', tokens='5'": "tokens='5' is no whole number",
    "'a b', 'random', tokens=2.0": "tokens=2.0 is no whole number",
    "'a b', 'random', keep=0.5, tokenizer=5": "tokenizer=5 is neither a name",
    "'a b', Lost(), keep=0.5, tokenizer=len": "Lost: rank() gave NoneType, not a Ranking",
    "'a b', 'random', keep=0.5, tokenizer=len, protect=None": "",
    "'a b', 'random', keep=0.5, tokenizer=len, protect=3": "protect=3 is neither a string",
}


WRONG_CALLS = {
    "done.verify(None)": "verify(): the source holds NoneType, not text",
    "done.verify([5])": "verify(): the source holds int, not text",
    "done.verify(['a', None])": "verify(): the source holds NoneType, not text",
    "done.verify(iter(['a b c']))": "",
    "done.locate(None)": "locate(): the answer is NoneType, not text",
    "many.verify(None)": "verify(): messages is NoneType",
    "many.verify('ab')": "verify(): messages is str",
    "fewer.restore_messages(None, many.patch())": "restore_messages(): messages is NoneType",
    "fewer.restore_messages(chat[0], many.patch())": "restore_messages(): messages is dict",
    "fewer.compress_messages(chat, 'random', keep=0.5, tokenizer=len, question=5)": "compress_messages(): question",
    "fewer.compress_messages(chat, 'random', keep=0.5, tokenizer=len, system=None)": "system=None; give True or False",
    "fewer.compress_messages(chat, 'random', keep=0.5, tokenizer=len, system='yes')": "system='yes'",
    "fewer.METHODS['bm25'](k1='x')": "k1='x' must be a number",
    "fewer.METHODS['bm25'](b=None)": "b=None is not a share",
    "fewer.METHODS['statistical'](shape=None)": "shape=None must be a number",
    "fewer.compress_prompt('a b', fewer.METHODS['random'](seed=-1), keep=0.5, tokenizer=len)": "",
}  # fmt: skip


def test_wrong_types() -> None:
    """In a process of its own: in this one, annotations are checked before fewer can."""
    code = "import fewer, json\nclass Lost:\n    def rank(self, source, budget): return None\nsaid = []\n"
    for call in WRONG_TYPES:
        whole = call if "'random'" in call or "keep" in call else f"{call}, 'random', keep=0.5"
        code += f"try:\n    said.append(fewer.compress_prompt({whole}).text and '')\n"
        code += "except fewer.FewerError as why:\n    said.append(str(why))\n"
    code += "import numpy as np\nchat = [{'role': 'user', 'content': 'a\\n\\nb ' * 9}]\n"
    code += "done = fewer.compress_prompt('a b c', 'random', tokens=np.int64(3), tokenizer=len)\n"
    code += "many = fewer.compress_messages(chat, 'random', keep=0.5, tokenizer=len)\n"
    code += "assert (done.limit, type(done.limit)) == (3, int)\n"
    for call in WRONG_CALLS:
        code += f"try:\n    {call}\n    said.append('')\nexcept fewer.FewerError as why:\n    said.append(str(why))\n"
    code += "try:\n    with fewer.compress(None, fewer.METHODS['truncation']()): pass\n"
    code += "except fewer.FewerError as why:\n    said.append(str(why))\n"
    for call in ("fewer.restore(b'x', '{}')", "fewer.restore('x', b'{}')", "fewer.restore('x', None)"):
        code += f"try:\n    {call}\nexcept fewer.FewerError as why:\n    said.append(str(why))\n"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code + "print(json.dumps(said))"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    expected = WRONG_TYPES | WRONG_CALLS
    assert len(said) == len(expected) + 4
    for call, wanted, found in zip(expected, expected.values(), said, strict=False):
        assert wanted in found and bool(wanted) == bool(found), (call, found)
    assert "compress_prompt" in said[-4]
    assert all("restore(): text and patch are strings" in line for line in said[-3:])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": 0}, "keep=0 would leave nothing"),
        ({"keep": 0.0}, "keep=0.0 is not a fraction"),
        ({"keep": 2}, "keep=2: prompts take the share"),
        ({"keep": 1.5}, "keep=1.5 is not a fraction"),
        ({"keep": -0.5}, "keep=-0.5 is not a fraction"),
        ({"keep": float("nan")}, "keep=nan is not a fraction"),
        ({"keep": "64MB"}, "keep='64MB': prompts take the share"),
        ({"keep": "half"}, "keep='half' cannot be read"),
        ({"keep": None, "tokens": 0}, "tokens=0 would leave nothing"),
        ({"keep": None, "tokens": -3}, "tokens=-3 would leave nothing"),
        ({"keep": None, "tokens": True}, "tokens=True is no whole number"),
        ({"keep": 0.5, "tokens": 5}, "keep=0.5 and tokens=5: give one of them"),
        ({"keep": None}, "random has no threshold of its own: give keep=, or tokens="),
    ],
)
def test_bad_budgets(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(said)):
        shorten(**options)


def test_a_negative_seed_is_a_seed() -> None:
    ours = [fewer.compress_prompt("one two three four", Random(s), keep=0.5, tokenizer=len).text for s in (-1, -1, 2)]
    assert ours[0] == ours[1] != ours[2]


def test_unknown_names() -> None:
    with pytest.raises(UnknownName, match="there is no prompt method 'truncate'; did you mean truncation"):
        shorten(method="truncate")
    with pytest.raises(UnknownName, match="there is no prompt method 'snapkv'"):
        shorten(method="snapkv")
    with pytest.raises(UnknownName, match="known are default, minilm, characters"):
        shorten(tokenizer="gpt-9")


def words(source: Source) -> Ranking:
    return Ranking(source.words, np.arange(len(source.words), dtype=np.float64))


def placed(ranking: Ranking, start: int = 0, end: int = 0, document: int = 0) -> Ranking:
    units = ranking.units
    return replace(ranking, units=Units(units.document + document, units.start + start, units.end + end))


NONSENSE = {
    "too few values": (lambda r: replace(r, value=r.value[1:]), "for value, for 10 units"),
    "values of two axes": (lambda r: replace(r, value=r.value[:, None]), "for value, for 10 units"),
    "nan": (lambda r: replace(r, value=np.where(r.value > 3, np.nan, r.value)), "no finite number"),
    "infinite": (lambda r: replace(r, value=r.value + np.inf), "no finite number"),
    "too few chosen": (lambda r: replace(r, chosen=np.ones(3, dtype=bool)), "for chosen, for 10 units"),
    "order twice": (lambda r: replace(r, order=(0, 0)), "which is not each document once"),
    "order short": (lambda r: replace(r, order=(0,)), "which is not each document once"),
    "backwards": (lambda r: replace(r, units=turned(r.units, slice(None, None, -1))), "not in the order"),
    "overlap": (lambda r: placed(r, end=2), "overlap|outside"),
    "outside": (lambda r: placed(r, end=99), "outside its document"),
    "before it": (lambda r: placed(r, start=-1), "outside its document"),
    "no document": (lambda r: placed(r, document=1), "outside its document"),
    "empty": (lambda r: placed(r, start=3), "empty|outside"),
    "lengths differ": (
        lambda r: replace(r, units=Units(r.units.document, r.units.start, r.units.end[1:])),
        "units.end",
    ),
    "written nowhere": (lambda r: replace(r, written={99: "x"}), "in place of no unit"),
    "half a pair": (lambda r: replace(r, written={0: "\ud800"}), "surrogate"),
    "a cut grapheme": (lambda r: Ranking(Units.made([(0, 0, 13), (1, 0, 4)]), np.zeros(2)), "inside a grapheme"),
}


def turned(units: Units, by: slice) -> Units:
    return Units(units.document[by], units.start[by], units.end[by])


@pytest.mark.parametrize("case", NONSENSE)
def test_a_method_that_talks_nonsense(case: str) -> None:
    changed, said = NONSENSE[case]

    class Talks:
        def rank(self, source: Source, budget: Budget | None) -> Ranking:
            return changed(words(source))

    with pytest.raises(FewerError, match=said) as why:
        shorten(["one two thr e\u0301e\u0301 four five", "six seven eight nine"], Talks())
    assert "Talks" in str(why.value) or case == "a cut grapheme"


def test_what_a_method_asked_for_is_a_budget_in_tokens() -> None:
    seen = []

    class Asks:
        def rank(self, source: Source, budget: Budget | None) -> Ranking:
            seen.append((budget, source.question, source.instruction, source.documents))
            return replace(words(source), chosen=np.ones(len(source.words), dtype=bool))

    shorten("abcdefghij k", Asks(), keep=0.25, question="q")
    shorten("abcdefghij k", Asks(), keep=None, tokens=5, instruction="i")
    assert shorten("abcdefghij k", Asks(), keep=None).text == "abcdefghij k"
    assert seen == [
        (Budget(0.25, tokens=3), "q", "", ("abcdefghij k",)),
        (Budget(5, tokens=5), "", "i", ("abcdefghij k",)),
        (None, "", "", ("abcdefghij k",)),
    ]


def test_the_door_for_models_names_this_one() -> None:
    for name in ("truncation", "bm25"):
        with (
            pytest.raises(UnknownName, match=rf"'{name}' shortens texts.*compress_prompt"),
            fewer.compress(tiny("llama"), name),
        ):
            pass


# --- much of it ---


@pytest.mark.timeout(120)
def test_ten_megabytes() -> None:
    line = "The keeper of the lamp, Ana, wrote 12 pages a day; she did not rest. 東京 e\u0301\n"
    text = line * (10_000_000 // len(line.encode()))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    done = fewer.compress_prompt(text, "random", keep=0.3, tokenizer="characters")
    assert done.tokens_after <= (done.limit or 0) and done.tokens_after > 0.99 * (done.limit or 0)
    assert done.verify(text) and fewer.restore(done.text, done.patch()) == text
    assert time.process_time() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3_000_000, "in KB"


@pytest.mark.parametrize(
    "text", ["a" * 10_000_000, "\u0301" * 2_000_000, "a " * 1_000_000, "東" * 500_000, "\r\n" * 500_000 + "x"]
)
@pytest.mark.timeout(120)
def test_much_of_the_same(text: str) -> None:
    done = fewer.compress_prompt(text, "truncation", keep=0.3, tokenizer="characters")
    assert len(done.text) <= (done.limit or 0) and done.verify(text)
