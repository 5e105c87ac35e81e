"""Pictures on the command line: the overlay, and fitting on a folder of them, with a small model of its own."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewer import fit as fits
from tests.adapters.encoders import encoder
from tests.front.test_cli import run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    encoder("dinov2").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    values = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def fewer(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    return lambda *words: run(capfd, monkeypatch, *words)


def test_an_overlay_is_drawn(fewer, photo: Path, model: str, tmp_path: Path) -> None:
    drawn = tmp_path / "overlay.png"
    words = ("image", str(photo), "--method", "tome", "--keep", "0.5", "--size", "84", "--model", model)
    code, out, _ = fewer(*words, "--out", str(drawn), "--json")
    assert code == 0
    said = json.loads(out.splitlines()[-1])
    assert said["patches"] == 36 and said["tokens"] == 18 and said["dropped"] == 0
    with Image.open(drawn) as picture:
        assert picture.size == (84 + 14 + 84, 84)
    code, out, _ = fewer(*words[:3], "topk", *words[4:], "--out", str(drawn))
    assert code == 0 and "36 patches in 18 tokens, 18 dropped" in out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"photo": "nowhere.png"}, "nowhere.png is no picture"),
        ({"--keep": "2"}, "keep"),
        ({"--size": "90"}, "multiple of 14"),
        ({"--method": "snapkv"}, "family vit"),
        ({"--out": "no/where.png"}, "--out no/where.png"),
        ({"--out": "overlay.nothing"}, "--out overlay.nothing"),
    ],
)
def test_what_cannot_be_drawn_is_said(fewer, photo: Path, model: str, change: dict[str, str], says: str) -> None:
    asked = {"--method": "tome", "--keep": "0.5", "--size": "84", "--out": str(photo.parent / "o.png")} | change
    shown = asked.pop("photo", str(photo))
    code, _, err = fewer("image", shown, "--model", model, *(word for pair in asked.items() for word in pair))
    assert code != 0 and says in " ".join(err.split())


def test_a_file_that_is_no_picture_is_said(fewer, tmp_path: Path, model: str) -> None:
    text = tmp_path / "photo.png"
    text.write_text("words")
    code, _, err = fewer("image", str(text), "--model", model)
    assert code != 0 and "is no picture" in " ".join(err.split())


def test_rates_are_fitted_on_a_folder_of_pictures(fewer, photo: Path, model: str, tmp_path: Path) -> None:
    """Two pictures and a file that is none: the rates reach the FLOPs that were asked for."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    photo.rename(folder / "a.png")
    Image.new("RGB", (100, 100), (200, 30, 30)).save(folder / "b.png")
    (folder / "c.txt").write_text("words")
    made = tmp_path / "rates.fit"
    words = ("fit", "diffrate", "--data", str(folder), "--size", "84", "--flops", "0.7", "--model", model)
    code, _, err = fewer(*words, "--out", str(made))
    assert code == 0, err
    assert "c.txt is no picture" in " ".join(err.split())
    fit = fits.load(made, "diffrate")
    assert fit.method == "diffrate" and fit.notes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("fit", "kvzap", "--flops", "0.5"), "--flops 0.5 means nothing for kvzap, which takes --tokens and --length"),
        (("fit", "diffrate", "--data", "nowhere"), "--data nowhere"),
    ],
)
def test_what_cannot_be_fitted_is_said(fewer, words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    code, _, err = fewer(*words, "--out", str(tmp_path / "f"))
    assert code != 0 and says in " ".join(err.split())


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small vision-language model with its processor, as a folder."""
    import transformers as tf

    from tests.vlms import reference_shaped

    folder = tmp_path_factory.mktemp("asked")
    config, processor = reference_shaped(["what", "is", "here"])
    processor.chat_template = "{% for m in messages %}{% for c in m.content %}" + (
        "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    tf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("method", "keep", "mean"), [("fastv", 16, 112), ("visionzip,fastv", 16, 35.2), ("turbo,knorm", 36, 96)]
)
def test_a_question_is_asked(
    fewer, photo: Path, asked: str, tmp_path: Path, method: str, keep: int, mean: float
) -> None:
    drawn = tmp_path / "asked.png"
    words = (
        "image",
        str(photo),
        "--question",
        "what is here",
        "--method",
        method,
        "--keep",
        str(keep),
        "--model",
        asked,
    )
    code, out, err = fewer(*words, "--out", str(drawn), "--json")
    assert code == 0, err
    said = json.loads(out.splitlines()[-1])
    assert said["visual"] == 256 and said["mean"] == mean and said["flops"] < 1
    assert {"full", "answer"} <= said.keys()
    with Image.open(drawn) as picture:
        assert picture.size == (2 * 448 + 14, 448) or picture.size[1] == 448
    code, out, _ = fewer(*words, "--out", str(drawn))
    assert code == 0 and "all 256 visual tokens:" in out


def test_a_question_for_a_method_of_encoders_and_a_bad_model(fewer, photo: Path, model: str, asked: str) -> None:
    words = ("image", str(photo), "--question", "what is here", "--keep", "16")
    code, _, err = fewer(*words, "--method", "snapkv")
    assert code == 2 and "as in fastv,snapkv" in err
    code, _, err = fewer(*words, "--method", "bm25", "--model", asked)
    assert code == 2 and "shortens texts" in err
    code, _, err = fewer(*words, "--method", "fastv", "--model", model)
    assert code == 2 and "vision-language model" in err
