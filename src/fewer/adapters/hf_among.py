"""A prompt of which only some tokens attend, and only to each other.

A method asks for it by `among(tokens, scores)`, a plan for what a layer was just given: who takes part at each head.
Queries, keys and values of those are gathered, so that attention costs their number squared; the others get zeros:
the layer's attention adds nothing to them. Only the first forward of a cache is read so; what comes later attends to
all that is held.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fewer.adapters.hf_decide import look
from fewer.compress import rate
from fewer.types import UnsupportedModel

if TYPE_CHECKING:
    from fewer.adapters.hf_layer import Layer


def takes_part(layer: "Layer", q: int) -> bool:
    """Whether the forward of q tokens that a layer is about to attend to is one of which only some take part."""
    policy = layer.shared.policy
    if getattr(policy.method, "among", None) is None or policy.idle or not policy.covers("prefill"):
        return False
    return q > 1 and layer.length == 0 and not layer.shared.frozen and not layer.shared.probing


def attend_among(
    layer: "Layer", query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """Attention `(b, q, heads, e)` of those tokens to each other that the method names; zeros for the others."""
    method: Any = layer.shared.policy.method
    if softcap is not None:
        raise UnsupportedModel(
            f"layer {layer.index} caps its logits, and {type(method).__name__} attends to a prompt without that"
        )
    (b, heads, q, d), h = query.shape, key.shape[1]
    start = layer._clock()
    tokens, _, order = look(layer, method, "prefill")
    plan = method.among(tokens, rate(method, tokens))
    plan.check(tokens.padding)
    there = plan.survivors >= 0
    columns = torch.where(there, order.gather(2, plan.survivors.clamp(min=0)), q)  # (b, h, k)
    layer.seconds += layer._clock() - start
    # in a plan what fills up shorter heads stands last, so with causal attention nobody else sees it
    at = columns.clamp(max=q - 1).unsqueeze(-1)
    keys, values = (x.gather(2, at.expand(-1, -1, -1, x.shape[-1])) for x in (key, value))
    wide = at.unsqueeze(2).expand(b, h, heads // h, columns.shape[-1], 1)  # query heads of a group share a key head
    grouped = query.view(b, h, heads // h, q, d).gather(3, wide.expand(*wide.shape[:-1], d))
    mixed = scaled_dot_product_attention(
        grouped.flatten(0, 1),
        keys.flatten(0, 1).unsqueeze(1).expand(-1, heads // h, -1, -1),
        values.flatten(0, 1).unsqueeze(1).expand(-1, heads // h, -1, -1),
        is_causal=True,
        scale=scaling,
    ).view(b, h, heads // h, -1, value.shape[-1])
    out = mixed.new_zeros(b, h, heads // h, q + 1, value.shape[-1])  # fillers land in a spare column
    to = columns[:, :, None, :, None].expand_as(mixed)
    return out.scatter(3, to, mixed)[:, :, :, :q].reshape(b, heads, q, -1).transpose(1, 2).contiguous()
