"""A vision transformer or text encoder whose blocks pass fewer and fewer tokens on, for as long as a context lasts.

    block i:   x = mix(x)                  every token that is there attends; the seam weighs keys by their mass
               plan = step(method, ...)    who goes on
               x = plan.apply(x)
               x = feed(x)                 the rest of the block, on fewer tokens

The blocks' `forward` is replaced on the instances, and taken off again; no class is touched.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewer.adapters.encoder_blocks import Shape, try_out, unmasked
from fewer.adapters.encoder_seam import MASSES, Seam, gathered
from fewer.allocate.schedule import Schedule
from fewer.compress import step
from fewer.cost import Encoder
from fewer.restore import NEEDS_BASE, RESTORERS, restore
from fewer.signals.heads import Attended, Heads
from fewer.types import (
    Budget,
    BudgetError,
    FewerError,
    FewerWarning,
    Method,
    MissingSignal,
    Plan,
    Reduction,
    Site,
    Tokens,
    UnknownName,
    UnsupportedModel,
)

MASKS = ("attention_mask", "attn_mask")
"""What hosts call the mask they hand to a block."""
POSITIONS = ("survivor", "centroid")
WORTH = 0.97
"""Above this share of the FLOPs nothing can be won: choosing tokens costs about that much itself."""


@dataclass(frozen=True)
class Setting:
    """What a user asked of an encoder; see `fewer.compress`."""

    method: Method
    schedule: Schedule
    masses: str = "mask"
    positions: str = "survivor"
    restore: str | None = None
    tape: bool = False

    def __post_init__(self) -> None:
        if self.masses not in MASSES:
            raise UnknownName(f"masses={self.masses!r}: known are {', '.join(MASSES)}")
        if self.positions not in POSITIONS:
            raise UnknownName(f"positions={self.positions!r}: known are {', '.join(POSITIONS)}")
        if self.restore is not None and self.restore not in RESTORERS:
            raise UnknownName(f"restore={self.restore!r}: known ways are {', '.join(RESTORERS)}")
        foreign = [need for need in self.method.needs if not isinstance(need, Heads)]
        if foreign:
            raise MissingSignal(
                f"{type(self.method).__name__} reads {', '.join(type(need).__name__ for need in foreign)}, which an "
                "encoder does not give; `fewer methods --family vit` lists the methods for encoders"
            )

    @classmethod
    def of(
        cls,
        method: Method,
        keep: Any,
        schedule: str | None,
        masses: str | None,
        positions: str | None,
        restore: str | None,
        tape: bool,
    ) -> "Setting":
        """What `compress` was given, with what the method was published with where it says nothing."""
        own: Any = method
        shape = schedule or str(getattr(own, "schedule", "constant"))
        weigh = masses or str(getattr(own, "masses", "mask"))
        return cls(method, Schedule(keep, shape), weigh, positions or "survivor", restore, tape)

    @property
    def taped(self) -> bool:
        """Whether the features that plans were made on are kept, for restoring."""
        return self.tape or self.restore in NEEDS_BASE


@dataclass(frozen=True)
class Trace:
    """One block of the latest forward: tokens in and out, of the row with the most, protected ones included."""

    layer: int
    came: int
    went: int


@dataclass
class _State:
    """One forward under way: what is left, and how it came to be."""

    padding: Tensor  # (b, n)
    positions: Tensor  # (b, n), the original that gives each token its place
    mass: Tensor | None  # (b, n), None while each is one
    originals: int
    prefix: int
    grid: tuple[int, int] | None
    seen: Tensor  # (b,)
    budgets: dict[int, Budget]
    merged: Reduction | None = None  # from the originals to what is left, where anything left
    handed: tuple[Tensor, Tensor] | None = None  # what the host got from the latest block, restored, and what is left


@dataclass
class Run:
    """What a context of `fewer.compress` on an encoder gives, about the latest forward in it.

    `plan` has an entry for each block, None where nobody left. `trace` has the counts. `prefix` tokens before the
    patches are protected: those that the grid leaves over, or as many as the host says (`counted`), or a text's first.
    """

    setting: Setting
    blocks: list[Any]
    shape: Shape
    cost: Encoder
    plan: list[Reduction | None] = field(default_factory=list)
    trace: list[Trace] = field(default_factory=list)
    grid: tuple[int, int] | None = None
    prefix: int = 1
    counted: bool = False
    state: _State | None = field(default=None, repr=False)
    bases: list[Tensor | None] = field(default_factory=list, repr=False)
    checked: set[tuple[int, ...]] = field(default_factory=set, repr=False)

    # ---- what a user reads

    @property
    def assign(self) -> Tensor:
        """Which token of the output each original token is in, `(b, n)`; -1 for those that were dropped."""
        state = self._done()
        if state.merged is None:
            return torch.arange(state.originals, device=state.padding.device).expand(len(state.seen), -1)
        return state.merged.assign

    @property
    def mass(self) -> Tensor:
        """How many originals each token of the output stands for, `(b, k)`; 0 where a row has fewer tokens."""
        state = self._done()
        ones = torch.ones_like(state.positions, dtype=torch.float32)
        return (ones if state.mass is None else state.mass).masked_fill(state.padding, 0)

    @property
    def kept(self) -> Tensor:
        """The original token that gives each token of the output its place, `(b, k)`; -1 where there is none."""
        state = self._done()
        return state.positions.masked_fill(state.padding, -1)

    @property
    def flops(self) -> float:
        """FLOPs of the latest forward's blocks over those of the unshortened ones, in closed form."""
        state = self._done()
        return self.cost.share([(one.came, one.went) for one in self.trace], state.originals)

    def restore(self, y: Tensor, how: str = "copy") -> Tensor:
        """Features `(b, k, d)` of the output's tokens, back at the originals `(b, n, d)`, protected ones included.

        Args:
            how: "copy", "zero" and "pinv" need the plans alone; "delta", "stale" and "kernel" need the features they
                were made on: `compress(..., tape=True)` keeps them. See `fewer.restore`.
        """
        self._done()
        return self._restored(y, how)

    def _restored(self, y: Tensor, how: str) -> Tensor:
        merged = self.state and self.state.merged
        if how == "copy" and isinstance(merged, Plan):  # copies compose, so one will do
            return restore(merged, y, how)
        for plan, base in zip(reversed(self.plan), reversed(self.bases), strict=True):
            if plan is not None:
                y = restore(plan, y, how, base)
        return y

    def __str__(self) -> str:
        counts = ", ".join(str(one.went) for one in self.trace)
        if len(self.trace) < len(self.blocks):
            return "not run yet"
        return f"{self.trace[0].came} tokens -> {counts}; {self.flops:.2f} of the FLOPs"

    def _done(self) -> _State:
        if self.state is None or len(self.trace) < len(self.blocks):
            raise FewerError("nothing was run inside this compress() yet: call the whole encoder first")
        return self.state

    # ---- what the blocks call, and the pooling after them

    def pooled(self, module: nn.Module, args: Any) -> None:
        """Warn where the host pools tokens that do not count alike as if they did."""
        state = self.state
        if state is None or len(self.trace) < len(self.blocks):
            return
        if self.setting.restore is None and state.mass is not None and bool((state.mass > 1).any()):
            fault = "merged tokens count once each: compress(..., restore='copy') makes each original count once"
        elif self.setting.restore in ("copy", "zero", "pinv") and bool(((self.assign >= 0).sum(-1) < state.seen).any()):
            fault = f"dropped tokens, restored by {self.setting.restore!r}, count as zeros: leave restore out"
        else:
            return
        warnings.warn(f"this encoder pools its tokens without weights, so {fault}", FewerWarning, stacklevel=2)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # decisions and their books: traced, they take a minute
    def forward(self, layer: int, x: Tensor, options: dict[str, Any]) -> Tensor:
        """One block of a forward."""
        block, shape = self.blocks[layer], self.shape
        if layer == 0:
            self._begin(x, options)
        state = self.state
        if state is None or len(self.trace) != layer:
            raise UnsupportedModel(
                "this encoder did not run its blocks one after the other, each once; if it checkpoints its gradients, "
                "switch that off inside compress()"
            )
        if state.handed is not None:
            if x is not state.handed[0]:
                raise UnsupportedModel(
                    "this encoder changes tokens between its blocks, so they cannot be restored after each: leave "
                    "restore= out, and call run.restore(features) on its output"
                )
            x = state.handed[1]
        came = x.shape[1]
        early = getattr(self.setting.method, "before", False)
        if early and layer in state.budgets:
            x = self._shorten(layer, x, None)
        whole = state.merged is None  # nobody left yet: the host's own mask, and so its own numbers to the bit
        inside = unmasked(getattr(block, shape.attention)) | {
            name: value for name, value in options.items() if value is not None and (whole or name not in MASKS)
        }
        if inside.get("rope") is not None:
            inside["rope"] = self._rope(inside["rope"])
        with Seam(self._bias(), "host" if whole else self.setting.masses, self._cut) as seam:
            x = shape.mix(block, x, inside)
        attended = seam.attended
        if attended is None:
            raise UnsupportedModel(
                f"{type(block).__name__} did not call scaled_dot_product_attention: switch its fused attention on "
                "(transformers: model.set_attn_implementation('sdpa'); timm: timm.layers.set_fused_attn(True) before "
                "the model is made)"
            )
        mixed = x.shape[1]
        if not early and layer in state.budgets:
            x = self._shorten(layer, x, attended)
        elif not early:
            self._pass()
        x = shape.feed(block, x)
        self.trace.append(Trace(layer, mixed, x.shape[1]))
        if layer == len(self.blocks) - 1:
            self._finish(came)
        if self.setting.restore is None:
            return x
        full = self._restored(x, self.setting.restore)  # after each block, as hosts hand out features of any of them
        state.handed = (full, x)
        return full

    def _pass(self) -> None:
        self.plan.append(None)
        self.bases.append(None)

    def _begin(self, x: Tensor, options: dict[str, Any]) -> None:
        b, n, _ = x.shape
        if x.device.type == "cpu" and x.dtype is torch.float16:
            raise UnsupportedModel("float16 on a CPU: attention there loses accuracy and time; use float32 or bfloat16")
        padding = _padding(options, b, n, x.device)
        prefix = self.prefix if self.grid is None else n - self.grid[0] * self.grid[1]
        if not 0 <= prefix < n or (self.counted and prefix != self.prefix):
            raise UnsupportedModel(
                f"this encoder has {n} tokens for a grid of {self.grid} patches, and says that {self.prefix} are others"
            )
        seen = (~padding).sum(-1)
        setting = self.setting
        places = _places(setting.method, len(self.blocks))

        def cost(shares: Sequence[float]) -> float:
            ends, left = [], n
            for layer in range(len(self.blocks)):
                came = left
                if layer in places:
                    left = prefix + max(1, math.ceil(shares[places.index(layer)] * (n - prefix) - 1e-9))
                ends.append((left if getattr(setting.method, "before", False) else came, left))
            return self.cost.share(ends, n)

        budgets = setting.schedule.budgets(
            places, len(self.blocks), prefix, halves=getattr(setting.method, "halves", False), cost=cost
        )
        self.plan, self.trace, self.bases = [], [], []
        positions = torch.arange(n, device=x.device).expand(b, n)
        self.state = _State(padding, positions, None, n, prefix, self.grid, seen, budgets)

    def _bias(self) -> Tensor | None:
        """What is added to the logits of each key."""
        state = self.state
        assert state is not None
        weigh = state.mass is not None and self.setting.masses != "off"
        padded = bool(state.padding.any())
        if not weigh and not padded:
            return None
        ones = torch.zeros_like(state.positions, dtype=torch.float32)
        bias = state.mass.clamp(min=torch.finfo(torch.float32).tiny).log() if weigh and state.mass is not None else ones
        return (bias.masked_fill(state.padding, -torch.inf) if padded else bias)[:, None, None]

    def _cut(self, bias: Tensor) -> Tensor:
        """A host's own bias between tokens, on those that are left."""
        state = self.state
        assert state is not None
        if state.merged is None:
            return bias
        return gathered(bias, state.positions, state.originals)

    def _rope(self, rope: Tensor) -> Tensor:
        """Rotary tables of the originals, sines first, on those that are left: `(patches, d)`, `(heads, patches, d)` or
        `(b, 1 or heads, patches, d)`."""
        state = self.state
        assert state is not None
        if state.merged is None:
            return rope
        b, prefix = len(state.seen), state.prefix
        if rope.shape[-2] != state.originals - prefix:
            raise UnsupportedModel(f"rotary tables of shape {tuple(rope.shape)} are not one row a patch")
        rope = rope[(None,) * (4 - rope.ndim)]  # (1 or b, 1 or heads, patches, d)
        rope = rope.expand(b, *rope.shape[1:])
        if self.setting.positions == "survivor":
            at = (state.positions[:, prefix:] - prefix).clamp(min=0)[:, None, :, None]
            return rope.gather(2, at.expand(b, rope.shape[1], -1, rope.shape[-1]))
        wide = torch.nn.functional.pad(rope.transpose(1, 2).flatten(2), (0, 0, prefix, 0))
        turned = state.merged.apply(wide.float())[:, prefix:]
        turned = turned.view(b, -1, rope.shape[1], rope.shape[-1]).transpose(1, 2)
        sin, cos = turned.chunk(2, -1)  # the mean of rotations points where the mean coordinate does
        length = (sin.square() + cos.square()).sqrt().clamp(min=1e-6)
        return torch.cat([sin / length, cos / length], -1).to(rope.dtype)

    def _shorten(self, layer: int, x: Tensor, attended: Attended | None) -> Tensor:
        """One decision, and what follows from it."""
        state, setting = self.state, self.setting
        assert state is not None
        index = torch.arange(x.shape[1], device=x.device)
        protected = (index < state.prefix).expand_as(state.padding)
        places = sorted(state.budgets)  # a list in `keep` may name others than the method's own
        site = Site(layer, len(self.blocks), "encode", state.prefix, state.grid, places.index(layer), len(places))
        signals: dict[type, Any] = {} if attended is None else {Heads: attended}
        tokens = Tokens(
            x, state.positions, state.padding, protected, state.seen,
            None if attended is None else attended.value.transpose(1, 2).flatten(2), signals, site, state.mass,
        )  # fmt: skip
        budget = state.budgets[layer]
        key = (layer, *x.shape)
        plan: Reduction = step(setting.method, budget, tokens, check=key not in self.checked)
        self.checked.add(key)
        if plan.survivors.shape[-1] == x.shape[1] and not plan.folds:
            self._pass()
            return x
        self.plan.append(plan)
        self.bases.append(x if setting.taped else None)
        there = plan.survivors >= 0
        state.positions = state.positions.gather(-1, plan.survivors.clamp(min=0))
        state.padding = ~there
        if plan.mass is not None:
            state.mass = plan.mass
        elif state.mass is not None:
            state.mass = state.mass.gather(-1, plan.survivors.clamp(min=0))
        state.merged = plan if state.merged is None else state.merged.then(plan)
        return plan.apply(x)

    def _finish(self, came: int) -> None:
        state = self.state
        assert state is not None
        last = max(state.budgets)
        asked = [state.budgets[last].count(seen) for seen in state.seen.tolist()]
        left = (~state.padding).sum(-1).tolist()
        if getattr(self.setting.method, "exact", True) and any(a < have for a, have in zip(asked, left, strict=True)):
            raise BudgetError(
                f"keep={self.setting.schedule.keep!r} leaves {asked} tokens and {left} could not be brought down to "
                "it: tokens join in pairs, and too few may; ask for more, or take a method that prunes"
            )
        if self.flops > WORTH and not self.setting.schedule.whole:
            warnings.warn(
                f"this cannot make the encoder faster: {self.flops:.2f} of its FLOPs remain on {state.originals} "
                "tokens; ask for fewer, or earlier",
                FewerWarning,
                stacklevel=2,
            )


def _places(method: Method, layers: int) -> list[int]:
    """The blocks at which a method acts: those it was published with, scaled to this depth, or all."""
    asked: Callable[[int], Sequence[int]] | None = getattr(method, "places", None)
    return list(range(layers)) if asked is None else sorted(set(asked(layers)))


def _padding(options: dict[str, Any], b: int, n: int, device: torch.device) -> Tensor:
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


@contextmanager
def session(model: nn.Module, found: tuple[str, list[Any], Shape], setting: Setting) -> Iterator[Run]:
    """Shorten this encoder until the context is left."""
    _, blocks, shape = found
    if any("forward" in vars(block) for block in blocks):
        raise FewerError("this encoder is inside a compress() already, or another tool replaced its blocks' forward")
    told: Iterator[Any] = (m.num_prefix_tokens for m in model.modules() if hasattr(m, "num_prefix_tokens"))
    prefix = next(told, None)
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    kinds = {str(block): block for block in reversed(blocks)}  # one of each, as its parts are written out
    tuples = [try_out(block, shape, 6 if not patches else patches + (prefix or 0)) for block in kinds.values()][-1]
    run = Run(setting, blocks, shape, Encoder.of(blocks[0], shape.attention, shape.mlp))
    run.prefix, run.counted = 1 if prefix is None else prefix, prefix is not None
    if setting.schedule.whole:
        run.setting = replace(setting, restore=None)
    with ExitStack() as leaving:
        patch = next((m for m in model.modules() if _is_patch(m)), None)
        if patch is not None:

            def see(module: nn.Module, args: Any, output: Tensor) -> None:
                run.grid = (output.shape[-2], output.shape[-1])

            leaving.callback(patch.register_forward_hook(see).remove)
        for pool in _pools(model):
            leaving.callback(pool.register_forward_pre_hook(run.pooled).remove)
        for layer, block in enumerate(blocks):
            block.forward = _replaced(run, layer, tuples)
            leaving.callback(vars(block).pop, "forward")
        yield run


def _pools(model: nn.Module) -> Iterator[Any]:
    """Modules that pool all tokens, or that get their mean right after it was taken."""
    for module in model.modules():
        if "AttentionPool" in type(module).__name__:  # timm's AttentionPoolLatent, SigLIP's head
            yield module
        elif getattr(module, "global_pool", None) in ("avg", "avgmax") and hasattr(module, "fc_norm"):  # timm's
            yield module.fc_norm


def _is_patch(module: nn.Module) -> bool:
    """Whether this is the convolution that cuts an image into patches."""
    return isinstance(module, nn.Conv2d) and module.stride == module.kernel_size and module.stride[0] > 1


def _replaced(run: Run, layer: int, tuples: bool) -> Callable[..., Any]:
    names = list(inspect.signature(run.blocks[layer].forward).parameters)[1:]

    def forward(hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        x = run.forward(layer, hidden_states, {**dict(zip(names, args, strict=False)), **options})
        return (x,) if tuples else x

    return forward
