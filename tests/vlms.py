"""Tiny random vision-language models, one of each family, with inputs as their processors would make them."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from fewer import reference_vlm

IMAGE, VIDEO, PAD, START, END, GLOBAL = 90, 91, 0, 92, 93, 94
"""Ids of placeholders, padding, and what stands around images."""
TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
TOWER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


@dataclass(frozen=True)
class Case:
    """A model, and a maker of inputs: rows of `(text before, images, text after)`."""

    model: Any
    inputs: Callable[..., dict[str, Tensor]]
    classes: bool = False
    """Whether its tower has a class token."""

    def row(self, inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
        """One row of a batch in which every row has one picture, without its padding."""
        there = inputs["attention_mask"][row].bool()
        out = {
            name: inputs[name][row : row + 1, there]
            for name in inputs
            if inputs[name].shape == inputs["input_ids"].shape
        }
        one = slice(row, row + 1)
        if (grid := inputs.get("image_grid_thw")) is not None:
            sizes = grid.prod(-1)
            first = int(sizes[:row].sum())
            return out | {
                "image_grid_thw": grid[one],
                "pixel_values": inputs["pixel_values"][first : first + int(sizes[row])],
            }
        if self.model.config.model_type == "internvl":
            tiles = [int(count) // 9 for count in (inputs["input_ids"] == IMAGE).sum(1)]
            one = slice(sum(tiles[:row]), sum(tiles[: row + 1]))
        more = ("pixel_values", "image_sizes", "pixel_attention_mask")
        return out | {name: inputs[name][one] for name in more if name in inputs}


def takes(model: Any, name: str) -> bool:
    """Whether this release's forward has that argument."""
    return name in inspect.signature(model.forward).parameters


def _seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().eval()


def padded(rows: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    """Rows of ids as one batch, with the mask that says which are padding."""
    longest = max(map(len, rows))
    fill = [[PAD] * (longest - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    none = [[0] * len(f) for f in fill]
    left = side == "left"
    ids = [f + r if left else r + f for f, r in zip(fill, rows, strict=True)]
    mask = [f + r if left else r + f for f, r in zip(none, ones, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def reference_shaped(words: Sequence[str]) -> tuple[Any, Any]:
    """A configuration of the reference model's shape, small, and that model's processor, for these words."""
    tokenizer = reference_vlm.word_tokenizer(list(words))
    mark = tokenizer.convert_tokens_to_ids(reference_vlm.IMAGE)
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**{**TOWER, "image_size": 224, "patch_size": 14}),
        text_config=tf.LlamaConfig(**{**TEXT, "vocab_size": len(tokenizer)}),
        image_token_index=mark,
        image_token_id=mark,
        image_seq_length=256,
    )
    return config, reference_vlm.processor_of(tokenizer)


def _pixels(n: int, seed: int, *shape: int) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def prompts(counts: list[int], runs: Callable[[int], list[int]], seed: int) -> list[list[int]]:
    """A row of ids for each number of images: text of some length, each image's run, and a question."""
    draw = torch.Generator().manual_seed(seed)
    rows, image = [], 0
    for row, count in enumerate(counts):
        ids = torch.randint(3, 80, (3 + row,), generator=draw).tolist()
        for _ in range(count):
            ids += [*runs(image), *torch.randint(3, 80, (2,), generator=draw).tolist()]
            image += 1
        rows.append(ids + torch.randint(3, 80, (4 + 2 * row,), generator=draw).tolist())
    return rows


def llava() -> Case:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**TOWER),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        vision_feature_layer=-2,
    )
    model = _seeded(lambda: tf.LlavaForConditionalGeneration(config))

    def inputs(counts: list[int], seed: int = 0, side: str = "left") -> dict[str, Tensor]:
        out = padded(prompts(counts, lambda _: [IMAGE] * 36, seed), side)
        return out | ({"pixel_values": _pixels(sum(counts), seed, 3, 24, 24)} if sum(counts) else {})

    return Case(model, inputs, classes=True)


SIZES = ((40, 20), (24, 24), (20, 44))
"""Heights and widths of images that are cut into crops, in turn."""


def _crops(model: Any, count: int) -> tuple[list[tuple[int, int]], list[int]]:
    sizes = [SIZES[i % len(SIZES)] for i in range(count)]
    name = type(model).__module__
    module: Any = __import__(name, fromlist=["image_size_to_num_patches"])
    grids = [[24, 48], [48, 24], [48, 48]]
    return sizes, [module.image_size_to_num_patches(list(size), grids, 24) for size in sizes]


def _anyres(model: Any) -> Callable[..., dict[str, Tensor]]:
    def inputs(counts: list[int], seed: int = 0, side: str = "left") -> dict[str, Tensor]:
        total = sum(counts)
        if not total:
            return padded(prompts(counts, lambda _: [], seed), side)
        sizes, patches = _crops(model, total)
        pixels = _pixels(total, seed, max(patches), 3, 24, 24)
        image_sizes = torch.tensor(sizes)
        with torch.no_grad():
            features = model.model.get_image_features(pixel_values=pixels, image_sizes=image_sizes).pooler_output
        out = padded(prompts(counts, lambda i: [IMAGE] * len(features[i]), seed), side)
        return out | {"pixel_values": pixels, "image_sizes": image_sizes}

    return inputs


def llava_next() -> Case:
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**TOWER),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
    )
    model = _seeded(lambda: tf.LlavaNextForConditionalGeneration(config))
    return Case(model, _anyres(model), classes=True)


def llava_onevision() -> Case:
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**TOWER),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        video_token_index=VIDEO,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
    )
    model = _seeded(lambda: tf.LlavaOnevisionForConditionalGeneration(config))
    anyres = _anyres(model)

    def inputs(counts: list[int], seed: int = 0, side: str = "left", frames: int = 0) -> dict[str, Tensor]:
        if not frames:
            return anyres(counts, seed, side)
        if "pixel_values_videos" not in inspect.signature(model.model.get_video_features).parameters:
            pytest.skip("up to transformers 5.2 a video's features lack the separator behind them, and are refused")
        out = padded(prompts(counts, lambda _: [VIDEO] * (9 * frames + 1), seed), side)
        return out | {"pixel_values_videos": _pixels(sum(counts), seed, frames, 3, 24, 24)}

    return Case(model, inputs)


GRIDS = ((1, 8, 12), (1, 12, 8), (1, 4, 4))
"""Patches in time, height and width of the images of the Qwen families, in turn; four make a token."""


def _qwen(model: Any, patch: int, *, timestamps: bool) -> Callable[..., dict[str, Tensor]]:
    def inputs(counts: list[int], seed: int = 0, side: str = "left", frames: int = 0) -> dict[str, Tensor]:
        total = sum(counts)
        if frames:
            grids = [(frames, 4, 8)] * total
        else:
            grids = [GRIDS[i % len(GRIDS)] for i in range(total)]
        kind = VIDEO if frames else IMAGE

        def run(i: int) -> list[int]:
            t, h, w = grids[i]
            if frames and timestamps:
                return [x for f in range(t) for x in [40 + f, START, *[kind] * (h * w // 4), END]]
            return [START, *[kind] * (t * h * w // 4), END]

        out = padded(prompts(counts, run, seed), side)
        if takes(model, "mm_token_type_ids"):
            out["mm_token_type_ids"] = (out["input_ids"] == IMAGE).long() + 2 * (out["input_ids"] == VIDEO).long()
        if not total:
            return out
        pixels = _pixels(sum(t * h * w for t, h, w in grids), seed, 3 * 2 * patch * patch)
        grid = torch.tensor(grids)
        if frames:
            return out | {"pixel_values_videos": pixels, "video_grid_thw": grid}
        return out | {"pixel_values": pixels, "image_grid_thw": grid}

    return inputs


def _qwen_ids() -> dict[str, int]:
    return {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }


def qwen2_vl() -> Case:
    vision = {"depth": 2, "embed_dim": 24, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = tf.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **_qwen_ids())
    model = _seeded(lambda: tf.Qwen2VLForConditionalGeneration(config))
    return Case(model, _qwen(model, 4, timestamps=False))


def qwen2_5_vl() -> Case:
    vision = {
        "depth": 2, "hidden_size": 24, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "patch_size": 4,
        "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = tf.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **_qwen_ids())
    model = _seeded(lambda: tf.Qwen2_5_VLForConditionalGeneration(config))
    return Case(model, _qwen(model, 4, timestamps=False))


def qwen3_vl() -> Case:
    vision = {
        "depth": 4, "hidden_size": 24, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "patch_size": 4,
        "num_position_embeddings": 144, "deepstack_visual_indexes": [0, 1, 2],
    }  # fmt: skip
    text = {**TEXT, "head_dim": 8, "rope_parameters": MROPE}
    config = tf.Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_ids())
    model = _seeded(lambda: tf.Qwen3VLForConditionalGeneration(config))
    return Case(model, _qwen(model, 4, timestamps=True))


def internvl() -> Case:
    vision = {**TOWER, "image_size": [24, 24], "patch_size": [4, 4]}
    config = tf.InternVLConfig(
        vision_config=vision, text_config=tf.Qwen2Config(**TEXT), image_token_id=IMAGE, downsample_ratio=0.5
    )
    model = _seeded(lambda: tf.InternVLForConditionalGeneration(config))

    def inputs(counts: list[int], seed: int = 0, side: str = "left") -> dict[str, Tensor]:
        tiles = [(3, 1, 5)[i % 3] for i in range(sum(counts))]  # the thumbnail comes last, and alone where it is one
        out = padded(prompts(counts, lambda i: [START, *[IMAGE] * (9 * tiles[i]), END], seed), side)
        return out | ({"pixel_values": _pixels(sum(tiles), seed, 3, 24, 24)} if tiles else {})

    return Case(model, inputs, classes=True)


def _tiles(config: Any) -> Callable[..., dict[str, Tensor]]:
    def inputs(counts: list[int], seed: int = 0, side: str = "left") -> dict[str, Tensor]:
        tiles = [(3, 1)[i % 2] for i in range(sum(counts))]  # the whole image comes last

        def run(i: int) -> list[int]:
            crops = [x for tile in range(tiles[i] - 1) for x in [START, 70 + tile, *[IMAGE] * 9]]
            return [*crops, START, GLOBAL, *[IMAGE] * 9, START]

        out = padded(prompts(counts, run, seed), side)
        if not tiles:
            return out
        shared = iter(tiles)
        each = [sum(next(shared) for _ in range(count)) for count in counts]
        pixels = torch.zeros(len(counts), max(each), 3, 24, 24)
        mask = torch.zeros(len(counts), max(each), 24, 24, dtype=torch.bool)
        for row, n in enumerate(each):
            pixels[row, :n], mask[row, :n] = _pixels(n, seed + row, 3, 24, 24), True
        return out | {"pixel_values": pixels, "pixel_attention_mask": mask}

    return inputs


def smolvlm() -> Case:
    text = tf.LlamaConfig(**TEXT)
    config = tf.SmolVLMConfig(vision_config=dict(TOWER), text_config=text, image_token_id=IMAGE, scale_factor=2)
    return Case(_seeded(lambda: tf.SmolVLMForConditionalGeneration(config)), _tiles(config))


def idefics3() -> Case:
    text = tf.LlamaConfig(**TEXT)
    config = tf.Idefics3Config(vision_config=dict(TOWER), text_config=text, image_token_id=IMAGE, scale_factor=2)
    return Case(_seeded(lambda: tf.Idefics3ForConditionalGeneration(config)), _tiles(config))


FAMILIES: dict[str, Callable[[], Case]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "smolvlm": smolvlm,
    "idefics3": idefics3,
}
WITH_VIDEO = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
