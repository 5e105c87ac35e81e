"""The reference vision-language model: what comes along loads, reads pictures and text in LLaVA's way, and answers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from fewer import files, reference_vlm
from fewer.models import ModelUnavailable
from fewer.reference_vlm import END, IMAGE, KIND, VERSION, VISUAL, load, processor_of, prompt, put, word_tokenizer
from fewer.types import FewerError
from fewer.vision import preprocess

DATA = Path(reference_vlm.__file__).parent / "data"


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    try:
        return load()
    except ModelUnavailable as reason:
        pytest.skip(f"the tower's weights cannot be had: {reason}")


def test_turns_stand_one_behind_the_other() -> None:
    assert prompt("b ?", before=[("a ?", "1")]) == f"{IMAGE}\na ? 1{END}b ?"


def test_numbers_are_spelled_and_come_back_whole() -> None:
    tokenizer: Any = word_tokenizer(["what", "number", "?"])
    ids = tokenizer("what number ? 407").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "what", "number", "?", "4", "##0", "##7"]
    assert tokenizer.decode(ids[-3:]) == "407"


def test_pictures_and_texts_are_prepared_as_the_tower_and_the_model_want_them() -> None:
    processor: Any = processor_of(word_tokenizer(["what", "?", "first", "second"]))
    wide = Image.radial_gradient("L").resize((300, 260)).convert("RGB")
    texts = [prompt("what ?", images=2), prompt("what what ?")]
    read = processor(images=[wide, wide, wide], text=texts, return_tensors="pt", padding=True)
    assert read.pixel_values.shape == (3, 3, 224, 224)
    torch.testing.assert_close(read.pixel_values[:1], preprocess(wide), atol=0.05, rtol=0)  # cropped before or after
    image = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    assert (read.input_ids == image).sum(1).tolist() == [2 * VISUAL, VISUAL]
    assert read.attention_mask[1, 0] == 0 and read.attention_mask[:, -1].tolist() == [1, 1]


def test_weights_of_another_model_are_refused() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(2, 3)

    model: Any = Other()
    with pytest.raises(FewerError, match=r"another model's: unknown \['lm_body.weight'\], missing \['lm_head.bias'"):
        put(model, {"lm_body.weight": torch.zeros(1)})


def test_additions_are_added() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(2, 3, bias=False)

    model: Any = Model()
    before = model.part.weight.clone()
    down, up = torch.randn(1, 2), torch.randn(3, 1)
    put(model, {"part.weight.down": down, "part.weight.up": up})
    torch.testing.assert_close(model.part.weight, before + up @ down)


def test_what_was_learned_is_what_is_shipped() -> None:
    """Behind float16, the folded projector and transformers' own attention stands what the learner computed."""
    pytest.importorskip("matplotlib")
    from fewer_eval.looking.hints import MARKS
    from fewer_eval.looking.learner import Learner
    from fewer_eval.looking.lessons import lesson, together, visual_tokens, vocabulary
    from fewer_eval.looking.questions import Question

    tokenizer: Any = word_tokenizer(vocabulary())
    torch.manual_seed(0)
    text: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=14)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**text, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
    )  # fmt: skip
    models = [LlavaForConditionalGeneration(config) for _ in range(2)]
    features = 3 + 2 * torch.randn(2, VISUAL, 24)
    for weight in (one for one in models[0].parameters() if one.ndim == 2):
        nn.init.normal_(weight, std=0.2)  # as they are made, an image changes next to nothing
    learner = Learner(models[0], features)
    asked = [
        [("count", Question("how many stars are there ?", "3", (((0, 0, 50, 50),),)))],
        [("word", Question("what ?", "moon", (((0, 0, 50, 50),),)))],
    ]
    marks = torch.zeros(VISUAL, len(MARKS), dtype=torch.long)
    batch = together([lesson(asked, [marks], tokenizer)] * 2, 0, tokenizer.convert_tokens_to_ids(IMAGE))
    learned, unseen = (learner(batch, some)[0].item() for some in (features, features.flip(0) - 1))
    assert abs(learned - unseen) > 0.05
    put(models[1], learner.weights())
    inner: Any = models[1].model
    embedded = inner.get_input_embeddings()(batch.ids)
    embedded = visual_tokens(embedded, batch.visual, inner.multi_modal_projector(features.flatten(0, 1)))
    hidden = inner.language_model(
        inputs_embeds=embedded, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    logits = models[1].lm_head(hidden[batch.graded.roll(-1, 1)])
    assert nn.functional.cross_entropy(logits, batch.ids[batch.graded]).item() == pytest.approx(learned, abs=5e-3)


def test_what_comes_along_is_small_and_says_what_it_is() -> None:
    weights, tokenizer = DATA / "reference-vlm.safetensors", DATA / "reference-vlm.tokenizer.json"
    assert weights.stat().st_size + tokenizer.stat().st_size < 8.5e6
    head, tensors = files.read(weights, KIND, VERSION, "reference vision-language model")
    assert head["note"] == "reference model trained for this, not a general one"
    assert all(one.dtype == torch.float16 and one.isfinite().all() for one in tensors.values())
    assert not any("vision_tower" in name for name in tensors)
    assert len(word_tokenizer(tokenizer.read_text())) == len(tensors["lm_head.weight"])
    assert json.loads(head["sizes"])["num_hidden_layers"] == 6


@pytest.mark.slow
def test_it_answers_questions_about_pictures_it_has_never_seen(shipped: tuple[Any, Any]) -> None:
    looking = pytest.importorskip("fewer_eval.looking")
    model, processor = shipped
    samples = []
    try:
        samples = [looking.sample(task, seed) for seed in range(8) for task in ("cell", "row")]
    except ModelUnavailable as reason:
        pytest.skip(f"the stamps cannot be had: {reason}")
    right = 0
    for one in samples:
        read = processor(images=list(one.images), text=prompt(one.question), return_tensors="pt")
        said = model.generate(**read, max_new_tokens=5, do_sample=False)[0, read.input_ids.shape[1] :]
        right += processor.decode(said, skip_special_tokens=True).strip() == one.answer
    assert right >= 11, f"{right} of {len(samples)} right"


@pytest.mark.slow
def test_a_batch_says_what_each_would_say_alone(shipped: tuple[Any, Any]) -> None:
    model, processor = shipped
    pictures = [Image.new("RGB", (224, 224), ink) for ink in ("red", "white", "blue")]
    texts = [prompt("how many stars are there ?"), prompt("which image has a dog ?", images=2)]
    both = processor(images=pictures, text=texts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        together = model(**both).logits[:, -1]
        for row, (some, text) in enumerate(zip((pictures[:1], pictures[1:]), texts, strict=True)):
            alone = model(**processor(images=some, text=text, return_tensors="pt")).logits[0, -1]
            torch.testing.assert_close(together[row], alone, atol=2e-3, rtol=1e-3)
