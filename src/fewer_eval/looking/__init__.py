"""Questions about pictures: what a compressor of visual tokens is measured on, made offline and from a seed.

What is asked depends on where and what: names, colours, counts, neighbours, rows and columns in grids, written numbers
and words, and two images compared. The reference model (`fewer.reference_vlm`) was trained on other seeds of the same
tasks: reference model trained for this, not a general one.
"""

import random
from dataclasses import dataclass

from PIL import Image

from fewer_eval.looking import questions
from fewer_eval.looking.questions import Ask, Question
from fewer_eval.looking.scenes import Box, Scene, scene


@dataclass(frozen=True)
class Sample:
    """Images, a question, its answer, and for each image the boxes of pixels that the answer depends on."""

    images: tuple[Image.Image, ...]
    question: str
    answer: str
    boxes: tuple[tuple[Box, ...], ...]


@dataclass(frozen=True)
class Task:
    """What is asked of which sort of scene, and of how many. `split` says how held-out samples differ from training's.

    Tasks of the same sort share their scenes: one seed is one picture, whatever is asked.
    """

    name: str
    sort: str
    ask: Ask
    images: int = 1
    split: str = "other seeds: the same things, arranged anew"

    def __call__(self, seed: int, held_out: bool = True) -> Sample:
        rng = random.Random(f"{self.name}/{'held out' if held_out else 'training'}/{seed}")
        attempt = 0
        while (asked := self.ask(drawn := self.scenes(seed, held_out, attempt), rng)) is None:
            attempt += 1
        return Sample(tuple(one.picture for one in drawn), asked.question, asked.answer, asked.boxes)

    def scenes(self, seed: int, held_out: bool, attempt: int = 0) -> list[Scene]:
        """Two images are this seed's and the next one's."""
        return [scene(self.sort, seed + i, held_out, attempt) for i in range(self.images)]


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cell", "grid", questions.cell),
        Task("beside", "grid", questions.beside),
        Task("colour", "grid", questions.colour),
        Task("row", "grid", questions.row),
        Task("column", "grid", questions.column),
        Task("count", "grid", questions.count),
        Task("number", "page", questions.number, split="other seeds: the same digits and fonts in other places"),
        Task("word", "page", questions.word, split="other seeds: the same words and fonts in other places"),
        Task("kind", "portrait", questions.kind, split="other stamps of the same kinds"),
        Task("cell-of", "grid", questions.cell_of, images=2),
        Task("holds", "grid", questions.holds, images=2),
        Task("more", "grid", questions.more, images=2),
    )
}
"""What can be asked, by name."""
_ABOUT_PLACES = ("cell", "beside", "colour", "row", "column")


def sample(task: str, seed: int, held_out: bool = True) -> Sample:
    """The sample of a seed, the same every time."""
    return TASKS[task](seed, held_out)


def dialogue(seed: int, held_out: bool = True) -> tuple[tuple[Image.Image, ...], list[tuple[str, str]]]:
    """An image and two turns about different regions of it: what the first does not need, the second does."""
    rng = random.Random(f"dialogue/{'held out' if held_out else 'training'}/{seed}")
    drawn = scene("grid", seed, held_out)
    first = questions.cell([drawn], rng)
    while True:
        second = TASKS[rng.choice(_ABOUT_PLACES)].ask([drawn], rng)
        if second is not None and not set(second.boxes[0]) & set(first.boxes[0]):
            return (drawn.picture,), [(one.question, one.answer) for one in (first, second)]


__all__ = ["TASKS", "Question", "Sample", "Task", "dialogue", "sample"]
