"""Source code as units that can be dropped so that the rest still parses: whole lines, each with what it needs.

A statement, with all of its lines, can go from the suite that holds it. What is left of a statement when those inside
it are taken out (the signature, `else`, closing braces) is its frame, and stays or goes in one piece; a statement needs
the frame around it. In Python a suite may not be empty, and in C++ an empty body can be taken for a list of values, so
there a frame needs one statement of each suite, the first that is no docstring. A grammar of tree-sitter says where
statements are. Where two share a line, neither goes without the other.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np
import regex

from fewer.prompts.source import Bools, Ints, Source, Units
from fewer.types import FewerError, UnknownName

LANGUAGES = {
    "python": ("tree_sitter_python", "language"),
    "javascript": ("tree_sitter_javascript", "language"),
    "typescript": ("tree_sitter_typescript", "language_typescript"),
    "tsx": ("tree_sitter_typescript", "language_tsx"),
    "java": ("tree_sitter_java", "language"),
    "go": ("tree_sitter_go", "language"),
    "rust": ("tree_sitter_rust", "language"),
    "c": ("tree_sitter_c", "language"),
    "cpp": ("tree_sitter_cpp", "language"),
}
"""The languages, in the order in which they are tried when none is named."""

_SUITES = {
    "module", "block", "program", "statement_block", "class_body", "interface_body", "object_type", "constructor_body",
    "switch_body", "switch_block", "source_file", "statement_list", "declaration_list", "match_block",
    "field_declaration_list", "translation_unit", "compound_statement", "preproc_if", "preproc_ifdef", "preproc_else",
    "preproc_elif", "preproc_elifdef",
}  # fmt: skip
_CASES = {"switch_case", "switch_default", "case_statement", "switch_block_statement_group"}
_STATEMENT = regex.compile(r"(statement|declaration|comment)$")
_DEFINITION = regex.compile(
    r"(?:export_statement|decorated_definition|template_declaration|.*(?:function|class|method|"
    r"constructor|interface|enum|record|struct|union|impl|trait|mod|namespace|module|type).*_"
    r"(?:definition|declaration|item|specifier))$"
)
_NEVER_EMPTY = {("python", "block"), ("cpp", "compound_statement")}
_LEADS = {"decorator", "attribute_item"}
_STAYS = {"package_clause"}


@dataclass(frozen=True, eq=False)
class Code:
    """Units of whole lines, and how they hang together.

    `needs` `(m, 2)`: the first unit of each pair is nothing without the second, or without all of itself. `part`
    `(n,)`: the number of the function, method or class that a unit is in, the innermost; code that is in none has a
    number a stretch. `frame` `(n,)`: whether the unit belongs to the frame of that definition. `languages`: each
    document's; "" where no grammar could read it without an error, and then each line is a unit that needs none.
    """

    units: Units
    needs: Ints
    part: Ints
    frame: Bools
    languages: tuple[str, ...]

    def text(self, source: Source, units: Ints) -> str:
        """These units' lines, with their indentation; blank lines only between neighbours."""
        pieces = []
        for run in np.split(units, np.flatnonzero(np.diff(units) != 1) + 1):
            whole = source.documents[self.units.document[run[0]]]
            pieces.append(whole[whole.rfind("\n", 0, self.units.start[run[0]]) + 1 : self.units.end[run[-1]]])
        return "\n".join(pieces)

    def lines(self, source: Source, units: Ints) -> Ints:
        """How many lines that are not blank each of these units has."""
        rows = np.stack([self.units.document, self.units.start, self.units.end], 1)[units].tolist()
        found = [
            sum(1 for line in source.documents[i][start:end].split("\n") if line.strip()) for i, start, end in rows
        ]
        return np.array(found, dtype=np.int64)


@dataclass
class _Tree:
    """Statements as they are found: for each its parent and whether it defines something; the owner of each line."""

    owner: list[int]
    parent: list[int] = field(default_factory=lambda: [-1])
    defines: list[bool] = field(default_factory=lambda: [False])
    wants: list[tuple[int, int]] = field(default_factory=list)


def code(source: Source, language: str = "auto") -> Code:
    """The documents as units of code.

    Args:
        language: one of `LANGUAGES`, or "auto" for the first of them that reads a document without an error.

    Raises:
        UnknownName: there is no such language.
        FewerError: tree-sitter, or the language's grammar, is not installed.
    """
    if language != "auto" and language not in LANGUAGES:
        raise UnknownName(f"language={language!r}: there is no grammar for it; known are auto, {', '.join(LANGUAGES)}")
    spans: list[list[tuple[int, int]]] = []
    needs: list[tuple[int, int]] = []
    part: list[int] = []
    frame: list[bool] = []
    languages = []
    for document, text in enumerate(source.documents):
        found, root = _parsed(text, list(LANGUAGES) if language == "auto" else [language])
        languages.append(found)
        base, parts = len(part), max(part, default=-1) + 1
        if root is None:
            lines = [(span.start, span.end) for span in source.lines if span.document == document]
            spans.append(lines)
            part += [parts] * len(lines)
            frame += [False] * len(lines)
            continue
        rows = _rows(text)
        tree = _tree(root, text.encode(), found)
        runs = _runs(tree.owner, rows)
        spans.append([(rows[first][0], rows[last][1]) for first, last in runs])
        mine = [tree.owner[first] for first, _ in runs]
        needs += [(base + a, base + b) for a, b in _edges(tree, mine)]
        needs += [(base + a, base + a) for a in range(len(mine))]  # no statement is cut
        numbered: dict[Any, int] = {}
        stretch = 0
        for owner in mine:
            at = owner
            while at and not tree.defines[at]:
                at = tree.parent[at]
            stretch += bool(at)
            part.append(numbered.setdefault(at or (0, stretch), parts + len(numbered)))
            frame.append(at != 0 and owner == at)
    return Code(
        source.tokens(spans), np.array(needs, dtype=np.int64).reshape(-1, 2), np.array(part, dtype=np.int64),
        np.array(frame, dtype=bool), tuple(languages),
    )  # fmt: skip


def parses(text: str, language: str) -> bool:
    """Whether the language's grammar reads this text without an error."""
    return not _parser(language).parse(text.encode()).root_node.has_error


def _parsed(text: str, languages: list[str]) -> tuple[str, Any]:
    """The first of these languages that reads the text without an error, and its tree; "" and None if none does."""
    data = text.encode()
    for language in languages if text.strip() else ():
        root = _parser(language).parse(data).root_node
        if not root.has_error:
            return language, root
    return "", None


@lru_cache(maxsize=len(LANGUAGES))
def _parser(language: str) -> Any:
    module, function = LANGUAGES[language]
    try:
        from tree_sitter import Language, Parser

        return Parser(Language(getattr(import_module(module), function)()))
    except ImportError as why:
        raise FewerError(
            f"language={language!r}: units of code need tree-sitter and its grammar, and {why.name} is not installed; "
            f"pip install 'fewer[code]'"
        ) from None


def _rows(text: str) -> list[tuple[int, int]]:
    """For each line, where its first character that is no white space stands, and the end of its last."""
    out, at = [], 0
    for line in text.split("\n"):
        out.append((at + len(line) - len(line.lstrip()), at + len(line.rstrip())))
        at += len(line) + 1
    return out


def _runs(owner: list[int], rows: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Stretches of lines of one owner, as first and last; blank lines part none."""
    runs: list[tuple[int, int]] = []
    for row, (start, end) in enumerate(rows):
        if start >= end:
            continue
        if runs and owner[runs[-1][0]] == owner[row]:
            runs[-1] = (runs[-1][0], row)
        else:
            runs.append((row, row))
    return runs


def _edges(tree: _Tree, mine: list[int]) -> Iterator[tuple[int, int]]:
    """What each unit needs, given the statement that each belongs to."""
    of: dict[int, list[int]] = {}
    for unit, owner in enumerate(mine):
        of.setdefault(owner, []).append(unit)
    for owner, units in of.items():
        if len(units) > 1:  # a ring: one piece of a frame needs all others
            yield from zip(units, [*units[1:], units[0]], strict=True)
        above = tree.parent[owner]
        while above > 0 and above not in of:
            above = tree.parent[above]
        if above in of:
            yield units[0], of[above][0]
    yield from ((of[a][0], of[b][0]) for a, b in tree.wants if a in of and b in of)


def _tree(root: Any, data: bytes, language: str) -> _Tree:
    """Every statement that can go, and which lines are whose."""
    starts = [0, *(i + 1 for i, byte in enumerate(data) if byte == 10)]
    tree = _Tree([0] * len(starts))
    todo = [(root, 0)]
    while todo:
        node, owner = todo.pop()
        if node.type not in _SUITES and node.type not in _CASES:
            todo += [(child, owner) for child in node.children if _holds(child)]
            continue
        suite: list[tuple[int, list[Any]]] = []  # of a suite's statements, each one's owner
        for members, first, last in _groups(node, data, starts, language):
            mine = owner
            if _can_go(node, members, data, starts, first, last):
                mine = len(tree.parent)
                tree.parent.append(owner)
                tree.defines.append(any(_DEFINITION.match(member.type) for member in members))
                tree.owner[first : last + 1] = [mine] * (last + 1 - first)
            todo += [(member, mine) for member in members if _holds(member)]
            if any(member.is_named and not member.type.endswith("comment") for member in members):
                suite.append((mine, members))
        if (language, node.type) in _NEVER_EMPTY and suite and all(mine != owner for mine, _ in suite):
            tree.wants.append((owner, next((mine for mine, members in suite if not _docstring(members)), suite[0][0])))
        if language in ("javascript", "typescript", "tsx"):  # would go on with whatever line comes before
            for (before, _), (mine, members) in pairwise(suite):
                if mine != owner != before and data[members[0].start_byte : members[0].start_byte + 1] in b"([`+-*/":
                    tree.wants.append((mine, before))
    return tree


def _groups(node: Any, data: bytes, starts: list[int], language: str) -> Iterator[tuple[list[Any], int, int]]:
    """A node's children, those that share a line or belong to the next together, and their first and last lines."""
    members: list[Any] = []
    first = last = -1
    for child in node.children:
        text = data[child.start_byte : child.end_byte].rstrip()
        if not text:
            continue
        top = bisect_right(starts, child.start_byte) - 1
        if members and top > last and not _leads(members[-1], data, language):
            yield members, first, last
            members = []
        first = first if members else top
        members.append(child)
        last = bisect_right(starts, child.start_byte + len(text) - 1) - 1
    if members:
        yield members, first, last


def _holds(node: Any) -> bool:
    """Whether a line of its own can be in it."""
    return node.start_point[0] < node.end_point[0] or node.type in _SUITES


def _leads(node: Any, data: bytes, language: str) -> bool:
    """Whether it belongs to what follows: an attribute, or in Rust a comment that documents it."""
    said = data[node.start_byte : node.start_byte + 3]
    return node.type in _LEADS or (language == "rust" and node.type.endswith("comment") and said in (b"///", b"/**"))


def _can_go(node: Any, members: list[Any], data: bytes, starts: list[int], first: int, last: int) -> bool:
    """Whether these children of a suite can be left out: they are statements, and alone on their lines."""
    for member in members:
        if not member.is_named and data[member.start_byte : member.end_byte] not in (b";", b","):
            return False
        if member.type in _STAYS or (node.type in _CASES and member.is_named and not _STATEMENT.search(member.type)):
            return False
    end = starts[last + 1] if last + 1 < len(starts) else len(data)
    stands = data[starts[first] : members[0].start_byte] + data[members[-1].end_byte : end]
    before = data[starts[first - 1] : starts[first]] if first else b""
    joined = any(line.rstrip(b"\r\n").endswith(b"\\") for line in (before, data[starts[last] : end]))
    return not stands.strip() and not joined


def _docstring(members: list[Any]) -> bool:
    said = [member for member in members if member.is_named and not member.type.endswith("comment")]
    return len(said) == 1 and [child.type for child in said[0].named_children] == ["string"]
