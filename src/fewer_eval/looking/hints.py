"""Help while the model learns: what each patch shows, what a question wants, and where its answer is."""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from fewer.reference_vlm import VISUAL
from fewer.vision import PATCH
from fewer_eval.looking import stock
from fewer_eval.looking.questions import ORDINALS, PLURALS
from fewer_eval.looking.scenes import SIDE, Box, Scene

MARKS = ("name", "colour", "row", "column", "left name", "left colour", "upper name", "upper colour", "middle")
"""What a patch is asked for: what it shows, where, what stands to the left and above, and whether it is the middle."""
ASKED = ("name", "colour", "row", "column", "what", "image")
"""What the last word of a question is asked for: what the question named, and what it wants to know."""
_WANTED = ("left", "right", "above", "below", "which row", "which column", "what colour", "how many", "more")
LABELS = (
    *("nothing", *map(str, range(10)), *stock.COLOURS, *stock.SHAPES, *stock.THINGS, *stock.WORDS),
    *stock.KINDS,
)
_LABEL = {label: at for at, label in enumerate(LABELS)}


def marks(scene: Scene) -> Int64[Tensor, "p m"]:
    """For each patch the label of every mark, -1 where it is not asked."""
    found = torch.full((VISUAL, len(MARKS)), -1)
    per_row = SIDE // PATCH
    for patch in range(VISUAL):
        x, y = (PATCH * i + PATCH // 2 for i in (patch % per_row, patch // per_row))
        said: dict[str, str] = {}
        here = next((one for one in scene.placed if _inside(x, y, one.box)), None)
        row, column = 1 + y * scene.rows // SIDE, 1 + x * scene.columns // SIDE
        if scene.sort == "grid":
            said |= {"row": str(row), "column": str(column)}
            if scene.at(row, column) is None:
                said["name"] = "nothing"
            if "name" in said or here is not None:
                for side, other in (("left", (row, column - 1)), ("upper", (row - 1, column))):
                    if min(other) >= 1:
                        there = scene.at(*other)
                        said[f"{side} name"] = "nothing" if there is None else there.name
                        if there is not None and there.colour is not None:
                            said[f"{side} colour"] = there.colour
        if here is not None:
            said["name"] = here.name
            if here.colour is not None:
                said["colour"] = here.colour
            if here.sort == "digit":
                said["column"] = str(here.column)
            left, top, right, bottom = here.box
            middle = abs(2 * x - left - right) <= PATCH and abs(2 * y - top - bottom) <= PATCH
            said["middle"] = "1" if middle else "nothing"
        for name, label in said.items():
            found[patch, MARKS.index(name)] = _LABEL[label]
    return found


def names(question: str) -> list[int]:
    """For each of `ASKED` the label of what the question names, -1 where it names none. What is wanted is numbered.

    >>> [LABELS[label] if label >= 0 else None for label in names("what is left of the red star ?")]
    ['star', 'red', None, None, '1', None]
    """
    words = question.split()
    said: dict[str, str] = {}
    for what, word in itertools.pairwise(words):
        if what in ("row", "column") and word.isdigit():
            said[what] = word
    singular = {plural: name for name, plural in PLURALS.items()}
    for word in words:
        if (name := singular.get(word, word)) in (*stock.SHAPES, *stock.THINGS):
            said["name"] = name
        if word in stock.COLOURS:
            said["colour"] = word
        if word in ORDINALS:
            said["image"] = str(1 + ORDINALS.index(word))
    for number, wanted in enumerate(_WANTED, start=1):
        if f" {wanted} " in f" {question} ":
            said["what"] = str(number)
    return [_LABEL[said[what]] if what in said else -1 for what in ASKED]


def region(boxes: Sequence[Box]) -> Bool[Tensor, "p"]:
    """Which patches have their middle inside one of the boxes."""
    at = torch.arange(SIDE // PATCH) * PATCH + PATCH // 2
    inside = torch.zeros(len(at), len(at), dtype=torch.bool)
    for left, top, right, bottom in boxes:
        inside |= ((at >= top) & (at < bottom))[:, None] & ((at >= left) & (at < right))
    return inside.flatten()


def _inside(x: int, y: int, box: Box) -> bool:
    return box[0] <= x < box[2] and box[1] <= y < box[3]
