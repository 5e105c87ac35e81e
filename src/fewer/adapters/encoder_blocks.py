"""The blocks of an encoder, taken by role: what attends, and what each token does alone.

    x = mix(x)      x + scale1(attention(norm1(x)))        tokens meet
    x = feed(x)     x + scale2(mlp(norm2(x)))              each token alone: here there may be fewer of them

The host's own modules are called in the host's own order, no forward is copied. A shape of block is known by the names
of its parts; before it is trusted, it is tried out against the block's own forward, bit for bit, on random tokens. So a
host whose next version puts another part between is refused, not computed wrongly.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewer.types import UnsupportedModel

MASKS = ("attention_mask", "attn_mask")
"""What hosts call the mask they hand to a block."""
Mix = Callable[[Any, Tensor, Mapping[str, Any]], Tensor]
Feed = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """One way to build a block; `needs` are the parts that tell it."""

    hosts: str
    needs: tuple[str, ...]
    mix: Mix
    feed: Feed
    attention: str
    mlp: tuple[str, ...]


def _prenorm(
    hosts: str, norm1: str, attention: str, after1: tuple[str, ...], norm2: str, mlp: str, after2: tuple[str, ...]
) -> Shape:
    """A block that normalises before each part, and scales, or drops, what each part gives."""

    def mix(block: Any, x: Tensor, options: Mapping[str, Any]) -> Tensor:
        y = _first(getattr(block, attention)(getattr(block, norm1)(x), **options))
        return x + _through(block, after1, y)

    def feed(block: Any, x: Tensor) -> Tensor:
        return x + _through(block, after2, getattr(block, mlp)(getattr(block, norm2)(x)))

    return Shape(hosts, (norm1, attention, *after1, norm2, mlp, *after2), mix, feed, attention, (mlp,))


def _through(block: Any, names: Sequence[str], y: Tensor) -> Tensor:
    """What a part gave, through modules, or times a parameter where the block has one."""
    for name in names:
        part = getattr(block, name)
        if isinstance(part, nn.Module):
            y = part(y)
        elif part is not None:
            y = part * y
    return y


def _first(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


def _bert_mix(block: Any, x: Tensor, options: Mapping[str, Any]) -> Tensor:
    return _first(block.attention(x, **options))  # its residual and norm are inside


def _bert_feed(block: Any, x: Tensor) -> Tensor:
    return _first(block.output(block.intermediate(x), x))


def _old_vit_mix(block: Any, x: Tensor, options: Mapping[str, Any]) -> Tensor:
    return _first(block.attention(block.layernorm_before(x), **options)) + x


def _old_vit_feed(block: Any, x: Tensor) -> Tensor:
    return _first(block.output(block.intermediate(block.layernorm_after(x)), x))


_OUTPUT = ("intermediate", "output")
SHAPES = (
    _prenorm("timm's VisionTransformer", "norm1", "attn", ("ls1", "drop_path1"), "norm2", "mlp", ("ls2", "drop_path2")),
    _prenorm(
        "timm's EVA and BEiT", "norm1", "attn", ("gamma_1", "drop_path1"), "norm2", "mlp", ("gamma_2", "drop_path2")
    ),
    _prenorm(
        "transformers' DINOv2",
        "norm1", "attention", ("layer_scale1", "drop_path"), "norm2", "mlp", ("layer_scale2", "drop_path"),
    ),
    _prenorm(
        "transformers' ViT and DeiT",
        "layernorm_before", "attention", ("dropout",), "layernorm_after", "mlp", ("dropout",),
    ),
    _prenorm("transformers' CLIP and SigLIP", "layer_norm1", "self_attn", (), "layer_norm2", "mlp", ()),
    Shape(
        "transformers' ViT before 5.3", ("layernorm_before", "attention", "layernorm_after", *_OUTPUT),
        _old_vit_mix, _old_vit_feed, "attention", _OUTPUT,
    ),
    Shape("transformers' BERT", ("attention", *_OUTPUT), _bert_mix, _bert_feed, "attention", _OUTPUT),
)  # fmt: skip


HOSTS = "timm's VisionTransformer, EVA or BEiT, or transformers' ViT, DeiT, DINOv2, CLIP, SigLIP or BERT"


def shape_of(block: nn.Module) -> Shape | None:
    """The shape that a block's parts tell, the richest first."""
    return next((shape for shape in SHAPES if all(hasattr(block, name) for name in shape.needs)), None)


def blocks_of(model: nn.Module) -> list[tuple[str, list[Any], Shape]]:
    """Every outermost list of blocks of one known shape, with its name."""
    found: list[tuple[str, list[Any], Shape]] = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
            continue
        if any(name.startswith(f"{outer}.") for outer, _, _ in found):
            continue
        shapes = [shape_of(block) for block in module]
        if shapes[0] is not None and all(shape is shapes[0] for shape in shapes):
            found.append((name, list(module), shapes[0]))
    return found


def find(model: Any) -> tuple[str, list[Any], Shape] | None:
    """The blocks of an encoder, or None if the model is none; raises if there are several towers."""
    if not isinstance(model, nn.Module):
        return None
    found = blocks_of(model)
    if len(found) > 1:
        paths = [name.split(".") for name, _, _ in found]
        shared = next(i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1)
        if paths[0][shared].isdigit():
            raise UnsupportedModel(
                f"{type(model).__name__} has its blocks in several stages, where fewer knows encoders of one list"
            )
        names = ", ".join(".".join(["model", *path[: shared + 1]]) for path in paths)
        raise UnsupportedModel(f"{type(model).__name__} has several encoders: pass one of {names}")
    return found[0] if found else None


def width_of(block: nn.Module) -> int:
    """Features of a token: what a block's first norm, or its attention, takes."""
    for module in block.modules():
        if isinstance(module, nn.LayerNorm):
            return int(module.normalized_shape[0])
        if isinstance(module, nn.Linear):
            return int(module.in_features)
    raise UnsupportedModel(f"{type(block).__name__} has neither a LayerNorm nor a Linear to tell its width by")


def try_out(block: Any, shape: Shape, tokens: int) -> bool:
    """Whether the block's own forward returns a tuple; raises unless its parts, by role, give what it gives.

    `tokens` is how many to try it on: blocks with relative positions take one number alone.
    """
    like = next(block.parameters())
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, width_of(block), generator=draw).to(like.device, like.dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
        torch.manual_seed(0)  # a block in training drops at random, twice alike
        try:
            own = block.forward(x, **unmasked(block))  # not through its hooks: they are for real tokens
            torch.manual_seed(0)
            ours = shape.feed(block, shape.mix(block, x, unmasked(getattr(block, shape.attention))))
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise UnsupportedModel(
                f"{type(block).__name__} has the parts of {shape.hosts}, but does not take {tokens} tokens alone: "
                f"{error}"
            ) from error
    if not torch.equal(_first(own), ours):
        raise UnsupportedModel(
            f"{type(block).__name__} has the parts of {shape.hosts}, but they do not add up to what it computes; "
            "its version is one that fewer does not know"
        )
    return isinstance(own, tuple)


def unmasked(module: nn.Module) -> dict[str, Any]:
    """Arguments that say there is no mask, to a module that wants to be told."""
    return {"attention_mask": None} if "attention_mask" in inspect.signature(module.forward).parameters else {}


def padding_of(options: dict[str, Any], b: int, n: int, device: torch.device) -> Tensor:
    """Which tokens are padding, read off the mask that the host hands to its first block."""
    mask = next((options[name] for name in MASKS if options.get(name) is not None), None)
    if mask is None:
        return torch.zeros(b, n, dtype=torch.bool, device=device)
    if mask.shape[-1] != n or mask.shape[0] not in (1, b):
        raise UnsupportedModel(f"an attention mask of shape {tuple(mask.shape)} is not one over {n} keys")
    rows = mask.reshape(mask.shape[0], -1, n)
    seen = rows if rows.dtype is torch.bool else rows > torch.finfo(rows.dtype).min / 2
    there = seen.any(1)
    alike = (seen == there.unsqueeze(1)).all(-1)
    if rows.shape[1] == n:
        alike |= ~there  # what a padding token itself attends to does not matter
    biased = rows.dtype is not torch.bool and bool((rows.masked_fill(~seen, 0) != 0).any())
    if biased or not bool(alike.all()):
        raise UnsupportedModel("this attention mask says more than which tokens are padding, and cannot be shortened")
    padding: Tensor = (~there).expand(b, n)
    if bool((padding[:, :-1] & ~padding[:, 1:]).any()):
        raise UnsupportedModel("padding must come after the tokens: set tokenizer.padding_side = 'right'")
    return padding


def pools_of(model: nn.Module) -> Iterator[Any]:
    """Modules that pool all tokens, or that get their mean right after it was taken."""
    for module in model.modules():
        if "AttentionPool" in type(module).__name__:  # timm's AttentionPoolLatent, SigLIP's head
            yield module
        elif getattr(module, "global_pool", None) in ("avg", "avgmax") and hasattr(module, "fc_norm"):  # timm's
            yield module.fc_norm


def is_patch(module: nn.Module) -> bool:
    """Whether this is the convolution that cuts an image into patches."""
    return isinstance(module, nn.Conv2d) and module.stride == module.kernel_size and module.stride[0] > 1
