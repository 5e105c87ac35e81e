import torch

from fewer.methods.vlm.feature_norm import FeatureNorm
from tests.methods.vlm.build import place
from tests.methods.vlm.waves import kept, through, waves


def test_the_longest_stay() -> None:
    tokens = place(4, features=torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 6.0], [1.0, 1.0]]))
    assert FeatureNorm().score(tokens)[0, :3].tolist() == [5, 1, 6]
    assert kept(FeatureNorm(), tokens, 2) == [0, 2]
    assert kept(FeatureNorm(shortest=True), tokens, 1) == [1]
    assert kept(FeatureNorm(), place(3, features=torch.ones(3, 2)), 2) == [1, 2]  # of equals the later ones


def test_as_in_plain_python() -> None:
    x = waves(20, 6)
    length = [sum(v * v for v in row) for row in x.tolist()]
    assert kept(FeatureNorm(), place(20, features=x), 7) == sorted(sorted(range(20), key=lambda i: -length[i])[:7])


def test_in_a_model() -> None:
    through("feature-norm", "qwen3_vl")
