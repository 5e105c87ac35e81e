"""The default vision model and the sentence encoder: conversion is checked, and what they see and read makes sense."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from fewer import vision
from fewer.models import ModelUnavailable
from fewer.sentences import load_sentence_encoder
from fewer.types import FewerError
from fewer.vision import Saliency, load_vision, preprocess


def test_preprocess_takes_the_middle_square() -> None:
    wide = Image.new("RGB", (300, 100), (255, 0, 0))
    wide.paste((0, 255, 0), (100, 0, 200, 100))
    pixels = preprocess(wide, 28)
    assert pixels.shape == (1, 3, 28, 28)
    # Pure green everywhere, as ImageNet's mean and deviation have it: (0 - 0.485) / 0.229 and so on.
    expected = torch.tensor([-2.1179, 2.4286, -1.8044])[None, :, None, None].expand_as(pixels)
    torch.testing.assert_close(pixels, expected, atol=1e-4, rtol=0)


def test_preprocess_reads_grey_pictures_and_keeps_up_and_left() -> None:
    grey = Image.new("L", (56, 56), 0)
    grey.paste(255, (28, 0, 56, 28))
    pixels = preprocess(grey, 56)
    assert pixels[0, :, 10, 40].min() > 2
    assert pixels[0, :, [10, 40, 40], [10, 10, 40]].max() < -1.7


@pytest.mark.parametrize("size", [0, -14, 13, 223, 225])
def test_a_size_that_patches_do_not_fill_is_refused(size: int) -> None:
    with pytest.raises(FewerError, match=r"multiple of 14, such as 224.*not"):
        preprocess(Image.new("RGB", (30, 30)), size)


def test_saliency_is_a_map_of_the_images_size() -> None:
    head = Saliency().eval()
    seen = head(torch.randn(2, 1 + 3 * 5, 384), (42, 70))
    assert seen.shape == (2, 42, 70)
    assert seen.min() >= 0 and seen.max() <= 1


def test_saliency_of_fewer_tokens_is_refused() -> None:
    with pytest.raises(FewerError, match=r"224 by 224 pixels has 1 \+ 16 \* 16 tokens, these are 200: restore them"):
        Saliency()(torch.randn(1, 200, 384))


def test_weights_are_found_in_an_onnx_file(tmp_path: Path) -> None:
    """A linear layer is stored transposed and without a name, the positions in two parts; a product of two activations
    carries no weight."""
    onnx = pytest.importorskip("onnx")
    make = onnx.helper.make_node
    matrix, of_class, of_grid = torch.randn(4, 3), torch.randn(1, 1, 3), torch.randn(1, 2, 3)
    stored = {
        "onnx::MatMul_7": matrix,
        "onnx::Reshape_2": of_grid,
        "onnx::Concat_1": of_class,
        "backbone.embeddings.cls_token": torch.randn(1, 1, 3),
        "decoder.final_conv.bias": torch.randn(1),
        "onnx::Add_3": torch.randn(5),
    }
    nodes = [
        make("MatMul", ["x", "onnx::MatMul_7"], ["y"], name="/backbone/encoder/layer.0/mlp/fc1/MatMul"),
        make("MatMul", ["y", "y"], ["z"], name="/backbone/encoder/layer.0/attention/attention/MatMul"),
    ]
    initialisers = [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in stored.items()]
    graph = onnx.helper.make_graph(nodes, "tiny", [], [], initializer=initialisers)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "tiny.onnx")
    found = vision._tensors(tmp_path / "tiny.onnx")
    expected = {
        "backbone.encoder.layer.0.mlp.fc1.weight": matrix.T,
        "backbone.embeddings.position_embeddings": torch.cat([of_class, of_grid], dim=1),
        "backbone.embeddings.cls_token": stored["backbone.embeddings.cls_token"],
        "decoder.final_conv.bias": stored["decoder.final_conv.bias"],
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_package_that_reads_the_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path))
    monkeypatch.setattr(vision, "fetch", lambda package, say=None: tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModelUnavailable, match=r"vision model cannot be converted: .*onnx.*`pip install onnx`"):
        vision.default_vision_model_path()
    assert list(tmp_path.iterdir()) == []


def tiny_vision(folder: Path) -> None:
    config = Dinov2Config(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)


def test_a_folder_without_a_head_is_loaded_without_one(tmp_path: Path) -> None:
    tiny_vision(tmp_path)
    model, head = load_vision(str(tmp_path), dtype=torch.bfloat16)
    assert head is None
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert model(torch.zeros(1, 3, 28, 28, dtype=torch.bfloat16)).last_hidden_state.shape == (1, 5, 8)


@pytest.mark.parametrize("name", ["./no/such/folder", "not a name", "default2/../x"])
def test_a_name_that_is_no_vision_model_is_explained(name: str) -> None:
    with pytest.raises(ModelUnavailable, match=r"no vision model can be loaded.*What works: 'default'") as raised:
        load_vision(name)
    assert repr(name) in str(raised.value)


@pytest.mark.slow
def test_the_disc_stands_out_as_in_the_original(default_vision_model_path: Path) -> None:
    """The numbers are onnxruntime's. Over the whole map the largest difference was 3.7e-6, on noise 2.2e-6."""
    model, head = load_vision()
    assert not model.training and not head.training
    with torch.inference_mode():
        seen = head(model(vision._disc()).last_hidden_state)[0]
    torch.testing.assert_close(seen[20::46, 20::46], torch.tensor(vision._DISC_SALIENCY), atol=1e-4, rtol=0)
    assert seen.mean().item() == pytest.approx(0.45362666, abs=1e-4)


@pytest.mark.slow
def test_images_of_other_sizes_are_taken(default_vision_model_path: Path) -> None:
    model, head = load_vision()
    with torch.inference_mode():
        tokens = model(torch.randn(1, 3, 448, 224)).last_hidden_state
        seen = head(tokens, (448, 224))
    assert tokens.shape == (1, 1 + 32 * 16, 384)
    assert seen.shape == (1, 448, 224)


@pytest.mark.slow
def test_the_default_vision_model_is_converted_once(
    default_vision_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_fetch(*args: Any) -> Path:
        raise ModelUnavailable("fetched again")

    monkeypatch.setattr(vision, "fetch", no_fetch)
    assert vision.default_vision_model_path() == default_vision_model_path


def swap_query_and_key(tensors: dict[str, Tensor]) -> None:
    layer = "backbone.encoder.layer.5.attention.attention"
    query, key = f"{layer}.query.bias", f"{layer}.key.bias"
    tensors[query], tensors[key] = tensors[key], tensors[query]


def transpose_a_square_matrix(tensors: dict[str, Tensor]) -> None:
    name = "backbone.encoder.layer.11.attention.output.dense.weight"
    tensors[name] = tensors[name].T.contiguous()


def forget_a_weight(tensors: dict[str, Tensor]) -> None:
    del tensors["backbone.encoder.layer.0.layer_scale1.lambda1"]


def turn_the_class_position(tensors: dict[str, Tensor]) -> None:
    name = "backbone.embeddings.position_embeddings"
    tensors[name] = tensors[name].roll(-1, dims=1)


def damage_the_head(tensors: dict[str, Tensor]) -> None:
    tensors["decoder.bn2.running_var"] *= 1.1


FAULTS = [
    swap_query_and_key,
    transpose_a_square_matrix,
    forget_a_weight,
    turn_the_class_position,
    damage_the_head,
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_conversion_is_not_kept(
    default_vision_model_path: Path, fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tensors(onnx_file: Path) -> dict[str, Tensor]:
        found = {f"backbone.{name}": value for name, value in load_file(onnx_file / "model.safetensors").items()}
        del found["backbone.embeddings.mask_token"]
        found |= {f"decoder.{name}": value for name, value in load_file(onnx_file / "saliency.safetensors").items()}
        fault(found)
        return found

    monkeypatch.setenv("FEWER_CACHE", str(tmp_path))
    monkeypatch.setattr(vision, "fetch", lambda package, say=None: default_vision_model_path)
    monkeypatch.setattr(vision, "_ONNX", "")
    monkeypatch.setattr(vision, "_tensors", tensors)
    with pytest.raises(ModelUnavailable, match="saliency is off by"):
        vision.default_vision_model_path()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_timms_weights_are_the_same_numbers(default_vision_model_path: Path) -> None:
    """That timm takes them and computes the same is tested where timm is."""
    weights, stored = vision.timm_weights(), load_file(default_vision_model_path / "model.safetensors")
    assert weights["blocks.3.attn.qkv.weight"].shape == (3 * 384, 384)
    key = stored["encoder.layer.3.attention.attention.key.weight"]
    assert torch.equal(weights["blocks.3.attn.qkv.weight"][384:768], key)
    unused = stored["embeddings.mask_token"].numel()
    assert sum(value.numel() for value in weights.values()) == sum(value.numel() for value in stored.values()) - unused


@pytest.mark.slow
def test_paraphrases_are_nearer_than_other_sentences() -> None:
    try:
        model, tokenizer = load_sentence_encoder()
    except ModelUnavailable as reason:
        pytest.skip(str(reason))
    texts = [
        "A man is playing a guitar on stage.",
        "Somebody performs guitar music for an audience.",
        "The recipe needs two cups of flour.",
        "Flour, two cups of it, is called for by the recipe.",
    ]
    batch: Any = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        tokens = model(**batch).last_hidden_state
    real = batch["attention_mask"][..., None]
    sentences = torch.nn.functional.normalize((tokens * real).sum(1) / real.sum(1), dim=-1)
    alike = sentences @ sentences.T
    assert alike[0, 1] > 0.6 and alike[2, 3] > 0.6
    assert alike[:2, 2:].max() < 0.2


def test_a_tokenizer_of_another_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        input_ids = (1, 2)

        def __call__(self, text: str) -> "Other":
            return self

    monkeypatch.setattr("fewer.sentences.default_sentence_encoder_path", lambda say=None: Path())
    monkeypatch.setattr("fewer.sentences.AutoTokenizer.from_pretrained", lambda folder: Other())
    with pytest.raises(ModelUnavailable, match=r"turns 'Hello world' into \(1, 2\)"):
        load_sentence_encoder()
