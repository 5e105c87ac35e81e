"""Have the model read something more before its cache is cut: the prompt once again, or tokens still to come.

forward ends -> for each probing need: the model reads `need.inputs(...)` after the prompt; layers show their
observers the attention and keep nothing of it -> all layers are compressed together
"""

import inspect
import time
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fewer.types import FewerError, MissingSignal


def after_forward(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """The forward hook: probe and compress, if the cache of this forward waits for it."""
    from fewer.adapters.hf_cache import Cache  # which attaches this

    names = list(inspect.signature(model.forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    cache = given.get("past_key_values")
    if not isinstance(cache, Cache) or cache.shared.probing or not any(layer.due for layer in cache.shared.members):
        return
    ids = given.get("input_ids")
    if ids is None:
        raise MissingSignal(
            f"{type(cache.shared.policy.method).__name__} has the model read its prompt again and needs its token ids; "
            f"this call passed inputs_embeds"
        )
    probe(model, cache, ids, given.get("attention_mask"), given.get("position_ids"))
    cache.settle()


@torch.no_grad()
def probe(model: Any, cache: Any, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> None:
    """Run the model once more for every probing need of the cache's method."""
    b, q = ids.shape
    shared, names = cache.shared, inspect.signature(model.forward).parameters
    if mask is not None and mask.ndim != 2:
        raise FewerError(f"attention_mask has shape {tuple(mask.shape)}: probing methods need one of (batch, tokens)")
    seen = cache.get_seq_length()
    before = torch.ones(b, seen, dtype=torch.long, device=ids.device) if mask is None else mask.long()
    if positions is None:
        upcoming = torch.full((b, 1), seen, device=ids.device)
    else:  # one after the last real token of this forward
        upcoming = positions.expand(b, q).masked_fill(before[:, -q:] == 0, -1).amax(1, keepdim=True) + 1
    for need in [need for need in shared.policy.method.needs if getattr(need, "probe", False)]:
        start = time.perf_counter()
        shared.probing = need
        own = list(cache.layers)
        try:
            for more, real in need.inputs(ids, before[:, -q:].bool()):
                # sliding-window layers store what they read, each in new tensors: they read into copies
                cache.layers = [layer if layer in shared.members else copy(layer) for layer in own]
                call: dict[str, Any] = {
                    "attention_mask": torch.cat([before, real.long()], 1),
                    "position_ids": upcoming + (real.long().cumsum(1) - 1).clamp(min=0),
                    "logits_to_keep": 1,
                    "use_cache": True,
                }
                call = {name: value for name, value in call.items() if name in names}
                model(input_ids=more, past_key_values=cache, **call)
        finally:
            shared.probing, cache.layers = None, own
        took = (time.perf_counter() - start) / len(shared.members)
        for layer in shared.members:
            layer.watched[need] = layer.watched.get(need, 0.0) + took
