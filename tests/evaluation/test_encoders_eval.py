"""What encoders are measured by: neighbours, a linear probe and dense maps, on numbers worked out by hand."""

import pytest
import torch

from fewer.types import FewerError
from fewer_eval.encoders import Probe, agreement, class_tokens, maps, nearest_neighbour, same_neighbour, truncated
from tests.adapters.encoders import encoder, inputs


def test_nearest_neighbour() -> None:
    """Directions 0, 10, 90 and 100 degrees: each has its neighbour at ten degrees; one of them bears a wrong label."""
    angle = torch.tensor([0.0, 10.0, 90.0, 100.0]).deg2rad()
    features = torch.stack([angle.cos(), angle.sin()], -1) * torch.tensor([[1.0], [5.0], [0.1], [3.0]])
    assert nearest_neighbour(features, [0, 0, 1, 1]) == 1.0
    assert nearest_neighbour(features, [0, 0, 1, 2]) == 0.5
    with pytest.raises(FewerError, match="no neighbours"):
        nearest_neighbour(features[:1], [0])


def test_a_probe_tells_what_can_be_told_by_a_line_and_not_what_cannot() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(300, 4, generator=draw)
    line, cross = (features[:, 0] > 0).long(), (features[:, 0] * features[:, 1] > 0).long()
    assert Probe.fit(features[:200], line[:200]).accuracy(features[200:], line[200:]) > 0.9
    assert Probe.fit(features[:200], cross[:200]).accuracy(features[200:], cross[200:]) < 0.7


def test_agreement() -> None:
    """A map that is 2 m + 1 correlates wholly; its error is the mean of m + 1. Its negative correlates by -1."""
    m = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert agreement(2 * m + 1, m) == pytest.approx((1.0, 2.5))
    assert agreement(-m, m)[0] == pytest.approx(-1.0)
    with pytest.raises(FewerError, match="same everywhere"):
        agreement(torch.ones(1, 4), m)


@torch.no_grad()
def test_features_of_a_truncated_encoder_are_the_hidden_ones() -> None:
    model, pixels = encoder("dinov2"), inputs("dinov2")["pixel_values"]
    hidden = model(pixels, output_hidden_states=True).hidden_states
    found, flops = class_tokens(truncated(model, 3), "full", 1.0, pixels, batch=1)
    torch.testing.assert_close(found, hidden[3][:, 0])
    assert flops == 1.0 and len(model.encoder.layer) == 4, "the model itself is as it was"
    short, flops = class_tokens(truncated(model, 3), "tome", 0.5, pixels)
    assert not torch.allclose(short, found) and flops < 1


@torch.no_grad()
def test_maps_are_of_restored_tokens() -> None:
    model, pixels = encoder("dinov2"), inputs("dinov2")["pixel_values"]
    sizes = []

    def head(tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        sizes.append((tuple(tokens.shape), size))
        return tokens[:, 1:, 0].view(-1, 6, 6)

    full, _ = maps(model, head, "full", 1.0, pixels)
    some, flops = maps(model, head, "tome", 0.5, pixels)
    assert sizes == [((2, 37, 32), (84, 84))] * 2
    assert full.shape == some.shape == (2, 36) and flops < 1
    assert 0.3 < agreement(some, full)[0] < 1


def test_same_neighbour() -> None:
    """Of three texts the second is the nearest to both others, and the first to it; moved, it has the third."""
    reference = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    assert same_neighbour(reference, reference) == 1.0
    moved = torch.tensor([[1.0, 0.0], [0.1, 0.9], [0.0, 1.0]])
    assert same_neighbour(moved, reference) == pytest.approx(2 / 3)
