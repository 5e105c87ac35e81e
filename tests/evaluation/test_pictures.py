"""Pictures are the pinned ones or none, whole, and what they are said to be."""

import gzip
import shutil
import struct
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewer.models import ModelUnavailable
from fewer.types import UnknownName
from fewer_eval import pictures
from fewer_eval.pictures import DataUnavailable, Debian, fashion, fetch_debian, photographs, stamps

FILES = {"cats/cat.png": b"a cat", "cats/big/lion.png": b"a lion", "cats/cat.txt": b"not asked for"}
# What `sha256sum cats/big/lion.png cats/cat.png | sha256sum` prints.
DIGEST = "122a93cedbaffa646401b8c129447615ad6d58209a0c9b0f603a2663f223bcef"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Debian:
    """A small Debian package, a script in apt-get's place that finds it and nothing else, and an empty cache folder."""
    if (builder := shutil.which("dpkg-deb")) is None:
        pytest.skip("there is no dpkg-deb here")
    tree = tmp_path / "tree"
    for name, content in FILES.items():
        (tree / "usr/share/fake" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "usr/share/fake" / name).write_bytes(content)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(
        "Package: fake\nVersion: 1:2.0-1\nArchitecture: all\nMaintainer: Nobody <n@example.org>\nDescription: fake\n"
    )
    archive = tmp_path / "fake_1%3a2.0-1_all.deb"
    subprocess.run([builder, "--build", tree, archive], check=True, capture_output=True)  # noqa: S603  # our own tree
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apt-get").write_text(
        f'#!/bin/sh\n[ "$*" = "--quiet download fake" ] && exec cp "{archive}" .\n'
        'echo "W: a warning" >&2\necho "E: Unable to locate package $3" >&2\nexit 100\n'
    )
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path / "cache"))
    return Debian("fake", "usr/share/fake", ("cats/**/*.png", "cats/*.png"), DIGEST)


def cached(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_the_pinned_files_alone_are_kept(fake: Debian, tmp_path: Path) -> None:
    said: list[str] = []
    folder = fetch_debian(fake, said.append)
    assert sorted(cached(tmp_path)) == [folder / "cats/big/lion.png", folder / "cats/cat.png"]
    assert (folder / "cats/big/lion.png").read_bytes() == b"a lion"
    assert said == ["downloading fake with apt, once"]


def test_files_are_fetched_once_and_again_when_one_was_damaged(fake: Debian, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch_debian(fake)
    with monkeypatch.context() as no_apt:
        no_apt.setenv("PATH", "/nowhere")
        assert fetch_debian(fake) == folder
        (folder / "cats/cat.png").write_bytes(b"a dog")
        with pytest.raises(DataUnavailable, match="there is no apt-get here"):
            fetch_debian(fake)
    assert fetch_debian(fake) == folder
    assert (folder / "cats/cat.png").read_bytes() == b"a cat"


def test_an_installed_package_is_used_when_its_files_are_the_pinned_ones(fake: Debian, tmp_path: Path) -> None:
    installed = tmp_path / "tree/usr/share/fake"
    there = replace(fake, root=str(installed))
    assert fetch_debian(there) == installed
    (installed / "cats/cat.png").rename(installed / "cats/tiger.png")
    with pytest.raises(DataUnavailable):
        fetch_debian(there)


@pytest.mark.parametrize("other", ["another digest", "fewer files"])
def test_other_files_are_refused(fake: Debian, other: str, tmp_path: Path) -> None:
    changed = replace(fake, digest="0" * 64) if other == "another digest" else replace(fake, patterns=("cats/*.png",))
    with pytest.raises(
        DataUnavailable, match=r"fake cannot be had: version 1:2\.0-1 has other files than those pinned"
    ):
        fetch_debian(changed)
    assert cached(tmp_path) == []


def test_what_apt_says_is_passed_on(fake: Debian) -> None:
    with pytest.raises(
        ModelUnavailable,
        match=r"Debian's other cannot be had: apt-get failed: E: Unable to locate package other\. What would work: .*"
        r"`apt-get update`.*`apt-get install other`",
    ):
        fetch_debian(replace(fake, name="other"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_cut_out_stands_whole_on_white(mode: str) -> None:
    cut = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    cut.paste((0, 0, 0, 255), (0, 0, 10, 20))
    square = pictures._on_white(cut.convert(mode))
    assert square.mode == "RGB" and square.size == (40, 40)
    assert square.getpixel((5, 20)) == (0, 0, 0)
    assert {square.getpixel(at) for at in ((30, 20), (5, 5), (5, 35))} == {(255, 255, 255)}


def test_idx_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = bytes(range(256)) * 7  # 1792 = 2 * 28 * 28 + 224
    for part, content in {
        "images-idx3": struct.pack(">IIII", 2051, 2, 28, 28) + images[: 2 * 28 * 28],
        "labels-idx1": struct.pack(">II", 2049, 2) + bytes([9, 0]),
    }.items():
        (tmp_path / f"t10k-{part}-ubyte.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(pictures, "fetch_debian", lambda package, say: tmp_path)
    test = fashion("test")
    assert test.images.shape == (2, 28, 28)
    assert test.images.flatten().tolist() == list(images[: 2 * 28 * 28])
    assert test.labels.tolist() == [9, 0]


def test_other_sources_and_splits_are_named() -> None:
    with pytest.raises(UnknownName, match="no photographs are called 'imagenet': known are opencv, skimage"):
        photographs(["opencv", "imagenet"])
    with pytest.raises(UnknownName, match="no split is called 'dev': known are train, test"):
        fashion("dev")


@pytest.mark.slow
@pytest.mark.parametrize(("source", "count"), [("opencv", 36), ("skimage", 11)])
def test_photographs_are_many_and_different(source: str, count: int) -> None:
    try:
        found = photographs([source])
    except ModelUnavailable as reason:
        pytest.skip(str(reason))
    assert len(found) == count
    assert all(picture.mode == "RGB" and min(picture.size) >= 223 for picture in found.values())
    assert len({picture.tobytes() for picture in found.values()}) == count
    assert all(name.startswith(f"{source}/") for name in found)


@pytest.mark.slow
def test_stamps_are_squares_with_a_category() -> None:
    try:
        found = stamps()
    except ModelUnavailable as reason:
        pytest.skip(str(reason))
    categories = Counter(label for _, label in found)
    assert len(found) == 538 and len(categories) == 15
    assert categories["animals"] == 146 and "symbols" not in categories
    assert all(picture.mode == "RGB" and picture.width == picture.height for picture, _ in found)
    assert sum(picture.getpixel((0, 0)) == (255, 255, 255) for picture, _ in found) > 500


@pytest.mark.slow
@pytest.mark.parametrize(("split", "count"), [("train", 60_000), ("test", 10_000)])
def test_clothes_are_evenly_spread_over_their_kinds(split: str, count: int) -> None:
    try:
        found = fashion(split)
    except ModelUnavailable as reason:
        pytest.skip(str(reason))
    assert found.images.shape == (count, 28, 28)
    kinds = len(pictures.FASHION_CLASSES)
    assert torch.equal(found.labels.bincount(), torch.full((kinds,), count // kinds))
    # A bag fills its picture, a sandal does not: labels belong to their pictures.
    fill = [found.images[found.labels == kind].float().mean().item() for kind in range(kinds)]
    assert fill[pictures.FASHION_CLASSES.index("bag")] > 2 * fill[pictures.FASHION_CLASSES.index("sandal")]
