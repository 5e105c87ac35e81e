"""The seam at which an encoder's attention is read and weighted: its call of `scaled_dot_product_attention`.

While a block attends, torch hands that call to us. So we see the queries and keys that the host's attention really
uses, whatever it normalised or rotated, and need to know no attention module. Two things are changed on the way:

    masses      log(mass) is added to the logits of each key, so that a merged token counts as all it stands for; as an
                additive mask, or as one more channel of queries and keys, which needs no mask and keeps flash kernels
    relative    a host's own bias between the original tokens is cut to those that are left, on both axes
    positions
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fewer.signals.heads import Attended
from fewer.types import UnsupportedModel

MASSES = ("mask", "channel", "off")


class Seam(TorchFunctionMode):
    """Active while one block attends. `attended` is what it saw, None if the host attends some other way."""

    def __init__(self, bias: Tensor | None, form: str, cut: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.bias, self.form, self.cut = bias, form, cut
        self.attended: Attended | None = None
        self.relative = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **more: Any,
    ) -> Tensor:
        if is_causal:
            raise UnsupportedModel(
                "this encoder attends causally, and tokens that are merged have no order to look back in"
            )
        scaling = query.shape[-1] ** -0.5 if scale is None else scale
        relative = None if attn_mask is None else self.cut(additive(attn_mask, query.dtype))
        between = None if relative is None else relative.expand(*query.shape[:-1], key.shape[-2])
        self.attended = Attended(query, key, value, scaling, self.bias, between)
        self.relative = attn_mask is not None
        if self.form == "host":
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, scale=scale, **more)
        bias = None if self.bias is None else self.bias.to(query.dtype)
        if self.bias is not None and self.form == "channel" and not bool(self.bias.isinf().any()):
            query, key, value, wide = augmented(query, key, value, self.bias, scaling)
            out = F.scaled_dot_product_attention(query, key, value, relative, dropout_p, scale=scaling, **more)
            return out[..., :wide]
        mask = relative if bias is None else bias if relative is None else relative + bias
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale, **more)


def augmented(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Queries and keys with channels whose product is the bias, all padded to a multiple of 8; and values' true width.

    The query's channel is a power of two, exact in every dtype. In half precision the key's bias takes two channels,
    its rounded value and what rounding left over.

    >>> q, k, v = torch.randn(3, 1, 2, 5, 8).unbind(0)
    >>> bias = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).log().view(1, 1, 1, 5)
    >>> wider_q, wider_k, _, _ = augmented(q, k, v, bias, 8**-0.5)
    >>> torch.allclose(wider_q @ wider_k.mT * 8**-0.5, q @ k.mT * 8**-0.5 + bias, atol=1e-5)
    True
    """
    factor = 2.0 ** round(math.log2(1 / scaling))
    column = (bias / (scaling * factor)).float().transpose(-1, -2).expand(*key.shape[:-1], 1)
    high = column.to(key.dtype)
    columns = [high] if key.dtype is torch.float32 else [high, (column - high.float()).to(key.dtype)]
    ones = query.new_full((*query.shape[:-1], len(columns)), factor)
    more = -(query.shape[-1] + len(columns)) % 8
    query = F.pad(torch.cat([query, ones], -1), (0, more))
    key = F.pad(torch.cat([key, *columns], -1), (0, more))
    return query, key, F.pad(value, (0, query.shape[-1] - value.shape[-1])), value.shape[-1]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of booleans, as what it adds."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


def gathered(bias: Tensor, kept: Tensor, originals: int) -> Tensor:
    """A bias between all original tokens, `(..., n, n)`, cut to the tokens `kept` `(b, k)` on both axes."""
    if bias.shape[-1] != originals or bias.shape[-2] not in (1, originals):
        raise UnsupportedModel(
            f"this encoder adds a bias of shape {tuple(bias.shape)} to its attention, which is not one between its "
            f"{originals} tokens"
        )
    b, k = kept.shape
    bias = bias.expand(b, *bias.shape[-3:]) if bias.ndim == 4 else bias.expand(b, 1, *bias.shape[-2:])
    columns = bias.gather(-1, kept[:, None, None].expand(*bias.shape[:-1], k))
    if bias.shape[-2] == 1:
        return columns
    return columns.gather(-2, kept[:, None, :, None].expand(b, bias.shape[1], k, k))
