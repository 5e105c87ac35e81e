"""How much a number stands apart from the numbers around it."""

import torch
from jaxtyping import Float
from torch import Tensor

APART = 1.5
"""From this factor on a number counts as an outlier, as in scikit-learn where no share of outliers is named."""


def local_outlier_factor(values: Float[Tensor, " n"], k: int) -> Float[Tensor, " n"]:
    """Breunig et al. (2000): how much denser the places of a number's k nearest are than its own; about 1 inside a
    crowd.

    >>> local_outlier_factor(torch.tensor([0.0, 1.0, 2.0, 3.0, 40.0]), 2).gt(APART).tolist()
    [False, False, False, False, True]
    """
    values = values.double()
    k = min(k, len(values) - 1)
    if k < 1:
        return torch.ones_like(values).float()
    apart = (values.unsqueeze(1) - values).abs().fill_diagonal_(torch.inf)
    near = apart.topk(k, largest=False)
    reach = torch.maximum(near.values, near.values[:, -1][near.indices])
    density = 1 / (reach.mean(1) + 1e-10)
    return (density[near.indices].mean(1) / density).float()


def outliers(values: Float[Tensor, " n"], k: int) -> int:
    """How many of the numbers are."""
    return int((local_outlier_factor(values, k) > APART).sum())
