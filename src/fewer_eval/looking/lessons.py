"""Lessons: an image once, many questions behind it, packed so that each sees the image and itself alone.

The image is what costs, so it is shared by a few dozen questions. A mask hides them from each other and their
positions start anew behind the image: every question is learned as if it were the only one. Some are followed by a
second turn, which sees the first. Loss falls on answers; beside them a middle layer is asked what each patch
shows and what each question wants, and two heads are told where to look (`hints`).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fewer.reference_vlm import VISUAL, prompt
from fewer_eval.looking import TASKS
from fewer_eval.looking.hints import LABELS, names, region
from fewer_eval.looking.questions import ORDINALS, PLURALS, Ask, Question
from fewer_eval.looking.scenes import Scene

_WEIGHTS = {"cell": 6, "beside": 6, "colour": 2, "row": 2, "column": 2, "count": 4, "cell-of": 4, "holds": 3, "more": 3}
_SECOND = 0.15
"""Share of the questions about grids that a second turn follows."""


def vocabulary() -> list[str]:
    """Every word of every question and answer, but digits."""
    asked = "what is in row column of the image ? left right above below colour which how many are there number word"
    asked += " written here kind thing this a more has both neither equal"
    words = [*asked.split(), *ORDINALS, *PLURALS.values(), *LABELS]
    return [word for word in dict.fromkeys(words) if not word.isdigit()]


@dataclass(frozen=True)
class Lesson:
    """Tokens of one sequence: which question each belongs to (0: the images), its position, whether it is graded.

    `looks` says of each whether it comes before a word of an answer, and `regions` has the patches which that word
    depends on, for each such token; `asked` has what its question named.
    """

    ids: list[int]
    turn: list[int]
    position: list[int]
    graded: list[bool]
    task: list[int]
    looks: list[bool]
    regions: list[Bool[Tensor, "p"]]
    asked: list[list[int]]
    marks: Int64[Tensor, "p m"]


@dataclass(frozen=True)
class Batch:
    """Lessons side by side, padded on the right; the first `head` tokens of each are the images and their marks.

    `visual` says where the images' tokens go, in the images' order.
    """

    ids: Int64[Tensor, "b n"]
    mask: Bool[Tensor, "b 1 n n"]
    positions: Int64[Tensor, "b n"]
    graded: Bool[Tensor, "b n"]
    task: Int64[Tensor, "b n"]
    visual: Bool[Tensor, "b n"]
    looks: Bool[Tensor, "b n"]
    regions: Bool[Tensor, "g v"]
    asked: Int64[Tensor, "g a"]
    marks: Int64[Tensor, "p m"]
    head: int

    def to(self, device: str) -> "Batch":
        moved = {name: value.to(device) for name, value in vars(self).items() if name != "head"}
        return Batch(**moved, head=self.head)


def questions(scenes: Sequence[Scene], rng: random.Random, many: int) -> list[list[tuple[str, Question]]]:
    """What is asked of these images, with the task's name; each entry has one turn, or two."""
    fitting = {n: task for n, task in TASKS.items() if task.sort == scenes[0].sort and task.images == len(scenes)}
    names = list(fitting)
    if scenes[0].sort != "grid":
        return [[(name, _ask(task.ask, scenes, rng))] for name, task in fitting.items()]
    chosen = rng.choices(names, [_WEIGHTS[name] for name in names], k=many)
    turns = []
    for name in chosen:
        turn = [name] if rng.random() >= _SECOND else [name, rng.choice(names)]
        asked = [(one, fitting[one].ask(scenes, rng)) for one in turn]
        turns.append([(one, question) for one, question in asked if question is not None])
    return [turn for turn in turns if turn]


def lesson(
    asked: Sequence[Sequence[tuple[str, Question]]], marked: Sequence[Int64[Tensor, "p m"]], tokenizer: Any
) -> Lesson:
    """One sequence of images, each with its marks, and of questions."""
    ids: list[int] = []
    image = tokenizer.convert_tokens_to_ids("<image>")
    for token in tokenizer(prompt("", images=len(marked))).input_ids:
        ids += [token] * (VISUAL if token == image else 1)
    head = len(ids)
    turn, position, graded, task = [0] * head, list(range(head)), [False] * head, [-1] * head
    looks, regions, named = [False] * head, [], []
    for number, turns in enumerate(asked, start=1):
        at = head
        for name, question in turns:
            said = tokenizer(question.question, add_special_tokens=False).input_ids
            answer = tokenizer(f" {question.answer}{tokenizer.eos_token}", add_special_tokens=False).input_ids
            ids += said + answer
            new = len(said) + len(answer)
            turn += [number] * new
            position += range(at, at + new)
            graded += [False] * len(said) + [True] * len(answer)
            where = torch.cat([region(boxes) for boxes in question.boxes])
            known = bool(where.any())  # none of what is counted may be there
            looks += [False] * (len(said) - 1) + [known] * (len(answer) - 1) + [False] * 2
            regions += [where] * (known * (len(answer) - 1))
            named += [names(question.question)] * (known * (len(answer) - 1))
            task += [list(TASKS).index(name)] * (new - 1) + [-1]  # that an answer ends is no merit
            at += new
    return Lesson(ids, turn, position, graded, task, looks, regions, named, torch.cat(list(marked)))


def together(lessons: Sequence[Lesson], pad: int, image: int) -> Batch:
    """Pad the lessons to one length; a token sees the images before it and what came before it in its own turns."""
    longest = max(len(one.ids) for one in lessons)

    def padded(name: str, fill: int) -> Tensor:
        return torch.tensor([getattr(one, name) + [fill] * (longest - len(one.ids)) for one in lessons])

    ids, turn = padded("ids", pad), padded("turn", -1)
    same = turn[:, :, None] == turn[:, None, :]  # (b, n, n)
    mask = (same | ((turn == 0)[:, None, :] & (turn >= 0)[:, :, None])) & torch.ones(longest, longest).tril().bool()
    return Batch(
        ids, mask[:, None], padded("position", 0), padded("graded", 0).bool(), padded("task", -1),
        (ids == image) & (turn == 0), padded("looks", 0).bool(),
        torch.stack([where for one in lessons for where in one.regions]),
        torch.tensor([asked for one in lessons for asked in one.asked]),
        torch.cat([one.marks for one in lessons]), lessons[0].turn.count(0),
    )  # fmt: skip


def visual_tokens(
    embedded: Float[Tensor, "b n d"], visual: Bool[Tensor, "b n"], projected: Float[Tensor, "p d"]
) -> Float[Tensor, "b n d"]:
    """The embedded sequence with the images' projected tokens in their places."""
    return embedded.masked_scatter(visual[..., None], projected.to(embedded.dtype))


def _ask(ask: Ask, scenes: Sequence[Scene], rng: random.Random) -> Question:
    asked = ask(scenes, rng)
    assert asked is not None
    return asked
