"""Scenes: what stands where in a picture, as a record that questions are asked of, and the picture itself.

Three sorts, each drawn from a random generator: `grid` (shapes and stamps in cells, some empty), `page` (a number of
two digits and a word) and `portrait` (one stamp of a kind).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

from fewer_eval.looking import stock

SIDE = 224
"""Pixels a side: 16 x 16 patches of DINOv2 ViT-S/14."""
Box = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels; right and bottom lie outside."""


@dataclass(frozen=True)
class Placed:
    """One thing in a picture. `sort` is shape, stamp, digit or word; only shapes have a colour.

    Row and column count from 1: those of the grid, or of the digit in its number.
    """

    sort: str
    name: str
    colour: str | None
    row: int
    column: int
    box: Box

    @property
    def called(self) -> str:
        """
        >>> Placed("shape", "star", "red", 1, 1, (0, 0, 9, 9)).called
        'red star'
        """
        return self.name if self.colour is None else f"{self.colour} {self.name}"


@dataclass(frozen=True)
class Scene:
    """A picture's record: its sort, rows and columns (1 and 1 where there is no grid), and what stands in it."""

    sort: str
    rows: int
    columns: int
    placed: tuple[Placed, ...]
    picture: Image.Image

    def at(self, row: int, column: int) -> Placed | None:
        return next((one for one in self.placed if (one.row, one.column) == (row, column)), None)

    def cell(self, row: int, column: int) -> Box:
        """The box of a cell.

        >>> Scene("grid", 2, 4, (), Image.new("RGB", (224, 224))).cell(2, 1)
        (0, 112, 56, 224)
        """
        xs = [round(SIDE * i / self.columns) for i in (column - 1, column)]
        ys = [round(SIDE * i / self.rows) for i in (row - 1, row)]
        return xs[0], ys[0], xs[1], ys[1]


def grid(rng: random.Random, held_out: bool = False) -> Scene:
    """Two to four rows and columns; a fifth of the cells is empty, and a few names come often, so there is to count.

    `held_out` changes nothing here: training and held-out grids differ by their seeds.
    """
    rows, columns = rng.randint(2, 4), rng.randint(2, 4)
    often = rng.sample(stock.SHAPES, 2)
    picture = _ground(rng)
    empty = Scene("grid", rows, columns, (), picture)
    draw = ImageDraw.Draw(picture)
    panel = tuple(rng.randint(215, 255) for _ in range(3))
    placed = []
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            left, top, right, bottom = empty.cell(row, column)
            draw.rectangle((left + 1, top + 1, right - 2, bottom - 2), fill=panel, outline=(150, 150, 150))
            if rng.random() < 0.2:
                continue
            sort, name, colour = _some(rng, often)
            side = round(min(right - left, bottom - top) * rng.uniform(0.66, 0.9))
            image = stock.shape(name, colour, side) if colour else stock.fitted(stock.stamp(stock.THINGS[name]), side)
            spare_x, spare_y = right - left - 4 - image.width, bottom - top - 4 - image.height
            x, y = left + 2 + rng.randint(0, max(0, spare_x)), top + 2 + rng.randint(0, max(0, spare_y))
            picture.paste(image, (x, y), image)
            placed.append(Placed(sort, name, colour, row, column, (x, y, x + image.width, y + image.height)))
    return Scene("grid", rows, columns, tuple(placed), picture)


def page(rng: random.Random, held_out: bool = False) -> Scene:
    """A number above a word or below it, in sizes, fonts, inks and places that vary."""
    picture = _ground(rng)
    draw = ImageDraw.Draw(picture)
    number, word = str(rng.randint(10, 99)), rng.choice(stock.WORDS)
    placed: list[Placed] = []
    number_first = rng.random() < 0.5
    for text, upper in ((number, number_first), (word, not number_first)):
        font = stock.font(rng.choice(stock.FONTS), rng.randint(64, 92) if text is number else rng.randint(36, 54))
        ink = stock.COLOURS[rng.choice(("red", "green", "blue", "purple", "black"))]
        left, top, right, bottom = (round(value) for value in font.getbbox(text))
        x = rng.randint(4, SIDE - 4 - (right - left)) - left
        y = rng.randint(4, SIDE // 2 - 4 - (bottom - top)) - top + (0 if upper else SIDE // 2)
        draw.text((x, y), text, font=font, fill=ink)
        parts = list(text) if text is number else [text]
        for index, part in enumerate(parts):
            start = x + round(font.getlength("".join(parts[:index])))
            end = x + round(font.getlength("".join(parts[: index + 1])))
            sort = "digit" if text is number else "word"
            placed.append(Placed(sort, part, None, 1, index + 1, (start, y + top, end, y + bottom)))
    return Scene("page", 1, 1, tuple(placed), picture)


def portrait(rng: random.Random, held_out: bool = False) -> Scene:
    """One stamp, large, of a kind drawn first, so that every kind is as frequent; held out are other stamps."""
    picture = _ground(rng)
    kind = rng.choice(list(stock.KINDS))
    image = stock.stamp(rng.choice(stock.of_kind(kind, held_out)))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = stock.fitted(image, rng.randint(110, 210))
    x, y = rng.randint(4, SIDE - 4 - image.width), rng.randint(4, SIDE - 4 - image.height)
    picture.paste(image, (x, y), image)
    only = Placed("stamp", kind, None, 1, 1, (x, y, x + image.width, y + image.height))
    return Scene("portrait", 1, 1, (only,), picture)


SCENES: dict[str, Callable[[random.Random, bool], Scene]] = {"grid": grid, "page": page, "portrait": portrait}


def scene(sort: str, seed: int, held_out: bool, attempt: int = 0) -> Scene:
    """The scene of a seed. Training's and held-out seeds draw from generators that have no seed in common."""
    return SCENES[sort](random.Random(f"{sort}/{'held out' if held_out else 'training'}/{seed}/{attempt}"), held_out)


def _ground(rng: random.Random) -> Image.Image:
    red, green, blue = (rng.randint(225, 255) for _ in range(3))
    return Image.new("RGB", (SIDE, SIDE), (red, green, blue))


def _some(rng: random.Random, often: list[str]) -> tuple[str, str, str | None]:
    draw = rng.random()
    if draw < 0.5:
        return "stamp", rng.choice(list(stock.THINGS)), None
    name = rng.choice(often) if draw < 0.8 else rng.choice(stock.SHAPES)
    return "shape", name, rng.choice(list(stock.COLOURS))
