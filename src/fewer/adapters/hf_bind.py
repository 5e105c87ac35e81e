"""How fewer gets between a transformers decoder and its attention: two registered functions, nothing patched.

    config._attn_implementation = "fewer_sdpa"      while a compressed cache is in use, and back afterwards
    mask function "fewer_sdpa"                      the host's own
    attention function "fewer_sdpa"                 the host's own, unless the keys come from a cache layer of ours,
                                                    which then attends (and compresses) by itself

A layer of ours marks the keys it hands out; models pass them on to the attention function untouched.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fewer import fit
from fewer.adapters import hf_read
from fewer.adapters.encoder_blocks import HOSTS
from fewer.adapters.hf_rotary import HostRotary, find, multimodal
from fewer.adapters.peft import bare
from fewer.signals import ROTARY_NEEDS, Projection
from fewer.types import Method, MissingSignal, UnsupportedModel

MARK = "_fewer_layer"
BACKENDS = ("sdpa", "eager")
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
"""What model files call the output projection of their attention."""


@torch.compiler.disable  # type: ignore[untyped-decorator]  # uneven heads have no shape to compile for
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    backend: str,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function."""
    own = partial(backend_of(backend, module), module)
    layer = getattr(key, MARK, None)
    if layer is None:
        out: tuple[Tensor, Tensor | None] = own(query, key, value, attention_mask, **kwargs)
        return out
    return layer.attend(own, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]


def backend_of(name: str, module: nn.Module) -> Callable[..., Any]:
    if name == "eager":  # every model file has its own, which is not registered
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]
    return ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Host:
    """A model that was looked at and found fit."""

    model: PreTrainedModel
    config: Any
    attentions: tuple[nn.Module, ...]
    rotary: HostRotary | None
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """What the attention layers of the forward under way were given, by index, where a method asked for it."""

    @classmethod
    def of(cls, model: Any) -> "Host":
        """Look at a model; `UnsupportedModel` says what is wrong with it and what would work."""
        model = bare(model)
        name = type(model).__name__
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModel(
                f"{name} is neither a transformers decoder, such as LlamaForCausalLM, nor an encoder with blocks like "
                f"those of {HOSTS}"
            )
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UnsupportedModel(f"{name} is on the meta device and holds no weights; load them first")
        if model.config.is_encoder_decoder:
            raise UnsupportedModel(f"{name} is an encoder-decoder; only decoders with one cache can be compressed")
        config = model.config.get_text_config(decoder=True)
        attentions = tuple(
            m
            for m in model.modules()
            if getattr(m, "is_causal", False) and isinstance(getattr(m, "layer_idx", None), int)
        )
        depth = getattr(config, "num_hidden_layers", 0)
        if not attentions or len(attentions) != depth:
            raise UnsupportedModel(
                f"{name} has {len(attentions)} causal self-attention layers that know their index, of "
                f"{depth} layers: encoders, and decoders with other kinds of layers, cannot be "
                f"compressed; pass a decoder such as LlamaForCausalLM"
            )
        backend = config._attn_implementation.removeprefix("fewer_")
        if backend not in BACKENDS:
            raise UnsupportedModel(
                f"{name} runs attention by {backend!r}; load it with attn_implementation='sdpa' (or 'eager')"
            )
        attentions = tuple(sorted(attentions, key=lambda m: int(str(m.layer_idx))))
        plain = cls(model, config, attentions, None)
        kinds = plain.plain_layers()
        first = next((m for m, ours in zip(attentions, kinds, strict=True) if ours), attentions[0])
        return cls(model, config, attentions, find(model, first, plain.head_dim))

    @property
    def head_dim(self) -> int:
        """Features of a key."""
        return int(getattr(self.config, "head_dim", 0) or self.config.hidden_size // self.config.num_attention_heads)

    def layers(self) -> list[Any]:
        """Fresh cache layers of the kinds transformers itself would use."""
        layers = list(DynamicCache(config=self.config).layers)
        for layer in layers:
            if type(layer) is not DynamicLayer and not getattr(layer, "is_sliding", False):
                raise UnsupportedModel(
                    f"{type(self.model).__name__} keeps a {type(layer).__name__}, which is no key-value cache that "
                    f"can be compressed; full and sliding-window attention layers can be used"
                )
        return layers

    def plain_layers(self) -> list[bool]:
        """Which layers have an unbounded cache; sliding-window layers are bounded by themselves."""
        return [type(layer) is DynamicLayer for layer in self.layers()]

    def gives(self, method: Method) -> None:
        """Raise `MissingSignal` if the method needs what this model does not have, `UnsupportedModel` if no layer of it
        can be compressed, `FewerError` if the method is not fitted or would do nothing."""
        if not any(self.plain_layers()):
            raise UnsupportedModel(
                f"{type(self.model).__name__} has sliding-window layers only, which bound their cache by themselves"
            )
        fit.check(method, self.model)
        if getattr(method, "reads", None) is not None:
            hf_read.check(method, sum(self.plain_layers()))
        if getattr(method, "shortens", None) is not None:
            from fewer.adapters import hf_shorten  # which builds on this file

            hf_shorten.check(self, method)
        for need in method.needs:
            if isinstance(need, ROTARY_NEEDS) and self.rotary is None:
                raise MissingSignal(
                    f"{type(method).__name__} needs {type(need).__name__}, and {type(self.model).__name__} has no "
                    f"rotary position embedding that can be used by itself"
                )
            if getattr(need, "probe", False) and multimodal(self.model):
                raise UnsupportedModel(
                    f"{type(method).__name__} has the model read its prompt once more, and {type(self.model).__name__} "
                    f"counts positions in time, rows and columns, which are not known for what it would read"
                )
            if isinstance(need, Projection) and self.output(0) is None:
                raise MissingSignal(
                    f"{type(method).__name__} needs the output projection of each layer, and none was found in "
                    f"{type(self.attentions[0]).__name__} under the names {', '.join(OUTPUTS)}"
                )

    def output(self, index: int) -> Tensor | None:
        """The output projection of a layer, cut into query heads `(heads, e, hidden)`; None where none is found."""
        attention = self.attentions[index]
        found = [m for n, m in attention.named_children() if n in OUTPUTS and isinstance(m, nn.Linear)]
        if len(found) != 1:
            return None
        weight, heads = found[0].weight, self.config.num_attention_heads
        return weight.T.reshape(heads, -1, weight.shape[0])

    @property
    def attached(self) -> bool:
        return bool(self.config._attn_implementation.startswith("fewer_"))

    def attach(self, method: Method, cuts: bool = False) -> "Attachment":
        """Route the model's attention through fewer, with what the method needs, until the attachment is released.
        `cuts`: something decides between layers who goes on."""
        return Attachment(self, method, cuts)


def _remember(host: Host, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before an attention layer runs: hold on to its input until its cache layer has been shown it."""
    host.hidden[int(str(module.layer_idx))] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


_users: dict[int, list[Any]] = {}
"""Id of a config -> how many use it, the config, and what it said before: a model and its inner model share theirs."""


class Attachment:
    """One user of a model's rerouted attention. The last user of a config puts it back."""

    def __init__(self, host: Host, method: Method, cuts: bool) -> None:
        self.hooks: list[Any] = []
        if any(getattr(need, "hidden", False) for need in method.needs):
            self.hooks += [
                m.register_forward_pre_hook(partial(_remember, host), with_kwargs=True) for m in host.attentions
            ]
        if any(getattr(need, "probe", False) for need in method.needs):
            from fewer.adapters.hf_probe import after_forward  # which builds on this file

            self.hooks.append(host.model.register_forward_hook(after_forward, with_kwargs=True))
        if cuts or getattr(method, "shortens", None) is not None:
            from fewer.adapters import hf_shorten  # which builds on this file

            self.hooks += hf_shorten.hooks(host)
        self.configs = {id(c): c for c in [host.config, *(m.config for m in host.attentions)]}
        backend = host.config._attn_implementation.removeprefix("fewer_")
        name = f"fewer_{backend}"
        AttentionInterface.register(name, partial(attention, backend=backend))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[backend])
        for key, config in self.configs.items():
            _users.setdefault(key, [0, config, config._attn_implementation])[0] += 1
            config._attn_implementation = name

    def release(self) -> None:
        """Give the model's attention back; doing so twice changes nothing."""
        configs, self.configs = self.configs, {}
        for hook in self.hooks:
            hook.remove()
        for key, config in configs.items():
            _users[key][0] -= 1
            if _users[key][0] == 0:
                config._attn_implementation = _users.pop(key)[2]
