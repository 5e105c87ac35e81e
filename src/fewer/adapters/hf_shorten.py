"""A prompt that gets shorter on its way through the layers: later ones really compute on fewer tokens.

    Layer.attend at the layer a method names     scores -> method.go_on -> Passed: which tokens of this forward go on
    pre-hook of every decoder layer after it     hidden states, positions, rotary tables and mask, cut down together
    Layer.attend there                           takes in fewer columns than the forward has, and counts them all

A method asks for it by `shortens(layers)`, the layer after which fewer tokens are read, and `go_on(tokens, scores)`,
a plan for a forward's tokens `(b, n)`. A `Cutter` (of a vision-language model) decides in the pre-hook itself, before
the first layer or after any, and as often as it likes. Forwards of one token, and of a frozen cache, are left as they
are; chunks of a prompt and later turns are shortened each by itself.

The model's output keeps its shape: the logits of tokens that stayed behind are no numbers (nan), the others stand in
their own columns.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fewer.adapters.hf_bind import MARK, Host
from fewer.adapters.hf_decide import look
from fewer.adapters.hf_passed import Passed
from fewer.compress import rate
from fewer.signals import marked_last
from fewer.types import FewerError, UnsupportedModel

if TYPE_CHECKING:
    from fewer.adapters.hf_layer import Layer

FOR_EACH_TOKEN = ("hidden_states", "position_ids", "position_embeddings")
"""What decoder layers are given that must have an entry for each token."""


@torch.no_grad()
def pass_on(layer: "Layer", padding: Tensor | None, q: int) -> None:
    """At the layer that the method names: decide who goes on, out of the `q` tokens that were just read."""
    shared, last = layer.shared, len(layer.shared.host.attentions) - 1
    method: Any = shared.policy.method
    after = getattr(method, "shortens", None)
    if after is None or layer.place != after(shared.layers) or layer.index == last:
        return
    start = layer._clock()
    tokens, _, _ = look(layer, method, "prefill")
    scores = rate(method, tokens)
    (b, h, n), device = tokens.positions.shape, scores.device
    padding = torch.zeros(b, q, dtype=torch.bool, device=device) if padding is None else padding
    new = (~padding).sum(1, keepdim=True)  # (b, 1)
    most = int(new.max())
    missing = torch.arange(most, device=device) < most - new  # (b, most)
    at, wide = slice(n - most, n), missing.unsqueeze(1).expand(b, h, most)  # what is newest stands last, at every head
    fresh = replace(
        tokens,
        features=tokens.features[..., at, :],
        values=None if tokens.values is None else tokens.values[..., at, :],
        positions=tokens.positions[..., at],
        protected=tokens.protected[..., at] & ~wide,
        mass=None if tokens.mass is None else tokens.mass[..., at],
        padding=wide,
    )
    plan = method.go_on(fresh, scores[..., at].masked_fill(wide, -torch.inf))
    plan.check(missing)
    if bool((plan.counts == new.squeeze(1)).all()):
        return
    there = plan.survivors >= 0
    aligned = marked_last(there)  # what is not there first
    there, survivors = there.gather(1, aligned), plan.survivors.gather(1, aligned).clamp(min=0)
    columns = marked_last(~padding)[:, q - most :]  # (b, most), padding first
    shared.passed = Passed(
        columns.gather(1, survivors).masked_fill(~there, -1),
        (survivors - (most - new)).masked_fill(~there, -1),
        q,
        new.flatten().tolist(),
    )
    layer.seconds += layer._clock() - start


class Sliding(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """A sliding-window layer of the host that some tokens never reach.

    A token that did not go on keeps its column, so that the window stays as long as the model thinks it is; its key is
    no number, which tells it from all others wherever the columns go, and attention is kept from seeing it.
    """

    keys: Tensor  # type: ignore[assignment]
    values: Tensor  # type: ignore[assignment]
    passed: Passed | None = None
    """What the next update brings, where that is less than the forward has."""

    @property
    def before(self) -> int:
        """Columns that the next forward sees beside its own."""
        return min(self.keys.shape[2], self.sliding_window - 1) if self.is_initialized else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        passed, self.passed = self.passed, None
        if passed is None:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
        else:
            keys, values, before = key_states, value_states, self.before
            if before:
                keys = torch.cat([self.keys[:, :, -before:], keys], dim=2)
                values = torch.cat([self.values[:, :, -before:], values], dim=2)
            super().update(passed.spread(key_states), passed.spread(value_states, 0.0), *args, **kwargs)
        marked = keys.view_as(keys)
        setattr(marked, MARK, self)
        return marked, values

    def attend(
        self, own: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        """The host's attention, blind to what is not there."""
        absent = key[:, 0, :, 0].isnan()
        if bool(absent.any()):
            if mask is None:  # a single token, which sees all
                mask = query.new_zeros(1, 1, query.shape[2], key.shape[2])
            hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            mask = mask.expand(len(key), -1, -1, -1).masked_fill(absent[:, None, None], hidden)
            key = key.masked_fill(absent[:, None, :, None], 0)
        return own(query, key, value, mask, **kwargs)


def blocks(host: Host) -> list[nn.Module]:
    """The decoder layers: of the modules that hold one attention layer and no other, the largest."""
    names = {module: name.split(".") for name, module in host.model.named_modules()}
    paths = [names[attention] for attention in host.attentions]
    found = []
    for path in paths:
        depth = next(i for i in range(1, len(path) + 1) if sum(other[:i] == path[:i] for other in paths) == 1)
        found.append(host.model.get_submodule(".".join(path[:depth])))
    return found


def _after(host: Host, method: Any) -> int:
    """The model's last layer that reads everything."""
    ours = [index for index, mine in enumerate(host.plain_layers()) if mine]
    return ours[int(method.shortens(len(ours)))]


def check(host: Host, method: Any) -> None:
    """Raise if the model's later layers cannot be given fewer tokens."""
    name = f"{type(method).__name__} gives later layers fewer tokens"
    if any(getattr(need, "probe", False) or getattr(need, "everywhere", False) for need in method.needs):
        raise FewerError(f"{name}, so it cannot have needs that wait for the last of them")
    check_later(host, name, _after(host, method))


def check_later(host: Host, name: str, after: int) -> None:
    """Raise if the layers after this one cannot be given fewer tokens."""
    later = list(zip(host.layers(), blocks(host), strict=True))[after + 1 :]
    for layer, block in later:
        if not {"hidden_states", "attention_mask"} <= inspect.signature(block.forward).parameters.keys():
            raise UnsupportedModel(
                f"{name}, and {type(block).__name__} of {type(host.model).__name__} does not take hidden_states and "
                f"attention_mask; methods that only cut the cache can be used"
            )
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedModel(
                f"{name}, and a {type(layer).__name__} of {type(host.model).__name__} counts on all of them; methods "
                f"that only cut the cache can be used"
            )


def prepare(host: Host, method: Any, layers: list[Any]) -> str:
    """Have the cache's later sliding-window layers bear missing tokens; a remark for the report."""
    after = _after(host, method)
    prepare_later(after, layers)
    return (
        f"layers after layer {after} read only the tokens of a prompt that go on; no others have logits, and the last "
        f"one always has"
    )


def prepare_later(after: int, layers: list[Any]) -> None:
    """Have sliding-window layers after this one bear missing tokens."""
    for index, layer in enumerate(layers[after + 1 :], start=after + 1):
        if type(layer) is DynamicSlidingWindowLayer:
            layers[index] = Sliding(layer.sliding_window)


def hooks(host: Host) -> list[Any]:
    """Hook a model's decoder layers; the hooks act where a cache of ours has let fewer tokens go on."""
    layers = blocks(host)
    made = [host.model.register_forward_pre_hook(_refuse, with_kwargs=True)]
    for index, block in enumerate(layers):
        names = tuple(inspect.signature(block.forward).parameters)
        made.append(block.register_forward_pre_hook(partial(_shorten, index, names), with_kwargs=True))
    made.append(layers[-1].register_forward_hook(_arrived, with_kwargs=True))
    return made


def _cache_of(things: Any) -> Any:
    from fewer.adapters.hf_cache import Cache  # which builds on this file

    return next((thing for thing in things if isinstance(thing, Cache)), None)


def _shorten(
    index: int, names: tuple[str, ...], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a decoder layer: hand it the tokens that go on, and no others."""
    cache = _cache_of((*kwargs.values(), *args))
    if cache is None:
        return None
    given, shared = {**dict(zip(names, args, strict=False)), **kwargs}, cache.shared
    cutter, fresh = shared.cutter, shared.passed is None or index not in shared.passed.seen
    if cutter is not None and fresh and not shared.frozen and index - 1 in cutter.after:
        made = cutter.cut(index - 1, given, cache)
        if made is not None:
            shared.passed, given["hidden_states"] = made
            shared.passed.whole = False
    passed: Passed | None = shared.passed
    if passed is None or index in passed.seen:
        return None
    layer, mask = cache.layers[index], given.get("attention_mask")
    passed.seen.add(index)
    dtype = given["hidden_states"].dtype
    for name, thing in given.items():
        if name == "attention_mask" or (name == "hidden_states" and not passed.whole):
            continue
        if name in passed.moved:
            given[name] = passed.moved[name]
            continue
        own = name == "hidden_states"  # read once, and too large to hold on to
        given[name] = cut = passed.of(thing) if own else passed.once(id(thing), thing, partial(passed.of, thing))
        if name in FOR_EACH_TOKEN and thing is not None and cut is thing:
            raise UnsupportedModel(
                f"{type(block).__name__} is given {name} that have no entry for each of its {passed.total} tokens, so "
                f"they cannot be cut down to those that go on"
            )
    passed.whole = False
    if isinstance(layer, Sliding):
        layer.passed, before = passed, layer.before
    else:
        before = layer.keys.shape[2] if layer.is_initialized else 0
    given["attention_mask"] = passed.once((id(mask), before), mask, partial(passed.mask, mask, before, dtype))
    placed = names[: len(args)]  # others look at what a layer is given by its place, transformers' hidden states do
    return tuple(given.pop(name) for name in placed), given


def _arrived(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """After the last decoder layer: put those that went on back into their columns, and forget them."""
    cache = _cache_of((*kwargs.values(), *args))
    passed: Passed | None = None if cache is None else cache.shared.passed
    if passed is None:
        return None
    cache.shared.passed = None
    states, *rest = output if isinstance(output, tuple) else (output,)
    states = passed.spread(states.unsqueeze(1)).squeeze(1)
    return (states, *rest) if isinstance(output, tuple) else states


def _refuse(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the model: refuse what needs the logits of tokens that may stay behind."""
    given = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
    cache = _cache_of(given.values())
    if cache is None or given.get("labels") is None or cache.shared.frozen:
        return
    method = cache.shared.policy.method
    if getattr(method, "shortens", None) is not None or cache.shared.cutter is not None:
        name = type(method).__name__ if cache.shared.cutter is None else "shortening a prompt"
        raise FewerError(
            f"labels: a loss is over all tokens of a prompt, and {name} has logits of those alone that go on to the "
            f"last layer"
        )
