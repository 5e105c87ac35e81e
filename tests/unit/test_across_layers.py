"""One total for all layers and heads."""

from dataclasses import replace

import pytest
import torch

from fewer.allocate.across_layers import across_layers
from fewer.score.position import FORCED
from fewer.signals import EveryLayer, LayerScores
from fewer.types import Budget, Site, Tokens


def places(*scores: list[list[float]], seen: int = 4) -> list[Tokens]:
    """One row; each layer's scores (h, n), -inf for what is not there."""
    layers = [torch.tensor([layer]) for layer in scores]
    every = LayerScores(tuple(layers))
    made = []
    for index, layer in enumerate(layers):
        padding = layer == -torch.inf
        positions = torch.arange(layer.shape[-1]).expand_as(layer).masked_fill(padding, -1)
        tokens = Tokens(
            features=torch.zeros(*layer.shape, 2),
            positions=positions,
            padding=padding,
            protected=torch.zeros_like(padding),
            seen=torch.tensor([seen]),
            signals={EveryLayer: every},
        )
        made.append(replace(tokens, site=Site(index, len(layers))))
    return made


def counts(keep: float | int, layers: list[Tokens]) -> list[list[int]]:
    return [across_layers(tokens, Budget.parse(keep)).counts[0].tolist() for tokens in layers]


def test_worked_example() -> None:
    """Two layers of two heads, two of four tokens each: eight in all, the best being 9, 9, 8, 8, 7, 7, 6 and the 5 that
    comes first, at layer 0, head 0."""
    layers = places([[9, 8, 7, 5], [1, 1, 1, 9]], [[8, 7, 6, 5], [0, 0, 0, 5]])
    assert counts(2, layers) == [[4, 1], [3, 0]]
    assert counts(0.5, layers) == [[4, 1], [3, 0]]
    assert counts(1.0, layers) == [[4, 4], [4, 4]]


def test_what_must_stay_comes_first_and_is_shared_evenly_where_it_does_not_fit() -> None:
    layers = places([[FORCED, FORCED, 9, 9], [FORCED, FORCED, 1, 1]], [[FORCED, FORCED, 8, 8], [torch.inf, 2, 1, 0]])
    assert counts(2, layers) == [[3, 2], [2, 1]]
    assert counts(3, layers) == [[4, 2], [4, 2]]
    forced = places(*[[[FORCED] * 4] * 2] * 3)
    assert counts(3, forced) == [[3, 3]] * 3


@pytest.mark.parametrize("keep", [0.5, 6, 1.0])
def test_no_more_than_an_earlier_compression_left(keep: float | int) -> None:
    """Of 12 seen, half is 6 for each of 4 heads; only 3, 4, 1 and 4 are there."""
    gone = -torch.inf
    layers = places([[gone, 1, 2, 3], [1, 2, 3, 4]], [[gone, gone, gone, 3], [1, 2, 3, 4]], seen=12)
    assert counts(keep, layers) == [[3, 4], [1, 4]]
