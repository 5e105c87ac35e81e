"""What is drawn: shapes, colours, stamps by name and by kind, digits and words in the fonts that matplotlib brings."""

import functools
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fewer_eval.pictures import STAMPS, fetch_debian

COLOURS = {
    "red": (214, 39, 40), "green": (40, 150, 60), "blue": (40, 90, 205),
    "yellow": (240, 200, 30), "purple": (145, 60, 175), "black": (30, 30, 30),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
THINGS = {
    "dog": "animals/mammals/dogs/dog", "elephant": "animals/mammals/elephant", "zebra": "animals/mammals/equines/zebra",
    "penguin": "animals/birds/penguin", "fish": "animals/fish/clownfish", "duck": "household/rubberduck",
    "butterfly": "animals/insects/cartoon/butterfly", "banana": "food/fruit/cartoon/banana",
    "pineapple": "food/fruit/pineapple", "bus": "vehicles/masstransit/cartoon/double_decker_bus",
    "car": "vehicles/auto/sedan", "guitar": "hobbies/music/string/guitar_classical", "cup": "household/dishes/mug",
    "rose": "plants/flowers/rose", "tree": "seasonal/christmas/tree", "hat": "clothes/hats/tophat",
}  # fmt: skip
"""One stamp for each name: easy to tell apart, and the same in training and held out, only arranged anew."""
KINDS = {
    "animal": "animals", "food": "food", "flower": "plants/flowers", "building": "town/houses", "vehicle": "vehicles",
    "sign": "town/roadsigns", "clothing": "clothes", "instrument": "hobbies/music", "tool": "household/tools",
    "planet": "space/planets",
}  # fmt: skip
WORDS = (
    *("lamp", "ship", "moon", "bread", "chair", "river", "cloud", "stone"),
    *("milk", "horn", "glove", "piano", "knife", "tiger", "queen", "wheat"),
)
FONTS = ("DejaVuSans-Bold", "DejaVuSans", "DejaVuSerif-Bold", "DejaVuSerif", "DejaVuSansMono-Bold")


@functools.cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of `FONTS`, from matplotlib's own folder, so that every machine draws the same."""
    import matplotlib  # an extra, and slow

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


@functools.cache
def stamp(file: str) -> Image.Image:
    """A stamp with its transparency, cut to what is visible."""
    with Image.open(fetched() / f"{file}.png") as picture:
        cut = picture.convert("RGBA")
    return cut.crop(cut.getchannel("A").getbbox())


@functools.cache
def fetched() -> Path:
    return fetch_debian(STAMPS)


@functools.cache
def of_kind(kind: str, held_out: bool) -> tuple[str, ...]:
    """The stamps of a kind that are held out, every fourth by name, or those that are not."""
    root = fetched()
    names = sorted(path.relative_to(root).with_suffix("").as_posix() for path in (root / KINDS[kind]).rglob("*.png"))
    plain = [name for name in names if not name.endswith(("_mirror", "_flip"))]
    return tuple(name for index, name in enumerate(plain) if (index % 4 == 1) == held_out)


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture scaled so that its longer side is `side`."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)


def shape(name: str, colour: str, side: int) -> Image.Image:
    """A drawn shape, drawn four times as large and scaled down so that its edges are smooth."""
    large = 4 * side
    drawn = Image.new("RGBA", (large, large), (0, 0, 0, 0))
    _DRAW[name](ImageDraw.Draw(drawn), large, COLOURS[colour])
    return drawn.resize((side, side), Image.Resampling.BICUBIC)


_Ink = tuple[int, int, int]
_STAR = [
    *((0.5, 0.0), (0.62, 0.35), (0.98, 0.35), (0.69, 0.57), (0.79, 0.91)),
    *((0.5, 0.7), (0.21, 0.91), (0.31, 0.57), (0.02, 0.35), (0.38, 0.35)),
]
_CROSS = [
    *((0.34, 0), (0.66, 0), (0.66, 0.34), (1, 0.34), (1, 0.66), (0.66, 0.66)),
    *((0.66, 1), (0.34, 1), (0.34, 0.66), (0, 0.66), (0, 0.34), (0.34, 0.34)),
]


def _polygon(points: list[tuple[float, float]]) -> Callable[[ImageDraw.ImageDraw, int, _Ink], None]:
    return lambda draw, side, ink: draw.polygon([(x * side, y * side) for x, y in points], fill=ink)


_DRAW: dict[str, Callable[[ImageDraw.ImageDraw, int, _Ink], None]] = {
    "circle": lambda draw, side, ink: draw.ellipse((0, 0, side - 1, side - 1), fill=ink),
    "square": _polygon([(0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)]),
    "triangle": _polygon([(0.5, 0), (1, 0.95), (0, 0.95)]),
    "star": _polygon(_STAR),
    "cross": _polygon([(float(x), float(y)) for x, y in _CROSS]),
    "diamond": _polygon([(0.5, 0), (0.9, 0.5), (0.5, 1), (0.1, 0.5)]),
}
