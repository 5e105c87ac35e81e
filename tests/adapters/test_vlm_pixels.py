"""Pictures of one pixel, and of one line, through transformers' own image processors."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from PIL import Image
from torch import Tensor

import fewer
from fewer.cli import pictures
from fewer.types import BudgetError
from tests import vlms
from tests.front.test_cli import run

SQUARE = {"height": 24, "width": 24}
ANYRES = {"size": SQUARE, "image_grid_pinpoints": [[24, 48], [48, 24], [48, 48]]}
QWEN: dict[str, Any] = {"patch_size": 4, "merge_size": 2}
TILES = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("CLIPImageProcessor", {"size": {"shortest_edge": 24}, "crop_size": SQUARE}),
    "llava_next": ("LlavaNextImageProcessor", {**ANYRES, "size": {"shortest_edge": 24}, "crop_size": SQUARE}),
    "llava_onevision": ("LlavaOnevisionImageProcessor", ANYRES),
    "qwen2_vl": ("Qwen2VLImageProcessor", QWEN),
    "qwen2_5_vl": ("Qwen2VLImageProcessor", QWEN),
    "qwen3_vl": ("Qwen2VLImageProcessor", QWEN),
    "internvl": ("GotOcr2ImageProcessor", {"size": SQUARE, "crop_to_patches": True, "max_patches": 4}),
    "smolvlm": ("SmolVLMImageProcessor", TILES),
    "idefics3": ("Idefics3ImageProcessor", TILES),
}
"""The image processor of each family, for the size of the tiny models' towers."""
METHODS = ("divprune", "visual-pooling", "apet", "fastv", "sparsevlm")
"""Some that compare tokens, which are much alike here, and some that read attention."""


def processor(name: str) -> Any:
    """An image processor that needs no torchvision, as every release calls it."""
    return getattr(tf, f"{name}Pil", None) or getattr(tf, name)


def pixels(family: str, size: tuple[int, int]) -> dict[str, Tensor]:
    """What the family's image processor makes of one red picture."""
    name, settings = PROCESSORS[family]
    picture = Image.new("RGB", size, (200, 30, 30))
    try:
        made = processor(name)(**settings)(images=[picture], return_tensors="pt")
    except ValueError as why:
        if "mean must have 1 elements" not in str(why):
            raise
        pytest.skip(f"this release takes a picture of one row for one of one channel: {why}")
    return {key: value for key, value in made.items() if key not in ("num_patches", "batch_num_images")}


def prompt(family: str, model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """A question about that picture, with as many placeholders as the model makes tokens of it."""
    made = sum(map(len, model.model.get_image_features(**given).pooler_output))
    ids = [vlms.START, *[vlms.IMAGE] * made, vlms.END]
    if family in ("smolvlm", "idefics3"):  # nine tokens a tile, the whole picture last
        tiles = [70 + tile for tile in range(made // 9 - 1)] + [vlms.GLOBAL]
        ids = [x for tile in tiles for x in (vlms.START, tile, *[vlms.IMAGE] * 9)]
    out = vlms.padded([[5, 6, *ids, 7, 8, 9]])
    if vlms.takes(model, "mm_token_type_ids"):
        out["mm_token_type_ids"] = (out["input_ids"] == vlms.IMAGE).long()
    return out | given


@pytest.mark.parametrize("size", [(1, 1), (1, 150)], ids=["pixel", "column"])
@pytest.mark.parametrize("family", PROCESSORS)
def test_keep_is_met(family: str, size: tuple[int, int]) -> None:
    model = vlms.FAMILIES[family]().model
    inputs = prompt(family, model, pixels(family, size))
    for method in METHODS:
        for keep in (0.5, 1):
            with fewer.compress(model, method, keep=keep) as run:
                logits = model(**inputs).logits
            (((picture,),), ((kept,),)) = run.pictures, run.kept
            assert len(kept) == fewer.Budget.parse(keep).count(len(picture.columns)), (method, keep)
            assert bool(logits[:, -1].isfinite().all()), (method, keep)
            grid, slots = run.drawn()
            assert len(slots) == grid[0] * grid[1]


class Processor:
    """The rest of a processor, around an image processor."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def apply_chat_template(self, turns: Any, **more: Any) -> str:
        return "what is here"

    def __call__(self, images: Any, text: Any, return_tensors: str) -> Any:
        return self.images(images=images, return_tensors=return_tensors)


def asked(capfd: Any, patch: pytest.MonkeyPatch, folder: Path, host: Any, size: tuple[int, int]) -> Any:
    """`fewer image --question` about a picture of that size: its exit code, stdout and stderr."""
    patch.setattr(pictures, "pictured", lambda name: host)
    Image.new("RGB", size, (200, 30, 30)).save(folder / "photo.png")
    words = ("image", str(folder / "photo.png"), "--question", "what is here", "--method", "divprune", "--keep", "16")
    return run(capfd, patch, *words, "--model", "tiny", "--out", str(folder / "drawn.png"), "--json")


def test_a_question_about_one_pixel(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the reference model's processor."""
    config, made = vlms.reference_shaped(["what", "is", "here"])
    made.chat_template = "{{ '<image>' }} what is here"
    host = (tf.LlavaForConditionalGeneration(config).eval(), made)
    code, out, err = asked(capfd, monkeypatch, tmp_path, host, (1, 1))
    if code and "mean must have 1 elements" in err:  # older releases take it for a picture of one channel
        assert "a picture of 1x1 pixels" in " ".join(err.split())
        return
    assert code == 0, err
    said = json.loads(out.splitlines()[-1])
    assert (said["visual"], said["left"]) == (256, 16)


def test_a_picture_that_a_processor_refuses(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = (vlms.qwen2_vl().model, Processor(processor("Qwen2VLImageProcessor")(**QWEN)))
    code, _, err = asked(capfd, monkeypatch, tmp_path, host, (1, 300))
    said = " ".join(err.split())
    assert code == 2 and "a picture of 1x300 pixels" in said and "aspect ratio" in said


@pytest.mark.slow
def test_the_default_models_take_one_pixel(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    default_vision_model_path: Path,
) -> None:
    Image.new("RGB", (1, 1), (200, 30, 30)).save(tmp_path / "photo.png")
    words = ("image", str(tmp_path / "photo.png"), "--out", str(tmp_path / "drawn.png"), "--json")
    code, out, err = run(capfd, monkeypatch, *words, "--method", "tome", "--keep", "0.5", "--size", "224")
    assert code == 0 and json.loads(out.splitlines()[-1])["tokens"] == 128, err
    more = ("--question", "how many stars are there ?", "--method", "divprune", "--keep", "16")
    code, out, err = run(capfd, monkeypatch, *words, *more)
    assert code == 0 and json.loads(out.splitlines()[-1])["left"] == 16, err


@pytest.mark.filterwarnings("ignore::fewer.types.FewerWarning")
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_a_count_is_refused_where_crops_are_shortened_one_by_one(family: str) -> None:
    """A share is met by every crop; six tokens of a picture would become six of each."""
    model, refused = vlms.FAMILIES[family]().model, "keep=6: 'topk' shortens every crop of a picture by itself"
    with pytest.raises(BudgetError, match=refused), fewer.compress(model, "topk", keep=6):
        pass
    given = pixels(family, (48, 48))
    with fewer.compress(model, ["topk", "divprune"], keep=6) as run:
        model(**prompt(family, model, given))
    assert [len(kept) for kept in run.kept[0]] == [6]
