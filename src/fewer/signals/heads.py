"""What the attention of an encoder's block just did: queries, keys and values, as its heads see them.

The host hands them over as they are, so asking for them costs nothing; what is computed from them is in
`fewer.score.heads`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from fewer.errors import MissingSignal


@dataclass(frozen=True)
class Heads:
    """The heads of the block that is being shortened. Only encoders give them: a cache sees its queries once."""

    key_bytes: ClassVar[int] = 0

    def start(self) -> Any:
        raise MissingSignal(
            "this method reads the heads of an encoder's block (a vision transformer, a text encoder); a decoder's "
            "key-value cache has none to give: `fewer methods --family kv` lists the methods for caches"
        )


@dataclass(frozen=True)
class Attended:
    """Queries, keys and values as attention got them: with their positions rotated in, where the host rotates.

    `bias` is what is added to the logits of each key: the logarithm of its mass, -inf for padding; None for zeros.
    `relative` is what the host itself adds between tokens: a bias of its own, or its mask. `scaling` is the factor on
    the logits. `classed` says whether the first token is a class token, where there are tokens before the patches.
    """

    query: Float[Tensor, "b h n d"]
    key: Float[Tensor, "b h n d"]
    value: Float[Tensor, "b h n e"]
    scaling: float
    bias: Float[Tensor, "b 1 1 n"] | None = None
    relative: Float[Tensor, "b h n n"] | None = None
    classed: bool = True
