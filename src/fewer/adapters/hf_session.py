"""The session behind `fewer.compress(model, ...)`: it hands the model a compressed cache where a call brings none."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from transformers import PreTrainedModel, cache_utils

from fewer.adapters.hf_bind import Host
from fewer.adapters.hf_cache import Cache
from fewer.adapters.hf_policy import Policy
from fewer.report import Report
from fewer.types import FewerError, UnsupportedModel

__all__ = ["Policy", "Run", "session"]


class Run:
    """The handle of one `fewer.compress` context."""

    def __init__(self, host: Host, policy: Policy) -> None:
        self._host, self._policy = host, policy
        self.cache: Cache | None = None

    @property
    def report(self) -> Report:
        """The report of the latest cache used inside the context."""
        if self.cache is None:
            raise FewerError("nothing was compressed yet: run the model inside the context first")
        return self.cache.report

    def hook(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """Before every forward of the model: see that it writes into a cache of ours."""
        names = inspect.signature(model.forward).parameters
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        for name in ("input_ids", "inputs_embeds"):
            if kwargs.get(name) is not None and kwargs[name].shape[1] == 0:
                raise FewerError(
                    f"{name} has shape {tuple(kwargs[name].shape)}: an empty prompt has nothing to compress"
                )
        config = model.config.get_text_config(decoder=True)
        if not (config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]):
            raise FewerError("use_cache is off, so there is no cache to compress; leave it on inside fewer.compress")
        past = given = kwargs.get("past_key_values")
        offloaded = getattr(past, "offloading", False)
        if past is None or (type(past) is cache_utils.DynamicCache and not offloaded and past.get_seq_length() == 0):
            past = kwargs["past_key_values"] = Cache.within(self._host, self._policy)
            kwargs["use_cache"] = True
            if any(getattr(layer, "record_past", False) for layer in getattr(given, "layers", ())):
                past.activate_past_recording()  # as the one that `generate` made was
        if not isinstance(past, Cache):
            kind = f"{type(past).__name__}{' with offloading' if offloaded else ''}"
            raise UnsupportedModel(
                f"past_key_values is a {kind} that fewer did not make; inside fewer.compress leave it and "
                f"cache_implementation out, or pass fewer.Cache(...)"
            )
        logits = kwargs.get("logits_to_keep")
        if given is not None and isinstance(logits, int) and logits > 0:  # `generate` names both
            tokens = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
            past.expect(tokens.shape[1], logits - 1)
        if kwargs.get("output_attentions") and any(layer.parts for layer in past.shared.members):
            past.shared.note(
                "output_attentions: layers that hold compressed entries give no weights: heads hold different tokens"
            )
        self.cache = past
        return (), kwargs


_in_use: "WeakSet[Any]" = WeakSet()
"""The attention modules of models that are inside a session: a part of a model shares them with the whole."""


@contextmanager
def session(model: Any, policy: Policy) -> Iterator[Run]:
    """Attach, hook, yield the run, and undo both whatever happened."""
    host = Host.of(model)
    run = Run(host, policy)
    Cache.within(host, policy)  # raises now what the first forward would raise
    if any(part in _in_use for part in host.attentions):
        raise FewerError(f"this {type(model).__name__} is inside fewer.compress already; leave that context first")
    _in_use.update(host.attentions)
    handle = host.model.register_forward_pre_hook(run.hook, with_kwargs=True)  # first, so that others see its cache
    attachment = host.attach(policy.method, policy.cutter is not None)
    try:
        yield run
    finally:
        handle.remove()
        attachment.release()
        _in_use.difference_update(host.attentions)
