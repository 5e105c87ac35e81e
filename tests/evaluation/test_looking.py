"""Questions about pictures: answers agree with what was drawn, and seeds draw the same."""

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from fewer.reference_vlm import VISUAL, word_tokenizer
from fewer_eval.looking import TASKS, dialogue, questions, sample, stock
from fewer_eval.looking.hints import LABELS, MARKS, marks
from fewer_eval.looking.lessons import lesson, together, vocabulary
from fewer_eval.looking.lessons import questions as asked_of
from fewer_eval.looking.scenes import SIDE, Scene, scene


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blobs in the stamps' place, each file's its own colour."""
    pytest.importorskip("matplotlib")

    def stamp(file: str) -> Image.Image:
        blob = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
        ink = random.Random(file).choices(range(200), k=3)
        ImageDraw.Draw(blob).ellipse((0, 0, 39, 29), fill=(*ink, 255))
        return blob

    monkeypatch.setattr(stock, "stamp", stamp)
    monkeypatch.setattr(stock, "of_kind", lambda kind, held_out: tuple(f"{kind}/{held_out}/{i}" for i in range(3)))


def table(one: Scene) -> dict[tuple[int, int], str]:
    """What each cell holds, by its place, found from the boxes alone."""
    found = {(r, c): "nothing" for r in range(1, one.rows + 1) for c in range(1, one.columns + 1)}
    for thing in one.placed:
        x, y = (thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2
        name = thing.name if thing.colour is None else f"{thing.colour} {thing.name}"
        found[1 + int(y / (SIDE / one.rows)), 1 + int(x / (SIDE / one.columns))] = name
    return found


def naive(question: str, drawn: list[Scene]) -> str:
    """The answer by looking every cell up, whatever the question maker did."""
    cells = [table(one) for one in drawn]
    if found := re.fullmatch(r"what is in row (\d) column (\d)(?: of the (\w+) image)? \?", question):
        which = 1 if found[3] == "second" else 0
        return cells[which][int(found[1]), int(found[2])]
    if found := re.fullmatch(r"what is (left of|right of|above|below) the (.+) \?", question):
        ((row, column),) = [at for at, name in cells[0].items() if name == found[2]]
        down, right = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}[found[1]]
        return cells[0][row + down, column + right]
    if found := re.fullmatch(r"what colour is the (\w+) \?", question):
        ((colour, _),) = [name.split() for name in cells[0].values() if name.endswith(f" {found[1]}")]
        return colour
    if found := re.fullmatch(r"which (row|column) is the (.+) in \?", question):
        ((row, column),) = [at for at, name in cells[0].items() if name == found[2]]
        return str(row if found[1] == "row" else column)
    if found := re.fullmatch(r"(?:how many|which image has more) (\w+?)e?s (?:are there )?\?", question):
        shape = next(name for name in stock.SHAPES if found[0].split(" ?")[0].replace(" are there", "").split()[-1]
                     in (f"{name}s", f"{name}es"))  # fmt: skip
        counts = [sum(name.endswith(f" {shape}") for name in one.values()) for one in cells]
        if len(counts) == 1:
            return str(counts[0])
        return "equal" if counts[0] == counts[1] else "first" if counts[0] > counts[1] else "second"
    if found := re.fullmatch(r"which image has a (\w+) \?", question):
        there = [found[1] in one.values() for one in cells]
        return "both" if all(there) else "neither" if not any(there) else "first" if there[0] else "second"
    raise AssertionError(question)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.sort == "grid"])
def test_answers_agree_with_a_naive_reading_of_the_grid(name: str) -> None:
    task, rng, answers = TASKS[name], random.Random(0), []
    for seed in range(60):
        drawn = task.scenes(seed, held_out=True)
        if (asked := task.ask(drawn, rng)) is not None:
            assert naive(asked.question, drawn) == asked.answer
            answers.append(asked.answer)
            assert len(asked.boxes) == len(drawn)
    assert len(answers) > 40 and len(set(answers)) > 2


def test_the_naive_reading_notices_a_wrong_answer() -> None:
    drawn = scene("grid", 1, True)
    moved = replace(drawn, placed=tuple(replace(one, column=one.column % drawn.columns + 1) for one in drawn.placed))
    rng, wrong = random.Random(0), 0
    for _ in range(20):
        asked = questions.cell([moved], rng)
        wrong += naive(asked.question, [moved]) != asked.answer
    assert wrong > 5


def test_shapes_stand_where_the_record_says_in_the_colour_it_says() -> None:
    for seed in range(12):
        drawn = scene("grid", seed, False)
        for one in drawn.placed:
            left, top, right, bottom = one.box
            cell = drawn.cell(one.row, one.column)
            assert cell[0] <= left < right <= cell[2] and cell[1] <= top < bottom <= cell[3]
            if one.colour is not None:
                ink: Any = drawn.picture.getpixel(((left + right) // 2, (top + bottom) // 2))
                assert max(abs(a - b) for a, b in zip(ink, stock.COLOURS[one.colour], strict=True)) < 12


@pytest.mark.parametrize("name", TASKS)
def test_seeds_reproduce_and_held_out_ones_differ(name: str) -> None:
    assert sample(name, 3) == sample(name, 3) != sample(name, 4)
    assert sample(name, 3).images != sample(name, 3, held_out=False).images
    known = set(vocabulary())
    for seed in range(8):
        one = sample(name, seed)
        assert all(word in known or word.isdigit() for word in f"{one.question} {one.answer}".split())
        assert len(one.images) == len(one.boxes) == TASKS[name].images
        assert all(picture.size == (SIDE, SIDE) for picture in one.images)
        for box in (box for boxes in one.boxes for box in boxes):
            assert 0 <= box[0] < box[2] <= SIDE and 0 <= box[1] < box[3] <= SIDE


def test_stamps_of_a_kind_are_held_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.undo()
    for name in ("a", "b", "c", "d", "e", "f_mirror"):
        (tmp_path / "food" / "fruit").mkdir(parents=True, exist_ok=True)
        (tmp_path / "food" / "fruit" / f"{name}.png").touch()
    monkeypatch.setattr(stock, "fetched", lambda: tmp_path)
    stock.of_kind.cache_clear()
    held, others = stock.of_kind("food", True), stock.of_kind("food", False)
    stock.of_kind.cache_clear()
    assert held == ("food/fruit/b",)
    assert others == tuple(f"food/fruit/{name}" for name in "acde")


def test_numbers_and_words_are_read_off_the_record() -> None:
    for seed in range(10):
        drawn = scene("page", seed, True)
        number, word = (sample(name, seed) for name in ("number", "word"))
        assert number.images == word.images == (drawn.picture,)
        in_order = sorted((one for one in drawn.placed if one.sort == "digit"), key=lambda one: one.box[0])
        assert "".join(one.name for one in in_order) == number.answer
        assert word.answer in stock.WORDS
        assert all(b[3] <= SIDE // 2 or b[1] >= SIDE // 2 for b in (*number.boxes[0], *word.boxes[0]))


def test_two_turns_are_about_different_places() -> None:
    for seed in range(5):
        images, turns = dialogue(seed)
        assert dialogue(seed) == (images, turns)
        assert len(images) == 1 and len(turns) == 2 and turns[0][0] != turns[1][0]


def lessons() -> Iterator[tuple[Any, Any, Any]]:
    tokenizer, rng = word_tokenizer(vocabulary()), random.Random(1)
    for sorts in (["grid"], ["page"], ["portrait"], ["grid", "grid"]):
        drawn = [scene(sort, seed, False) for seed, sort in enumerate(sorts)]
        asked = asked_of(drawn, rng, 6)
        yield tokenizer, asked, lesson(asked, [marks(one) for one in drawn], tokenizer)


def test_a_lesson_grades_the_answers_alone_and_hides_questions_from_each_other() -> None:
    for tokenizer, asked, one in lessons():
        assert tokenizer.unk_token_id not in one.ids
        graded = [id for id, is_graded in zip(one.ids, one.graded, strict=True) if is_graded]
        said = [question.answer for turns in asked for _, question in turns]
        assert tokenizer.decode(graded) == "".join(f"{answer} </s> " for answer in said).strip()
        batch = together([one, one], tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<image>"))
        turn = torch.tensor(one.turn)
        sees = batch.mask[0, 0]
        for at in range(batch.head, len(turn), 7):
            expected = (turn == 0) | ((turn == turn[at]) & (torch.arange(len(turn)) <= at))
            assert torch.equal(sees[at], expected)
        starts = [at for at in range(batch.head, len(turn)) if turn[at] != turn[at - 1]]
        assert {one.position[at] for at in starts} == {batch.head}
        assert batch.visual.sum() == len(batch.marks) and len(batch.marks) % VISUAL == 0


def test_marks_say_what_a_patch_shows() -> None:
    drawn = scene("grid", 2, False)
    found = marks(drawn)
    for one in drawn.placed:
        x, y = (one.box[0] + one.box[2]) // 2, (one.box[1] + one.box[3]) // 2
        patch = found[y // 14 * 16 + x // 14].tolist()
        said = {mark: LABELS[label] for mark, label in zip(MARKS, patch, strict=True) if label >= 0}
        assert (said["name"], said["row"], said["column"]) == (one.name, str(one.row), str(one.column))
        if one.column > 1:
            there = drawn.at(one.row, one.column - 1)
            assert said["left name"] == ("nothing" if there is None else there.name)
