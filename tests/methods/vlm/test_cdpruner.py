import pytest
import torch

from fewer.methods.vlm.cdpruner import CDPruner, volume
from fewer.types import FewerError
from tests.methods.vlm.build import place
from tests.methods.vlm.waves import kept, through, waves

ASKED = waves(35, 16)[30:].unsqueeze(0)


def greedy(kernel: torch.Tensor, count: int) -> list[int]:
    """The greatest determinant, one token after the other, by computing it."""
    chosen: list[int] = []
    for _ in range(count):
        left = [i for i in range(len(kernel)) if i not in chosen]
        chosen.append(max(left, key=lambda i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]))))
    return chosen


def test_near_to_the_question_and_far_from_each_other() -> None:
    # the question points north: north, its copy, a little to the east of it, and south
    features = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.6, 0.8], [0.0, -1.0]])
    tokens = place(4, features=features, question=torch.tensor([[[0.0, 3.0]]]))
    scores = CDPruner().score(tokens)[0]
    assert scores.tolist() == pytest.approx([1, 1, 0.9, 0], abs=1e-5)
    assert kept(CDPruner(), tokens, 1) == [0]
    assert kept(CDPruner(), tokens, 2) == [0, 2]  # not the copy
    assert kept(CDPruner(sign=-1), tokens, 1) == [3]


def test_as_the_greatest_determinant() -> None:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kernel = x @ x.T
    assert volume(kernel, 8).tolist() == greedy(kernel, 8)


def test_as_the_authors() -> None:
    # from their relevance and choice (encode_images in llava/model/llava_arch.py of Theia-4869/CDPruner), with the
    # question's embeddings in the place of CLIP's
    tokens = place(30, features=waves(30, 16), question=ASKED)
    assert CDPruner(sign=-1).score(tokens)[0, :3].tolist() == pytest.approx([0.4822698, 0.4194899, 0.1606116], abs=1e-5)
    assert CDPruner().score(tokens)[0, :3].tolist() == pytest.approx([0.5177341, 0.5805140, 0.8393923], abs=1e-5)
    plain, minus = [21, 7, 2, 15, 4, 14, 28, 18, 29, 3], [6, 24, 12, 11, 8, 27, 25, 9, 20, 16]
    for count in (1, 4, 10):
        assert kept(CDPruner(), tokens, count) == sorted(plain[:count])
        assert kept(CDPruner(sign=-1), tokens, count) == sorted(minus[:count])


def test_more_tokens_than_dimensions() -> None:
    tokens = place(20, features=waves(20, 3), question=torch.ones(1, 2, 3))
    assert len(set(kept(CDPruner(), tokens, 19))) == 19
    alike = place(6, features=torch.ones(6, 3), question=torch.ones(1, 2, 3))
    assert CDPruner().score(alike).tolist() == [[1] * 6]
    assert kept(CDPruner(), alike, 3) == [0, 1, 2]
    assert len(kept(CDPruner(), place(6, features=torch.zeros(6, 3), question=torch.ones(1, 2, 3)), 4)) == 4


def test_bad_arguments() -> None:
    with pytest.raises(FewerError, match="sign=2"):
        CDPruner(sign=2)


@pytest.mark.parametrize("family", ["llava", "smolvlm"])
def test_in_a_model(family: str) -> None:
    through("cdpruner", family)
