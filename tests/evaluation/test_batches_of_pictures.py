"""The same prompts in padded batches and one by one: what is equal is called so, and a fault is seen."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image
from torch import Tensor

import fewer
from fewer.reduce.select import top_k
from fewer_eval.looking import Sample
from fewer_eval.looking.batches import SIZE, Said, asking, compare
from tests.vlms import reference_shaped


def right(some: Sequence[int]) -> Said:
    """Prompts are numbers; each has one picture, of which as many tokens are kept."""
    return Said([f"{one}" for one in some], torch.tensor(some).float()[:, None], [[torch.arange(one)] for one in some])


def answers(some: Sequence[int]) -> Said:
    said = right(some)
    return Said(said.answers if len(some) == 1 else ["padding", *said.answers[1:]], said.logits, said.kept)


def logits(some: Sequence[int]) -> Said:
    said = right(some)
    return Said(said.answers, said.logits + 0.25 * (len(some) - 1), said.kept)


def tokens(some: Sequence[int]) -> Said:
    said = right(some)
    return Said(said.answers, said.logits, [[kept[0] + (len(some) > 1)] for kept in said.kept])


def counts(some: Sequence[int]) -> Said:
    said = right(some)
    return Said(said.answers, said.logits, [[kept[0][len(some) > 1 :]] for kept in said.kept])


def refuses(some: Sequence[int]) -> Said:
    raise fewer.FewerError("not in batches")


def test_what_differs_is_seen() -> None:
    prompts = list(range(1, 2 * SIZE + 1))

    def found(ask: Any) -> tuple[Any, ...]:
        one = compare(ask, prompts, "stub", 1)
        assert one.n == (0 if one.error else 2 * SIZE)
        return one.same, one.apart, one.chosen, one.counts, one.error

    assert found(right) == (1.0, 0.0, 1.0, True, "")
    assert found(answers) == (1 - 1 / SIZE, 0.0, 1.0, True, "")
    assert found(logits) == (1.0, 0.25 * (SIZE - 1), 1.0, True, "")
    assert found(tokens) == (1.0, 0.0, 0.0, True, "")
    assert found(counts) == (1.0, 0.0, 0.0, False, "")
    assert found(refuses)[-1] == "not in batches"


class Fickle:
    """Chooses others every time that it is asked."""

    needs: frozenset[Any] = frozenset()
    asked = 0

    def score(self, tokens: fewer.Tokens) -> Tensor:
        self.asked += 1
        return torch.arange(tokens.features.shape[-2]).roll(5 * self.asked).float()[None]

    def allocate(self, tokens: fewer.Tokens, scores: Tensor, budget: fewer.Budget) -> fewer.Allocation:
        return fewer.Allocation(torch.tensor([budget.count(int(tokens.seen[0]))]))

    def reduce(self, tokens: fewer.Tokens, scores: Tensor, allocation: fewer.Allocation) -> fewer.Plan:
        return top_k(scores, allocation)


@pytest.fixture(scope="module")
def host() -> tuple[Any, Any]:
    """A small model in the reference model's shape, and the reference model's processor."""
    config, processor = reference_shaped(["what", "is", "here", "and", "there", "first", "second"])
    torch.manual_seed(0)
    return tf.LlavaForConditionalGeneration(config).eval(), processor


def prompts() -> list[Sample]:
    """Questions of several lengths, about one image or two."""
    images = [Image.effect_mandelbrot((224, 224), (-2, -1.5, 1, 1.5), 20 + i).convert("RGB") for i in range(3)]
    asked = ["what is here", "what", "what is here and there"]
    return [
        Sample(tuple(images[: 1 + (row == 1)]), text, "", ((),) * (1 + (row == 1))) for row, text in enumerate(asked)
    ]


@pytest.mark.parametrize(("method", "keep"), [("full", 256), ("fastv", 16), ("visionzip", 16), ("tome", 128)])
def test_a_model_answers_as_one_by_one(host: tuple[Any, Any], method: str, keep: int) -> None:
    found = compare(asking(*host, method, keep), prompts(), method, keep)
    assert (found.error, found.same, found.chosen, found.counts) == ("", 1.0, 1.0, True)
    assert found.apart < 1e-4


def test_a_method_that_chooses_anew_is_seen(host: tuple[Any, Any]) -> None:
    found = compare(asking(*host, Fickle(), 16), prompts(), "fickle", 16)
    assert found.chosen < 1 and found.apart > 1e-3 and found.counts


def test_a_refusal_is_a_row(host: tuple[Any, Any]) -> None:
    found = compare(asking(*host, "evs", 16), prompts(), "evs", 16)
    assert found.n == 0 and "video" in found.error
