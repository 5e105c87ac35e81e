"""A transformers decoder's own rotary embedding, as a rotation that methods can use.

The model's own functions do the rotating, so half-split, interleaved and partial layouts need no code here. Whether
they really are rotations is tried out once; a model where they are not simply has no rotary signal.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

STATIC = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary kinds whose angles do not depend on what was seen: others change their tables when they are asked."""


class HostRotary:
    """Rotations by the tables of `module` and the function `apply` of the model's own file."""

    def __init__(
        self, module: nn.Module, apply: Callable[..., tuple[Tensor, Tensor]], layer_type: str | None, width: int
    ) -> None:
        self.module, self.apply, self.layer_type, self.width = module, apply, layer_type, width
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # positions and their tables: all layers ask for one
        self.scale = float(self._raw(torch.zeros(1, 1, dtype=torch.long))[0].max())  # cos(0) times the model's factor

    def _raw(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        last = self._last
        if last is None or last[0].device != positions.device or not torch.equal(last[0], positions):
            like = torch.empty(0, device=positions.device)  # float32: rotating back and forth must not lose digits
            cos, sin = self.module(like, positions, *([self.layer_type] if self.layer_type else []))
            last = self._last = positions, cos, sin
        return last[1], last[2]

    def forget(self) -> None:
        """The forward is over; hold none of its tables."""
        self._last = None

    def turn(self, x: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """Rotate `(b, h, n, d)` by positions `(b, n)` or `(b, h, n)`, or back; lengths and dtype are kept."""
        shape = x.shape
        if positions.ndim == 3:  # heads with positions of their own: treat them as rows
            x, positions = x.flatten(0, 1).unsqueeze(1), positions.flatten(0, 1)
        cos, sin = self._raw(positions)
        cos, sin = cos / self.scale, (-sin if back else sin) / self.scale
        return self.apply(x.float(), x[:, :1].float(), cos, sin)[0].to(x.dtype).view(shape)

    def mean_matrix(self, positions: Tensor) -> Tensor:
        """The `(d, d)` matrix that is the mean of the rotations at `positions` `(p,)`."""
        cos, sin = (table.mean(1, keepdim=True) / self.scale for table in self._raw(positions.unsqueeze(0)))
        basis = torch.eye(self.width, device=positions.device)[None, None]
        return self.apply(basis, basis, cos, sin)[0][0, 0].T  # row i is where basis vector i went


def find(model: nn.Module, attention: nn.Module, head_dim: int) -> HostRotary | None:
    """The rotary embedding that `attention` uses, or None where the model has none that can be used by itself."""
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    found = (getattr(m, "rotary_emb", None) for m in model.modules())
    module = next((m for m in found if isinstance(m, nn.Module)), None)
    if apply is None or module is None or multimodal(model):
        return None
    layer_type = None
    if "layer_type" in inspect.signature(module.forward).parameters:
        layer_type = getattr(attention, "layer_type", None) or "full_attention"
    kind: Any = getattr(module, "rope_type", "default")
    kind = kind.get(layer_type, "default") if isinstance(kind, dict) else kind
    if kind not in STATIC:
        return None
    try:
        rotary = HostRotary(module, apply, layer_type, head_dim)
        return rotary if _rotates(rotary, head_dim, next(model.parameters()).device) else None
    except (TypeError, ValueError, RuntimeError):  # tables or functions of another shape, as in multimodal rotary
        return None


def multimodal(model: nn.Module) -> bool:
    """Whether a token's position is one of time, row and column, and so none that can be counted along a row."""
    config: Any = getattr(model, "config", None)
    rope = getattr(config and config.get_text_config(decoder=True), "rope_parameters", None) or {}
    # up to 5.2 the embedding itself does not say it
    return "mrope_section" in rope or any(hasattr(m, "mrope_section") for m in model.modules())


def _rotates(rotary: HostRotary, d: int, device: torch.device) -> bool:
    x = torch.linspace(-1, 1, 3 * d, device=device).view(1, 1, 3, d)
    a, b = torch.tensor([[1, 5, 70]], device=device), torch.tensor([[2, 9, 4]], device=device)
    there = rotary.turn(x, a)
    return (
        torch.allclose(rotary.turn(there, a, back=True), x, atol=1e-4)
        and torch.allclose(rotary.turn(there, b), rotary.turn(x, a + b), atol=1e-4)
        and not torch.allclose(there, x, atol=1e-4)
    )
