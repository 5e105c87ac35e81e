"""Questions of scenes: each reads the record, never the picture, and says where the answer stands.

A question is asked only where it has one answer, so an asker may find nothing to ask. Answers are drawn as evenly as
the scene allows: a reader that sees nothing should gain little by knowing the questions.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fewer_eval.looking import stock
from fewer_eval.looking.scenes import Box, Placed, Scene

PLURALS = {name: f"{name}es" if name.endswith("s") else f"{name}s" for name in stock.SHAPES}
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
ORDINALS = ("first", "second")


@dataclass(frozen=True)
class Question:
    """A question, its answer, and for each image the boxes that hold what the answer depends on."""

    question: str
    answer: str
    boxes: tuple[tuple[Box, ...], ...]


Ask = Callable[[Sequence[Scene], random.Random], Question | None]


def cell(scenes: Sequence[Scene], rng: random.Random) -> Question:
    scene = scenes[0]
    row, column = rng.randint(1, scene.rows), rng.randint(1, scene.columns)
    return Question(f"what is in row {row} column {column} ?", _called(scene.at(row, column)), _one(scene, row, column))


def cell_of(scenes: Sequence[Scene], rng: random.Random) -> Question:
    which = rng.randrange(len(scenes))
    asked = cell([scenes[which]], rng)
    question = asked.question.replace(" ?", f" of the {ORDINALS[which]} image ?")
    return Question(question, asked.answer, tuple(asked.boxes[0] if i == which else () for i in range(len(scenes))))


def beside(scenes: Sequence[Scene], rng: random.Random) -> Question | None:
    """The neighbour of a thing that is there once; the neighbour's place is inside the grid and may be empty."""
    scene, found = scenes[0], []
    for one in _single(scene):
        for side, (down, right) in SIDES.items():
            row, column = one.row + down, one.column + right
            if 1 <= row <= scene.rows and 1 <= column <= scene.columns:
                found.append((one, side, row, column))
    if not found:
        return None
    one, side, row, column = rng.choice(found)
    boxes = ((scene.cell(one.row, one.column), scene.cell(row, column)),)
    return Question(f"what is {side} the {one.called} ?", _called(scene.at(row, column)), boxes)


def colour(scenes: Sequence[Scene], rng: random.Random) -> Question | None:
    scene = scenes[0]
    times = Counter(one.name for one in scene.placed)
    found = [one for one in scene.placed if one.sort == "shape" and times[one.name] == 1]
    if not found:
        return None
    one = rng.choice(found)
    assert one.colour is not None
    return Question(f"what colour is the {one.name} ?", one.colour, _one(scene, one.row, one.column))


def row(scenes: Sequence[Scene], rng: random.Random) -> Question | None:
    return _place(scenes[0], "row", rng)


def column(scenes: Sequence[Scene], rng: random.Random) -> Question | None:
    return _place(scenes[0], "column", rng)


def count(scenes: Sequence[Scene], rng: random.Random) -> Question:
    by_number = defaultdict(list)
    for name in stock.SHAPES:
        by_number[_number(scenes[0], name)].append(name)
    number = rng.choice(sorted(by_number))
    name = rng.choice(by_number[number])
    return Question(f"how many {PLURALS[name]} are there ?", str(number), (_of(scenes[0], name),))


def number(scenes: Sequence[Scene], rng: random.Random) -> Question:
    digits = [one for one in scenes[0].placed if one.sort == "digit"]
    written = "".join(one.name for one in digits)
    return Question("what number is written here ?", written, (tuple(one.box for one in digits),))


def word(scenes: Sequence[Scene], rng: random.Random) -> Question:
    written = next(one for one in scenes[0].placed if one.sort == "word")
    return Question("what word is written here ?", written.name, ((written.box,),))


def kind(scenes: Sequence[Scene], rng: random.Random) -> Question:
    only = scenes[0].placed[0]
    return Question("what kind of thing is this ?", only.name, ((only.box,),))


def more(scenes: Sequence[Scene], rng: random.Random) -> Question:
    by_answer = defaultdict(list)
    for name in stock.SHAPES:
        first, second = (_number(scene, name) for scene in scenes)
        if first or second:
            by_answer["equal" if first == second else ORDINALS[second > first]].append(name)
    if not by_answer:
        by_answer["equal"] = list(stock.SHAPES)
    answer = rng.choice(sorted(by_answer))
    name = rng.choice(by_answer[answer])
    return Question(f"which image has more {PLURALS[name]} ?", answer, tuple(_of(scene, name) for scene in scenes))


def holds(scenes: Sequence[Scene], rng: random.Random) -> Question:
    by_answer = defaultdict(list)
    for name in stock.THINGS:
        first, second = (_number(scene, name) > 0 for scene in scenes)
        by_answer[_HOLDS[first, second]].append(name)
    answer = rng.choice(sorted(by_answer))
    name = rng.choice(by_answer[answer])
    return Question(f"which image has a {name} ?", answer, tuple(_of(scene, name) for scene in scenes))


_HOLDS = {(True, True): "both", (True, False): "first", (False, True): "second", (False, False): "neither"}


def _called(there: Placed | None) -> str:
    return "nothing" if there is None else there.called


def _one(scene: Scene, row: int, column: int) -> tuple[tuple[Box, ...], ...]:
    return ((scene.cell(row, column),),)


def _single(scene: Scene) -> list[Placed]:
    times = Counter(one.called for one in scene.placed)
    return [one for one in scene.placed if times[one.called] == 1]


def _place(scene: Scene, what: str, rng: random.Random) -> Question | None:
    if not (found := _single(scene)):
        return None
    one = rng.choice(found)
    answer = one.row if what == "row" else one.column
    return Question(f"which {what} is the {one.called} in ?", str(answer), _one(scene, one.row, one.column))


def _number(scene: Scene, name: str) -> int:
    return sum(one.name == name for one in scene.placed)


def _of(scene: Scene, name: str) -> tuple[Box, ...]:
    return tuple(one.box for one in scene.placed if one.name == name)
