"""What must stay, whatever a method says: ranges, literal strings, patterns, functions, and classes known by name.

NUMBERS, NEGATIONS, IDENTIFIERS, PATHS, URLS, QUOTES, CODE, KEYS      patterns that most users want, ready made
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from fewer.prompts.source import Protected
from fewer.types import FewerError

SECONDS = 2.0
"""Most time that one pattern may take on one document, for each million characters begun."""

Find = Callable[[str], Iterable[tuple[int, int]]]


@dataclass(frozen=True)
class Rule:
    """A rule for what stays: its name, as reports show it, and a function from a document's text to `(start, end)`.

    `given` is the string or pattern that it looks for, which a note names where it stands nowhere; "" for no note.
    """

    name: str
    find: Find
    given: str = ""


def literal(text: str) -> Rule:
    """Every place where this string stands; places that overlap are one range."""
    if not text:
        raise FewerError("protect='': an empty string protects nothing")
    return Rule(f"literal {text!r}", lambda document: _places(document, text), text)


def pattern(compiled: Any, name: str | None = None) -> Rule:
    """Every match of a regular expression; one that takes more than two seconds on a document is an error, on one of
    more than a million characters as many times two.

    Only `regex` can be stopped, so it reads patterns of `re` too: the same way, but that combining accents are part of
    a word to it.
    """
    source = compiled.pattern
    if not isinstance(source, str):
        raise FewerError(f"protect={compiled!r} is a pattern of bytes; give one of text")
    if not source:
        raise FewerError("protect='': an empty pattern protects nothing")
    try:
        ours = regex.compile(_of_re(compiled), _flags(compiled.flags)) if isinstance(compiled, re.Pattern) else compiled
    except regex.error as why:
        raise FewerError(f"protect={source!r} cannot be read as a regular expression: {why}") from None

    def find(document: str) -> Iterable[tuple[int, int]]:
        seconds = SECONDS * (1 + len(document) // 1_000_000)
        try:
            return [match.span() for match in ours.finditer(document, timeout=seconds)]
        except TimeoutError:
            raise FewerError(
                f"protect={source!r} took more than {seconds:g} s on a document of {len(document):,} characters: it "
                f"backtracks; write it so that it does not"
            ) from None

    return Rule(name or f"pattern {source!r}", find, "" if name else source)


_COMMENT = r"(?P<comment>#[^\n]*)|"
_PART = (
    r"(?P<same>\\N\{[^}]*\}|\\.|\(\?#[^)]*\)|\{(?:\d+(?:,\d*)?|,\d*)\})|"
    r"\[(?P<set>\^?\]?(?:\\.|[^\]\\])*)\]|(?P<brace>\{)"
)


def _of_re(compiled: re.Pattern[str]) -> str:
    """The pattern as `regex` reads it the same way: a brace that counts nothing is a brace there, not a fuzzy match,
    and a bracket in a set is one, not the name of a class."""

    def same(part: re.Match[str]) -> str:
        if part["set"] is not None:
            return "[" + re.sub(r"(?s)(\\.)|\[", lambda each: each[1] or r"\[", part["set"]) + "]"
        return r"\{" if part["brace"] else part[0]

    return re.sub((_COMMENT if compiled.flags & re.X else "") + _PART, same, compiled.pattern, flags=re.S)


def _flags(given: int) -> int:
    """Flags of `re` as those of `regex`, which have other numbers."""
    known = ((re.I, regex.I), (re.M, regex.M), (re.S, regex.S), (re.X, regex.X), (re.A, regex.A))
    return sum(int(ours) for theirs, ours in known if given & theirs)


def _places(document: str, text: str) -> Iterable[tuple[int, int]]:
    at, size = document.find(text), len(text)
    while at >= 0:
        start, after = at, document.find(text, at + 1)
        while 0 <= after < at + size:
            step, at = after - at, after
            tail = text[-step:]  # if it follows, there is a place a step on; to search each would be quadratic in runs
            while document.startswith(tail, at + size):
                at += step
            after = document.find(text, at + 1)
        yield start, at + size
        at = after


def _class(name: str, source: str, flags: int = 0) -> Rule:
    return pattern(regex.compile(source, flags), name)


_UNIT = (
    r"(?:%|‰|°[CF]?|(?:[kMGTµnmc]?(?:g|m|s|W|V|A|Hz|B|iB|b|L|l|J|Pa)|[KMGT]iB|kWh|(?i:percent|per cent|million|billion|"
    r"thousand|trillion|dollars?|euros?|pounds?|years?|months?|weeks?|days?|hours?|minutes?|seconds?|tokens?|bytes?|"
    r"miles?|feet|ft|inch(?:es)?|lbs?|am|pm|a\.m\.|p\.m\.))(?!\w)(?:/\p{L}+)?)"
)
NUMBERS = _class(
    "numbers",
    r"(?:(?<!\w)[+\-−±])?(?:[$€£¥][^\S\r\n]?)?(?<!\w)[vV]?\p{N}(?:[\p{N}.,:/\-]*\p{N})?(?:[eE][+\-]?\d+|(?:st|nd|rd|th|s|x)(?!\w))?"
    rf"(?:[^\S\r\n]?{_UNIT}){{0,2}}",
)
"""Numbers with their signs, currencies and units."""

_WORDS = r"(?:[ \t]+[\w'’\-]+)"
NEGATIONS = _class(
    "negations",
    rf"\b(?:\w+n['’]t|not|no|never|none|nobody|nothing|neither|nor|cannot|without|unless|except|must|shall|should|may|might|can|"
    rf"could|would|will|only)\b(?:[ \t]+(?:be|been|have|not|never|only|to|any|the|a|an)\b)*{_WORDS}?",
    regex.I,
)
"""Negations and modals with the word they modify."""

IDENTIFIERS = _class(
    "identifiers",
    r"\b(?!(?:e\.g|i\.e|a\.m|p\.m|U\.S)\b)(?:[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}|0x[0-9a-fA-F]+|"
    r"[A-Za-z_]\w*(?:(?:\.|::|->)[A-Za-z_]\w*)+(?:\(\))?|[A-Za-z][^\W_]*+_\w+|_\w+|\p{Ll}+\p{Lu}\w*|"
    r"\p{Lu}\p{Ll}+(?:\p{Lu}\p{Ll}+)+|\p{Lu}{2,}\w*|(?=[^\W\d]*+\d)(?=[\d_]*+\p{L})\w{3,}|\p{Lu}+-\d[\w\-]*\b|\w+\(\))",
)
"""UUIDs, hexadecimal numbers, names as code writes them, codes of letters and digits, words in capitals."""

PATHS = _class(
    "paths",
    r"(?<![\w/<:])(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[\w.\-@+]+[/\\])*[\w.\-@+]*[\w\-]|"
    r"(?<![\w./:@\-])[\w\-]+(?:(?:/[\w\-@+]+)*/[\w\-@+]*(?:\.\w+)+|(?:/[\w.\-@+]*\w){2,})",
)
"""Paths of files, absolute and relative; one relative folder with neither a dot nor a second slash is a word."""

URLS = _class(
    "urls",
    r"\b(?:https?|ftp|file|ssh|git)://(?:[^\s<>\"'()\[\]]|\([^\s<>\"'()]*\))*(?:[^\s<>\"'()\[\].,;:!?]|\([^\s<>\"'()]*\))|"
    r"\b[\w+\-][\w.+\-]{0,63}@[\w\-]+(?:\.[\w\-]+)+",
)
"""Addresses of pages and of mail."""

QUOTES = _class("quotes", r"\"[^\"\n]{1,400}\"|“[^”\n]{1,400}”|«[^»\n]{1,400}»|„[^“”\n]{1,400}[“”]|「[^」\n]{1,400}」")
"""What stands in quotation marks on one line, with them."""

CODE = _class(
    "code", r"^[ \t]*(?P<fence>`{3,}+|~{3,}+)[^\n]*\n(?s:.*?)(?:^[ \t]*(?P=fence)[ \t]*\r?$|\Z)|`[^`\n]+`", regex.M
)
"""Code fences, one that is not closed to the end of the text, and code in backquotes."""

KEYS = _class("keys", r"\"(?:[^\"\\\n]|\\.)+\"(?=\s*:)|^[ \t]*(?:-[ \t]+)?[\w.\-]+:(?=[ \t\r]|$)", regex.M)
"""Keys of JSON and YAML."""

CLASSES = {rule.name: rule for rule in (NUMBERS, NEGATIONS, IDENTIFIERS, PATHS, URLS, QUOTES, CODE, KEYS)}


def named(name: str) -> Rule:
    """The class of that name."""
    if name not in CLASSES:
        raise FewerError(f"there is no class {name!r} of things to protect; known are {', '.join(CLASSES)}")
    return CLASSES[name]


def protected(documents: Sequence[str], rules: Any) -> tuple[Protected, ...]:
    """What the rules protect in these documents.

    Args:
        rules: each a string that stays wherever it stands, a compiled pattern, a `Rule` such as `NUMBERS`, a function
            from text to `(start, end)`, a range `(start, end)` of the only document, or `(document, start, end)`. One
            that stands alone need not be in a list.
    """
    found: list[Protected] = []
    for rule in listed(rules):
        if isinstance(rule, (tuple, list)):
            found.append(_range(documents, rule))
            continue
        made = _rule(rule)
        for index, text in enumerate(documents):
            spans = made.find(text)
            if not isinstance(spans, Iterable):
                raise FewerError(f"protect={rule!r} gave {spans!r}; a function gives ranges (start, end), or none: []")
            for span in spans:
                given = (index, *span) if isinstance(span, Sequence) else (span,)
                found.append(_checked(documents, given, made.name, rule))
    return tuple(found)


def idle(rules: Any, found: Sequence[Protected]) -> tuple[str, ...]:
    """A note on each string and pattern that protects nothing: it may be misspelt, or be meant as a class."""
    there = {one.rule for one in found if one.start < one.end}
    notes = []
    for rule in listed(rules):
        made = None if isinstance(rule, (tuple, list)) else _rule(rule)
        if made is not None and made.given and made.name not in there:
            said = made.given
            known = f"; the class is fewer.protect.{said.upper()}, or --protect-class {said}" if said in CLASSES else ""
            notes.append(f"protect={said!r} is nowhere in the text{known}")
    return tuple(notes)


def listed(rules: Any) -> list[Any]:
    """One or many rules as a list; a tuple that begins with a number is a range."""
    if rules is None:
        return []
    alone = not isinstance(rules, Iterable) or isinstance(rules, (str, bytes))
    return [rules] if alone or (isinstance(rules, tuple) and isinstance((*rules, "")[0], int)) else list(rules)


def _rule(rule: Any) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, str):
        return literal(rule)
    if hasattr(rule, "pattern") and hasattr(rule, "finditer"):
        return pattern(rule)
    if callable(rule):
        return Rule(getattr(rule, "__name__", type(rule).__name__), rule)
    raise FewerError(
        f"protect={rule!r} is neither a string, a compiled pattern, a class such as fewer.protect.NUMBERS, a function, "
        f"nor a range"
    )


def _range(documents: Sequence[str], given: Sequence[Any]) -> Protected:
    if len(given) == 2 and len(documents) == 1:
        given = (0, *given)
    if len(given) != 3:
        wanted = "(start, end)" if len(documents) == 1 else "(document, start, end)"
        raise FewerError(f"protect={tuple(given)!r} is no range here: with {len(documents)} documents it is {wanted}")
    return _checked(documents, given, f"range {given[1]}:{given[2]}", tuple(given))


def _checked(documents: Sequence[str], span: Sequence[Any], name: str, rule: Any) -> Protected:
    if not (len(span) == 3 and all(isinstance(part, int) and not isinstance(part, bool) for part in span)):
        raise FewerError(f"protect={rule!r} gave {span!r}; ranges are whole numbers (start, end)")
    document, start, end = span
    if not (0 <= document < len(documents) and 0 <= start <= end <= len(documents[document])):
        raise FewerError(f"protect={rule!r}: there are no characters {start}:{end} in document {document}")
    return Protected(document, start, end, name)
