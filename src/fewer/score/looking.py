"""Scores of visual tokens from what a prompt's text looks at."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewer.errors import MissingSignal
from fewer.signals.visual import Looked


def asking(looked: Looked, method: object) -> Int[Tensor, " r"]:
    """The rows of the text tokens that ask: those after all of these visual tokens, as no other sees each of them."""
    rows = (looked.text > looked.visual.max()).nonzero().flatten()
    if not len(rows):
        raise MissingSignal(
            f"{type(method).__name__} has the text after a picture ask about it, and none comes after this one: the "
            "prompt, or the chunk of it that is read, ends with its picture. Put text after it, prefill without "
            "prefill_chunk_size or in chunks that do not end there, or take a method that asks nothing, such as "
            "'divprune' or 'uniform'"
        )
    return rows


def ahead(scores: Float[Tensor, "1 n"], marked: Bool[Tensor, " n"]) -> Float[Tensor, "1 n"]:
    """Scores by which all marked tokens come before all others, each kind in its own order; as whole numbers, so that
    no difference is lost in rounding."""
    ranks: Tensor = scores.argsort(dim=-1, stable=True).argsort(dim=-1).float()
    first: Tensor = ranks + marked * ranks.shape[-1]
    return first


def level(looked: Looked, rows: Int[Tensor, " r"]) -> Float[Tensor, "r n"]:
    """The scaled product of an all-ones query and key at the places of these text tokens and of the visual ones: what
    positions alone say."""
    if looked.turns is None:
        raise MissingSignal("the turns of the latest forward were not gathered here")
    cos, sin = looked.turns
    half = cos.shape[-1] // 2
    ones = torch.cat([cos[:, :half] - sin[:, :half], cos[:, half:] + sin[:, half:]], -1)
    beside = looked.query.shape[-1] - cos.shape[-1]  # features that are not turned
    both = ones[looked.text[rows] - looked.before] @ ones[looked.visual - looked.before].T
    scaled: Tensor = (both + beside) * looked.scaling
    return scaled
