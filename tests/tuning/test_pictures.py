"""A model that sees, asked under many settings: each answer is what `fewer.compress` gives; a plan keeps its stages."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewer import reference_vlm
from fewer.models import ModelUnavailable
from fewer.tuning.dial import tune
from fewer.tuning.examples import Example
from fewer.tuning.pictures import Pictures
from fewer.tuning.planfile import TunedPlan
from fewer.tuning.setting import Held, Setting
from fewer.types import FewerError
from fewer_eval.looking import sample

pytestmark = pytest.mark.slow
SETTINGS = [
    Setting(),
    Setting(held=Held("divprune", 0.25)),
    Setting(held=Held(("divprune", "fastv"), 0.1)),
    Setting(held=Held("snapkv", 0.25, only="visual")),
    Setting(held=Held("fastv", 128, counted="mean")),
]


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    try:
        return reference_vlm.load()
    except ModelUnavailable as reason:
        pytest.skip(f"the tower's weights cannot be had: {reason}")


@pytest.fixture(scope="module")
def asked(model: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Pictures, list[Example]]:
    folder = tmp_path_factory.mktemp("pictures")
    made = []
    for number in range(12):
        one = sample("colour", number)
        one.images[0].save(folder / f"{number}.png")
        made.append(Example("", one.question, (one.answer,), (str(folder / f"{number}.png"),), "colour", number + 1))
    return Pictures(*model, most=5, write=reference_vlm.prompt), made


def test_every_setting_is_as_it_is_by_itself(model: tuple[Any, Any], asked: tuple[Pictures, list[Example]]) -> None:
    (vlm, processor), (host, examples) = model, asked
    for example in examples[:3]:
        images = [host.picture(name) for name in example.images]
        text = [reference_vlm.prompt(example.question)]
        inputs = processor(images=images, text=text, return_tensors="pt")
        answers = host.ask(example, SETTINGS)
        for setting, answer in zip(SETTINGS, answers, strict=True):
            with torch.inference_mode(), setting.under(vlm) as run:
                out = vlm.generate(**inputs, max_new_tokens=5, do_sample=False)
            said = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            assert (answer.text, answer.refused) == (said, ""), setting
            if run is not None and setting.held is not None and setting.held.only is None:
                assert answer.tokens == pytest.approx(answers[0].tokens - 256 + run.report.mean)
        full, quarter, both, cache, _ = answers
        assert both.bytes < quarter.bytes < full.bytes and cache.bytes < full.bytes and cache.tokens == full.tokens


def test_a_plan_for_pictures(asked: tuple[Pictures, list[Example]], tmp_path: Path) -> None:
    host, examples = asked
    for aim in ("memory", "latency"):
        found = tune(
            host.model, examples, host=host, loss=0.5, confidence=0.7, methods=["divprune", "divprune>fastv"], aim=aim,
            max_new_tokens=5, name="reference-vlm",
        )  # fmt: skip
        assert found.chosen is not None and found.full.cost(aim) > next(
            one.cost(aim) for one in found.searched if one.setting == found.chosen
        )
        found.plan().save(tmp_path / "plan.toml")
        assert TunedPlan.load(tmp_path / "plan.toml").setting == found.chosen


def test_pictures_that_cannot_be_read_are_named_before_anything_is_asked(asked: tuple[Pictures, list[Example]]) -> None:
    host, examples = asked
    for images, said in ((("none.png",), "'none.png' is no picture"), ((), "has no image"), (("a\0b",), "no picture")):
        with pytest.raises(FewerError, match=f"example 3:? .*{said}"):
            tune(host.model, [*examples[:2], replace(examples[2], images=images)], host=host, loss=0.6, confidence=0.3)
