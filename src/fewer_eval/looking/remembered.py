"""A vision tower that looks at each picture once, whatever is asked of it.

Methods are compared on the same pictures hundreds of times, and the tower is frozen: what it made of a picture is kept,
with the queries and keys of its layers. Asked again, it hands them to the attention function that its configuration
names then, so that whoever listens there (fewer, for methods that read the tower) hears what it would have heard.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Kept = tuple[tuple[Tensor, ...], list[tuple[Tensor, Tensor]]]


class Remembered:
    """Stands in for the forward of one tower while it is attached."""

    def __init__(self, tower: Any) -> None:
        self.tower = tower
        blocks: Any = max((m for m in tower.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
        self.attentions: list[Any] = [
            next(m for m in block.modules() if hasattr(m, "config") and type(m).__name__.endswith("Attention"))
            for block in blocks
        ]
        self.known: dict[bytes, Kept] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        self.tower.forward = self._forward
        try:
            yield
        finally:
            del self.tower.forward

    def _forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        keys = [one.numpy().tobytes() for one in pixel_values]
        for key, one in zip(keys, pixel_values, strict=True):
            if key not in self.known:
                self.known[key] = self._look(one.unsqueeze(0), kwargs)
        found = [self.known[key] for key in keys]
        for layer, module in enumerate(self.attentions):
            name = module.config._attn_implementation
            if name in ("sdpa", "eager"):  # nobody listens
                break
            query, key = (torch.cat([attended[layer][i] for _, attended in found]) for i in (0, 1))
            ALL_ATTENTION_FUNCTIONS[name](module, query, key, key, None, scaling=query.shape[-1] ** -0.5)
        states = tuple(torch.cat(same) for same in zip(*(states for states, _ in found), strict=True))
        made: Any = BaseModelOutputWithPooling
        return made(last_hidden_state=states[-1], hidden_states=states)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _look(self, pixels: Tensor, kwargs: dict[str, Any]) -> Kept:
        attended: list[tuple[Tensor, Tensor]] = []
        own = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def seen(asked: Any, query: Tensor, key: Tensor, *args: Any, **more: Any) -> Any:
            attended.append((query, key))
            return own(asked, query, key, *args, **more)

        configs = {id(m.config): m.config for m in self.attentions}
        before = {key: config._attn_implementation for key, config in configs.items()}
        AttentionInterface.register("remembered", seen)
        for config in configs.values():
            config._attn_implementation = "remembered"
        try:
            output = type(self.tower).forward(self.tower, pixels, **{**kwargs, "output_hidden_states": True})
        finally:
            for key, config in configs.items():
                config._attn_implementation = before[key]
        return output.hidden_states, attended
