"""Linear layers in 8 bits: weights are held as whole numbers from -127 to 127, and so are inputs while they pass.

    x = m + s q_x        for each row of inputs: m the middle of its least and most, s half of what is between, / 127
    w = t q_w            for each row of weights: t its most, / 127
    y = (q_x @ q_w^T) s t + m sum(w) + b

What a row is scaled by is its own: what else is in a batch changes nothing. The product is the processor's own in 8
bits (torch's `_int_mm`, oneDNN's below it): fast where it has VNNI or AMX, right everywhere. Attention, norms and
embeddings stay as they are.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fewer.types import UnsupportedModel

ROWS = 256
"""Rows that are multiplied at a time: their whole numbers still lie in the cache when they are scaled."""

LEAST = 1 << 12
"""Layers of fewer weights stay as they are: a head of two labels is what the decision hangs on, and costs nothing."""


class Linear8(nn.Module):
    """A linear layer whose weights take a byte each."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        whole = (weight / scale[:, None]).round_()
        bias = torch.zeros_like(scale) if linear.bias is None else linear.bias.detach().float().clone()
        self.register_buffer("weight", whole.to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("total", whole.sum(1) * scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, scale, total, bias = (self.get_buffer(name) for name in ("weight", "scale", "total", "bias"))
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty(len(rows), len(weight))
        for at in range(0, len(rows), ROWS):
            part = rows[at : at + ROWS]
            least, most = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
            middle, step = (most + least) / 2, (most - least).clamp_(min=1e-12) / 254
            whole = torch._int_mm((part - middle).div_(step).round_().to(torch.int8), weight.t())
            here = out[at : at + ROWS].copy_(whole).mul_(step)
            torch.addcmul(bias, here, scale, out=here).addr_(middle[:, 0], total)
        return out.view(*x.shape[:-1], -1)


def eight_bits(model: Any) -> Any:
    """A copy of the model with its linear layers in 8 bits; all else is shared with it.

    Raises:
        UnsupportedModel: it is not in float32 on a CPU, or has no linear layers.
    """
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise UnsupportedModel(
            f"bits=8 is for models in float32 on a CPU; this {type(model).__name__} is in {weight.dtype} on "
            f"{weight.device}"
        )
    shared: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    made = copy.deepcopy(model, shared)
    found = [
        (parent, name, child)
        for parent in made.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.weight.numel() >= LEAST
    ]
    if not found:
        raise UnsupportedModel(f"bits=8: {type(model).__name__} has no linear layers to hold in 8 bits")
    for parent, name, child in found:
        setattr(parent, name, Linear8(child))
    return made.eval()
