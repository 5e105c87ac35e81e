"""A tower that looks once gives what it gives when it looks again, and lets others listen."""

import pytest
import torch

import fewer
from fewer_eval.looking.measure import _under
from fewer_eval.looking.remembered import Remembered
from tests import vlms


@pytest.mark.parametrize("method", ["random", "visionzip", "vtc-cls"])
@torch.no_grad()
def test_methods_choose_the_same(method: str) -> None:
    case = vlms.llava()
    tower = Remembered(case.model.base_model.vision_tower)
    inputs = case.inputs([2, 1])
    plain = case.model(**inputs).logits
    with fewer.compress(case.model, method, keep=9) as run:
        expected, kept = case.model(**inputs).logits, run.kept
    for _ in range(2):  # looked at, then remembered
        with tower.attached():
            torch.testing.assert_close(case.model(**inputs).logits, plain, atol=1e-5, rtol=0)
            with fewer.compress(case.model, method, keep=9) as run:
                got = case.model(**inputs).logits
        assert all(torch.equal(a, b) for a, b in zip(run.kept[0] + run.kept[1], kept[0] + kept[1], strict=True))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0, equal_nan=True)
    assert len(tower.known) == 3
    assert torch.equal(case.model(**inputs).logits, plain) and "forward" not in vars(case.model.base_model.vision_tower)


def test_patches_under_boxes() -> None:
    under = _under([(0, 0, 14, 14), (20, 28, 30, 29)]).view(16, 16)
    assert under.nonzero().tolist() == [[0, 0], [2, 1], [2, 2]]
    assert int(_under([]).sum()) == 0
