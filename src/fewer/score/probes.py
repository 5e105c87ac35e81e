"""Scores from the attention of a few queries that stand for all."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.score.attention import per_head, window_attention
from fewer.signals import ProbeQueries, Probes
from fewer.types import Tokens


def probe_attention(tokens: Tokens) -> Float[Tensor, "b h n"]:
    """Mean attention that the probes pay to each key, over the heads that share it."""
    probes = tokens.signal(Probes, ProbeQueries).window
    seen = window_attention(probes, tokens.features, tokens.positions, tokens.padding)
    return per_head(seen, tokens.positions.shape[1])


def onlookers(tokens: Tokens) -> Int[Tensor, "b h n"]:
    """How many of the queries that the probes stand for can see each key: its own and those after it, at least 1."""
    among = tokens.signal(Probes, ProbeQueries).among.view(-1, 1, 1)
    return torch.minimum(tokens.seen.view(-1, 1, 1) - tokens.positions, among).clamp(min=1)
