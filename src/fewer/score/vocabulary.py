"""What visual tokens look like to a language model: the words whose embeddings are nearest to them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK = 8192


class Words(NamedTuple):
    """The ids of the nearest words, nearest first, and how near they are."""

    ids: Int[Tensor, "n k"]
    cosine: Float[Tensor, "n k"]


def nearest_words(x: Float[Tensor, "n d"], words: Float[Tensor, "v d"], k: int) -> Words:
    """The `k` words of greatest cosine of each of `x`; `words` are read piece by piece."""
    unit = F.normalize(x.float(), dim=-1)
    best, ids = unit.new_zeros(len(x), 0), torch.zeros(len(x), 0, dtype=torch.long, device=x.device)
    for first in range(0, len(words), CHUNK):
        some = F.normalize(words[first : first + CHUNK].float(), dim=-1)
        near = (unit @ some.T).topk(min(k, len(some)))
        both = torch.cat([best, near.values], 1).sort(dim=1, descending=True, stable=True)
        ids = torch.cat([ids, first + near.indices], 1).gather(1, both.indices)[:, :k]
        best = both.values[:, :k]
    return Words(ids, best)


def common(ids: Int[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """For each id, the share of the n tokens that have it among theirs."""
    _, at, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    share: Tensor = counts[at].float() / len(ids)
    return share


def named(ids: Int[Tensor, "n k"], some: tuple[int, ...]) -> Bool[Tensor, " n"]:
    """The tokens that have one of these ids among theirs."""
    return torch.isin(ids, torch.tensor(some, device=ids.device)).any(-1)
