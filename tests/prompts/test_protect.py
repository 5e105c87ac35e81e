"""What must stay: classes by example, ranges, strings, patterns, functions; and rules that protect nothing."""

import re
import time
from itertools import pairwise
from typing import Any

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

import fewer
from fewer.prompts.protect import CLASSES, NUMBERS, Rule, literal, named, pattern, protected
from fewer.prompts.source import Protected
from fewer.types import FewerError

EXAMPLES = {
    "numbers": [
        ("it costs $1,299.99, or -5 %", ["$1,299.99", "-5 %"]),
        ("12kg at 3.5 GHz and 20°C", ["12kg", "3.5 GHz", "20°C"]),
        ("on 2024-05-01 at 10:30, 5 pm", ["2024-05-01", "10:30", "5 pm"]),
        ("7 million dollars for 40 tons", ["7 million dollars", "40"]),
        ("a 30 km/h zone, 8 GiB, 99.9%", ["30 km/h", "8 GiB", "99.9%"]),
        ("the 3rd of 1e-5 in v1.2.3", ["3rd", "1e-5", "v1.2.3"]),
        ("½ cup, ٣٤, ±2 and €5m", ["½", "٣٤", "±2", "€5m"]),
        ("192.168.0.1, page 7.", ["192.168.0.1", "7"]),
        ("in 10 a day, 4 more", ["10", "4"]),
        ("sha256 x1 none, A-B", []),
        ("pages 3-\n5", ["3", "5"]),
    ],
    "negations": [
        ("You must not be late", ["must not be late"]),
        ("do not run, never ever", ["not run", "never ever"]),
        ("it isn’t true; we can't go", ["isn’t true", "can't go"]),
        ("no refunds without the receipt", ["no refunds", "without the receipt"]),
        ("can only be used once", ["can only be used"]),
        ("Nobody came.", ["Nobody came"]),
        ("I may. You stop", ["may"]),
        ("notable canoe, Mayor Willing", []),
        ("knot and cannon", []),
        ("not\nnext", ["not"]),
    ],
    "identifiers": [
        ("call foo_bar or camelCase or PascalCase", ["foo_bar", "camelCase", "PascalCase"]),
        ("id 550e8400-e29b-41d4-a716-446655440000", ["550e8400-e29b-41d4-a716-446655440000"]),
        ("0xFF os.path.join(x) std::vector a->b f()", ["0xFF", "os.path.join", "std::vector", "a->b", "f()"]),
        ("NASA, HTTP2, sha256, B12x and A-17", ["NASA", "HTTP2", "sha256", "B12x", "A-17"]),
        ("__init__ and _x", ["__init__", "_x"]),
        ("A word, I said, e.g. this, i.e. that", []),
        ("plain words. Then more", []),
    ],
    "paths": [
        ("see /etc/passwd, ~/x.txt and ../up.", ["/etc/passwd", "~/x.txt", "../up"]),
        (r"C:\Users\me and ./a/b", [r"C:\Users\me", "./a/b"]),
        ("src/fewer/x.py lib/y.so", ["src/fewer/x.py", "lib/y.so"]),
        ("in tests/unit/deep now", ["tests/unit/deep"]),
        ("and/or, 1/2, a / b, he/she", []),
        ("https://a.b/c/d and </div>", []),
    ],
    "urls": [
        ("see https://a.b/c?d=1#e, or http://x.y/a_(b).", ["https://a.b/c?d=1#e", "http://x.y/a_(b)"]),
        ("mail me+x@x-y.org. Now", ["me+x@x-y.org"]),
        ("(ftp://h/x) git://h/r.git!", ["ftp://h/x", "git://h/r.git"]),
        ("a@b, http: no, user @name", []),
    ],
    "quotes": [
        ('he said "yes", “no”', ['"yes"', "“no”"]),
        ("«oui» „ja“ 「はい」", ["«oui»", "„ja“", "「はい」"]),
        ("don't 'single' it's", []),
        ('"open\nclose"', []),
        ('""', []),
    ],
    "code": [
        ("use `x=1` here", ["`x=1`"]),
        ("a\n```py\nx = 1\n\ny = 2\n```\nb", ["```py\nx = 1\n\ny = 2\n```"]),
        ("a\r\n~~~\r\nx\r\n~~~\r\nb", ["~~~\r\nx\r\n~~~\r"]),
        ("  ````\n```\n  ````\nrest", ["  ````\n```\n  ````"]),
        ("```\nnever closed", ["```\nnever closed"]),
        ("one ` alone", []),
        ("a `b\nc` d", []),
    ],
    "keys": [
        ('{"a": 1, "b c":2, "d"}', ['"a"', '"b c"']),
        (r'{"a\"b" : [true]}', [r'"a\"b"']),
        ("name: x\n  - key: v\nlast:\n", ["name:", "  - key:", "last:"]),
        ("host.port: 1\r\nx-y: 2", ["host.port:", "x-y:"]),
        ("at 10:30\nhttp://x\nsee: me: now", ["see:"]),
        ('say "a" or: b', []),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "wanted"), [(n, *case) for n, cases in EXAMPLES.items() for case in cases])
def test_classes_by_example(name: str, text: str, wanted: list[str]) -> None:
    assert [text[start:end] for start, end in named(name).find(text)] == wanted


def test_every_class_has_examples_of_both_kinds() -> None:
    assert EXAMPLES.keys() == CLASSES.keys()
    for name, cases in EXAMPLES.items():
        assert any(wanted for _, wanted in cases) and any(not wanted for _, wanted in cases), name
        assert getattr(fewer.protect, name.upper()) is CLASSES[name]


MANY = [
    "a", "w ", '"', "1 ", "1.", "/a", "a_", "a.", "```\n", "a@", "\n - ", "«", "Aa", " be", "(", "-", "A-1", " ", "\n",
    "not ", "a:", "0x", "$1 ", "`", "~",
]  # fmt: skip


@pytest.mark.parametrize("rule", CLASSES)
@pytest.mark.parametrize("many", MANY)
@pytest.mark.timeout(60)
def test_no_text_makes_a_class_backtrack(rule: str, many: str) -> None:
    for before in ("", "not", "http://", "\n"):
        list(CLASSES[rule].find(before + many * (60_000 // len(many))))  # it would raise after two seconds


def test_rules_of_every_kind() -> None:
    texts = ["pay 30 euros to Ana", "Ana, 7:30"]
    rules = [
        "Ana",
        re.compile(r"p\w+"),
        regex.compile("euros"),
        CLASSES["numbers"],
        upper,
        (1, 0, 2),
        Rule("all", whole),
    ]
    assert [tuple(found) for found in protected(texts, rules)] == [
        (0, 16, 19, "literal 'Ana'"),
        (1, 0, 3, "literal 'Ana'"),
        (0, 0, 3, r"pattern 'p\\w+'"),
        (0, 7, 12, "pattern 'euros'"),
        (0, 4, 12, "numbers"),
        (1, 5, 9, "numbers"),
        (0, 16, 17, "upper"),
        (1, 0, 1, "upper"),
        (1, 0, 2, "range 0:2"),
        (0, 0, 19, "all"),
        (1, 0, 9, "all"),
    ]


def upper(text: str) -> list[tuple[int, int]]:
    return [(i, i + 1) for i, letter in enumerate(text) if letter.isupper()]


def whole(text: str) -> list[tuple[int, int]]:
    return [(0, len(text))]


def test_one_rule_alone_need_not_be_in_a_list() -> None:
    assert protected(["ab ab"], "ab") == protected(["ab ab"], ["ab"]) != ()
    assert protected(["a 1"], CLASSES["numbers"]) == protected(["a 1"], [CLASSES["numbers"]]) != ()
    assert protected(["a 1"], (0, 1)) == (Protected(0, 0, 1, "range 0:1"),)
    assert protected(["abab"], literal("ab")) == (
        Protected(0, 0, 2, "literal 'ab'"),
        Protected(0, 2, 4, "literal 'ab'"),
    )
    assert protected(["x"], ()) == protected(["x"], []) == ()


@given(st.text("ab", max_size=25), st.text("ab", min_size=1, max_size=6))
def test_a_string_is_protected_in_all_its_places(text: str, wanted: str) -> None:
    """Those that overlap among them, which are one range."""
    starts = [at for at in range(len(text)) if text.startswith(wanted, at)]
    found = [one[1:3] for one in protected([text], wanted)]
    assert {i for start, end in found for i in range(start, end)} == {i + k for i in starts for k in range(len(wanted))}
    assert all(left[1] <= right[0] for left, right in pairwise(found))
    assert protected(["is ab ab ab ok"], "ab ab") == (Protected(0, 3, 11, "literal 'ab ab'"),)


@pytest.mark.parametrize(("text", "wanted"), [("a" * 10**6, "a" * 10**5), ("ab" * 10**5 + "a" * 10**5, "ab" * 30_000)])
@pytest.mark.timeout(30)
def test_places_that_overlap_take_no_time_that_grows_with_their_square(text: str, wanted: str) -> None:
    assert len(protected([text], wanted)) == 1


@pytest.mark.parametrize(
    ("source", "flags"),
    [
        (r"\bx{d}", 0), (r"x{d}+", 0), (r"{e}", 0), (r"x{e<2}", 0), (r"\\frac{d}{dx}", 0), (r"\{d\}", 0), (r"a{}", 0),
        (r"x{2}", 0), (r"x{2,}", 0), (r"x{,2}", 0), (r"x{,}", 0), (r"y{1,2}{d}", 0), (r"x{1, 2}", 0),
        (r"[[:alpha:]]", 0), (r"[]x]{d}", 0), (r"[^]x]", 0), (r"[\]{d}]", 0), (r"\[{e}", 0), (r"[\[:]", 0),
        (r"\N{LATIN SMALL LETTER X}{d}", 0), (r"(?#[)x{d}", 0), ("x{d} # a [ comment { \n", re.X), ("(?x)x{d} # [", 0),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Possible nested set")
def test_patterns_of_re_find_what_re_finds(source: str, flags: int) -> None:
    text = r"x{d} yx{d} y{2} y{d} a{} {e} x{e<2} \frac{d}{dx} [:alph] a] xxx x{1, 2} # [ { ] x{d} # [ ]x [{e} :{d}"
    made = re.compile(source, flags)
    assert list(pattern(made).find(text)) == [match.span() for match in made.finditer(text)]
    assert made.search(text)


def test_flags_of_patterns_are_kept() -> None:
    assert [p[1:3] for p in protected(["aA\nA"], [re.compile("^a$", re.I | re.M)])] == [(3, 4)]
    assert [p[1:3] for p in protected(["éa"], [re.compile(r"\w+", re.A)])] == [(1, 2)]


@pytest.mark.parametrize("source", [r"(a|a)*$", r"(a|aa)+$", r"((a+)+b)*$|(a|a)+$"])
@pytest.mark.timeout(60)
def test_a_pattern_that_backtracks_ends_in_an_error(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewer.protect, "SECONDS", 0.25)
    with pytest.raises(FewerError, match=r"took more than 0.25 s on a document of 41 characters: it backtracks"):
        protected(["a" * 40 + "!"], [re.compile(source)])


@pytest.mark.timeout(60)
def test_the_pattern_everybody_tries() -> None:
    """(a+)+$ does not run away here: it finds nothing, or is refused in time."""
    start = time.process_time()
    assert protected(["a" * 40 + "!"], [re.compile(r"(a+)+$")]) == ()
    with pytest.raises(FewerError, match=r"took more than 2 s .* backtracks"):
        fewer.compress_prompt("a" * 20_000 + "!", "random", keep=0.5, protect=re.compile(r"(a+)+$"), tokenizer=len)
    assert time.process_time() - start < 8


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("", "an empty string protects nothing"),
        (re.compile(""), "an empty pattern protects nothing"),
        (re.compile(b"x"), "pattern of bytes"),
        (3.5, "neither a string"),
        (None, "neither a string"),
        ((0, 99), "no characters 0:99"),
        ((-1, 2), "no characters -1:2"),
        ((3, 2), "no characters 3:2"),
        ((1, 0, 2), "no characters 0:2 in document 1"),
        ((0, 1, 2, 3), "no range here"),
        ((0.0, 2.0), "whole numbers"),
        ((True, 2), "whole numbers"),
        (("a", "b"), "whole numbers"),
        (lambda text: [(0, 99)], "no characters 0:99"),
        (lambda text: [3], "whole numbers"),
        (lambda text: [(1, 2, 3)], "whole numbers"),
        (lambda text: ["ab"], "whole numbers"),
    ],
)
def test_bad_rules(rule: object, said: str) -> None:
    with pytest.raises(FewerError, match=re.escape(said)):
        protected(["some text"], [rule])


def test_an_unknown_class() -> None:
    with pytest.raises(FewerError, match="known are numbers, negations"):
        named("number")


def test_a_range_needs_its_document_where_there_are_two() -> None:
    with pytest.raises(FewerError, match=re.escape("with 2 documents it is (document, start, end)")):
        protected(["a b", "c d"], [(0, 1)])


def test_a_cut_grapheme_stays_whole() -> None:
    text = "one e\u0301te\u0301 two"
    done = fewer.compress_prompt(text, "random", tokens=2, tokenizer="characters", protect=[(5, 6)])
    assert done.text == "e\u0301"


def test_what_saved_it_is_told() -> None:
    text = "Pay 30 euros. You must not wait. See /etc/x for it, or ask Ana about that."
    rules = [CLASSES["numbers"], CLASSES["negations"], CLASSES["paths"], "Ana"]
    done = fewer.compress_prompt(text, "random", keep=0.65, tokenizer="characters", protect=rules)
    assert {text[u.start : u.end]: u.rule for u in done.units if u.rule} == {
        "30 euros": "numbers", "must not wait": "negations", "/etc/x": "paths", "Ana": "literal 'Ana'",
    }  # fmt: skip
    assert "protected: 1 by numbers, 1 by negations, 1 by paths, 1 by literal 'Ana'" in str(done)


def test_what_protects_nothing_is_said() -> None:
    """A name that is misspelt, or the name of a class where a string is expected."""
    rules = ["Acme", "numbers", re.compile("no such"), NUMBERS]
    notes = (
        "protect='Acme' is nowhere in the text",
        "protect='numbers' is nowhere in the text; the class is fewer.protect.NUMBERS, or --protect-class numbers",
        "protect='no such' is nowhere in the text",
    )
    made = [literal("Acme"), literal("numbers"), pattern(regex.compile("no such")), NUMBERS, upper]
    for given_ in (rules, (rule for rule in rules), made):
        done = fewer.compress_prompt("one 2 three four", "truncation", tokens=9, tokenizer="characters", protect=given_)
        assert done.notes == notes and "2" in done.text


def test_what_matches_nothing_protects_nothing() -> None:
    """An empty match inside a grapheme does not take the grapheme."""
    text = "alpha beta\r\ngamma de\u0301lta\r\nepsilon eta"
    plain = fewer.compress_prompt(text, "truncation", tokens=16, tokenizer="characters")
    done = fewer.compress_prompt(text, "truncation", tokens=16, tokenizer="characters", protect=re.compile("x*"))
    assert done.text == plain.text and not any(unit.rule for unit in done.units)
    assert done.notes == ("protect='x*' is nowhere in the text",)


@pytest.mark.parametrize("gives", [5, None])
def test_a_function_that_gives_no_ranges(gives: Any) -> None:
    with pytest.raises(FewerError, match=rf"gave {gives}; a function gives ranges"):
        fewer.compress_prompt("one two", "truncation", tokens=4, tokenizer="characters", protect=lambda text: gives)
