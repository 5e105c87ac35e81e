"""Two answers side by side, what differs between them marked; and the examples on which a method lost most."""

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

from markupsafe import Markup, escape

from fewer_eval.schema import Lost

CHARACTERS = 300
"""Of each text that is kept of an example; the rest is an ellipsis."""
WORST = 3
"""Examples that are kept for each method and budget."""


def cut(text: str, most: int = CHARACTERS) -> str:
    """The text without white space around it, its end an ellipsis where it has more than `most` characters.

    >>> cut(" four words are here ", most=10)
    'four word…'
    """
    text = text.strip()
    return text if len(text) <= most else text[: most - 1] + "…"


def sides(full: str, said: str) -> tuple[Markup, Markup]:
    """Both answers as HTML: in the full one, what the other lacks in `<del>`; in the other, what is new in `<mark>`.

    >>> sides("the code is 8413", "the code is <8>")
    (Markup('the code is <del>8413</del>'), Markup('the code is <mark>&lt;8&gt;</mark>'))
    """
    old, new = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (full, said))
    left, right = Markup(), Markup()
    for what, i, j, k, m in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        gone, come = escape("".join(old[i:j])), escape("".join(new[k:m]))
        if what != "equal":
            gone = Markup("<del>{}</del>").format(gone) if gone else gone
            come = Markup("<mark>{}</mark>").format(come) if come else come
        left, right = left + gone, right + come
    return left, right


def worst_of(so_far: Iterable[Lost], one: Lost) -> list[Lost]:
    """The examples on which most was lost, at most `WORST`, the worst first; what lost nothing is none of them."""
    found = sorted([*so_far, one], key=lambda example: -example.lost)
    return [example for example in found if example.lost > 0][:WORST]
