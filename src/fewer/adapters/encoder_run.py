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
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewer import fit as fits
from fewer.adapters.encoder_blocks import MASKS, Shape, is_patch, padding_of, pools_of, try_out, unmasked
from fewer.adapters.encoder_seam import Seam
from fewer.adapters.encoder_setting import Setting
from fewer.adapters.encoder_state import State
from fewer.compress import step
from fewer.cost import Encoder
from fewer.methods.any.full import Full
from fewer.restorers import restore
from fewer.signals.heads import Attended, Heads
from fewer.types import (
    BudgetError,
    FewerError,
    FewerWarning,
    Method,
    Plan,
    Reduction,
    Site,
    Tokens,
    UnsupportedModel,
)

WORTH = 0.97
"""Above this share of the FLOPs nothing can be won: choosing tokens costs about that much itself."""
CLASS = ("cls_token", "class_token", "class_embedding")
"""What hosts call their class token. timm's have the name, as None, where they have no such token."""


@dataclass(frozen=True)
class Trace:
    """One block of the latest forward: tokens in and out, of the row with the most, protected ones included."""

    layer: int
    came: int
    went: int


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
    classed: bool = True  # whether the first of them is a class token, or a text's first, which serves as one
    relative: bool = False  # whether the host adds a bias of its own between tokens
    plain: dict[str, Any] = field(default_factory=dict)  # what tells the host's attention that there is no mask
    state: State | None = field(default=None, repr=False)
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
                were made on: `compress(..., tape=True)` keeps them. See `fewer.restorers`.
        """
        self._done()
        return self._restored(y, how)

    def _restored(self, y: Tensor, how: str) -> Tensor:
        merged = self.state and self.state.merged
        if how == "copy" and isinstance(merged, Plan):  # copies compose, so one will do
            return restore(merged, y, how)
        for plan, base in zip(reversed(self.plan), reversed(self.bases), strict=True):
            if plan is not None:
                y = restore(plan, y, how, base, self.state.prefix if self.state else 0)
        return y

    def __str__(self) -> str:
        counts = ", ".join(str(one.went) for one in self.trace)
        if len(self.trace) < len(self.blocks):
            return "not run yet"
        return f"{self.trace[0].came} tokens -> {counts}; {self.flops:.2f} of the FLOPs"

    def _done(self) -> State:
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
        early, here = getattr(self.setting.method, "before", False), layer in state.budgets
        if here and early:
            x = self._shorten(layer, x, None)
        whole = not state.plans  # nobody left yet: the host's own mask, and so its own numbers to the bit
        inside = self.plain | {
            name: value for name, value in options.items() if value is not None and (whole or name not in MASKS)
        }
        weigh = self.setting.masses != "off"
        if inside.get("rope") is not None:
            inside["rope"] = state.rope(inside["rope"], self.setting.positions)
        bias, asked = state.bias(weigh), here and bool(self.setting.method.needs)
        seam = Seam(bias, "host" if whole else self.setting.masses, state.cut)
        # watching costs a little at every call, so it is done where something is read or changed, and once to be sure
        watched = layer == 0 or asked or bias is not None or self.relative
        with seam if watched else nullcontext():
            x = shape.mix(block, x, inside)
        attended = seam.attended
        self.relative |= seam.relative
        if attended is None and watched:
            raise UnsupportedModel(
                f"{type(block).__name__} did not call scaled_dot_product_attention: switch its fused attention on "
                "(transformers: model.set_attn_implementation('sdpa'); timm: timm.layers.set_fused_attn(True) before "
                "the model is made)"
            )
        mixed = x.shape[1]
        if here and not early:
            x = self._shorten(layer, x, attended)
        elif not here:
            self._pass()
        x = shape.feed(block, x)
        self.trace.append(Trace(layer, mixed, x.shape[1]))
        if layer == len(self.blocks) - 1:
            self._finish()
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
        padding = padding_of(options, b, n, x.device)
        prefix = self.prefix if self.grid is None else n - self.grid[0] * self.grid[1]
        if not 0 <= prefix <= n or (self.counted and prefix != self.prefix):
            raise UnsupportedModel(
                f"this encoder has {n} tokens for a grid of {self.grid} patches, and says that {self.prefix} are others"
            )
        seen = (~padding).sum(-1)
        setting = self.setting
        places = places_of(setting.method, len(self.blocks))

        def cost(shares: Sequence[float]) -> float:
            ends, left = [], n
            for layer in range(len(self.blocks)):
                came = left
                if layer in places:
                    left = min(n, prefix + max(1, math.ceil(shares[places.index(layer)] * (n - prefix) - 1e-9)))
                ends.append((left if getattr(setting.method, "before", False) else came, left))
            return self.cost.share(ends, n)

        budgets = setting.schedule.budgets(
            places, len(self.blocks), prefix, halves=getattr(setting.method, "halves", False), cost=cost
        )
        self.plan, self.trace, self.bases = [], [], []
        positions = torch.arange(n, device=x.device).expand(b, n)
        first = (positions < prefix).contiguous()
        self.state = State(first, padding, positions, None, n, prefix, self.grid, seen, budgets)

    def _shorten(self, layer: int, x: Tensor, attended: Attended | None) -> Tensor:
        """One decision, and what follows from it."""
        state, setting = self.state, self.setting
        assert state is not None
        protected = state.first[:, : x.shape[1]]
        places = sorted(state.budgets)  # a list in `keep` may name others than the method's own
        site = Site(layer, len(self.blocks), "encode", state.prefix, state.grid, places.index(layer), len(places))
        signals: dict[type, Any] = {} if attended is None else {Heads: replace(attended, classed=self.classed)}
        tokens = Tokens(x, state.positions, state.padding, protected, state.seen, None, signals, site, state.mass)
        budget = state.budgets[layer]
        key = (layer, *x.shape)
        plan: Reduction = step(setting.method, budget, tokens, check=key not in self.checked)
        self.checked.add(key)
        if torch.equal(plan.counts, tokens.available) and not plan.folds:  # of any row: a shorter one may lose alone
            self._pass()
            return x
        self.plan.append(plan)
        self.bases.append(x if setting.taped else None)
        state.ragged = not (isinstance(plan, Plan) and plan.even)
        state.padding = plan.survivors < 0
        state.positions = state.positions.gather(-1, plan.survivors.clamp(min=0))
        if plan.mass is not None:
            state.mass = plan.mass
        elif state.mass is not None:
            state.mass = state.mass.gather(-1, plan.survivors.clamp(min=0))
        state.plans.append(plan)
        return plan.apply(x)

    def _finish(self) -> None:
        state = self.state
        assert state is not None
        last = max(state.budgets)
        asked = [state.budgets[last].count(seen) for seen in state.seen.tolist()]
        left = (~state.padding).sum(-1).tolist()
        above = [(a, have) for a, have in zip(asked, left, strict=True) if a < have]
        if above and getattr(self.setting.method, "exact", True):
            keep, (few, have) = self.setting.schedule.keep, above[0]
            if isinstance(self.setting.method, Full):
                raise BudgetError(f"keep={keep!r} is to leave {few} tokens, and full keeps all {have}: ask for 1.0")
            raise BudgetError(
                f"keep={keep!r} is to leave {few} tokens, and {have} could not be brought down to it: tokens join in "
                "pairs, and too few may; ask for more, or take a method that prunes"
            )
        if self.flops > WORTH and not self.setting.schedule.whole:
            warnings.warn(
                f"this cannot make the encoder faster: {self.flops:.2f} of its FLOPs remain on {state.originals} "
                "tokens; ask for fewer, or earlier",
                FewerWarning,
                stacklevel=2,
            )


def places_of(method: Method, layers: int) -> list[int]:
    """The blocks at which a method acts: those it was published with, scaled to this depth, or all."""
    asked: Callable[[int], Sequence[int]] | None = getattr(method, "places", None)
    return list(range(layers)) if asked is None else sorted(set(asked(layers)))


@contextmanager
def session(model: nn.Module, found: tuple[str, list[Any], Shape], setting: Setting) -> Iterator[Run]:
    """Shorten this encoder until the context is left."""
    _, blocks, shape = found
    if any("forward" in vars(block) for block in blocks):
        raise FewerError("this encoder is inside a compress() already, or another tool replaced its blocks' forward")
    fits.check(setting.method, model)
    told: Iterator[Any] = (m.num_prefix_tokens for m in model.modules() if hasattr(m, "num_prefix_tokens"))
    prefix = next(told, None)
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    kinds = {str(block): block for block in reversed(blocks)}  # one of each, as its parts are written out
    tuples = [try_out(block, shape, 6 if not patches else patches + (prefix or 0)) for block in kinds.values()][-1]
    run = Run(setting, blocks, shape, Encoder.of(blocks[0], shape.attention, shape.mlp))
    run.plain = unmasked(getattr(blocks[0], shape.attention))
    run.prefix, run.counted = 1 if prefix is None else prefix, prefix is not None
    named = [getattr(m, name) for m in model.modules() for name in CLASS if hasattr(m, name)]
    # a text's first token has no name; of several counted tokens, none of them named, all are registers
    run.classed = any(one is not None for one in named) or (not named and prefix in (None, 1))
    if setting.schedule.whole and getattr(setting.method, "exact", True):
        run.setting = replace(setting, restore=None)
    with ExitStack() as leaving:
        patch = next((m for m in model.modules() if is_patch(m)), None)
        if patch is not None:

            def see(module: nn.Module, args: Any, output: Tensor) -> None:
                run.grid = (output.shape[-2], output.shape[-1])

            leaving.callback(patch.register_forward_hook(see).remove)
        for pool in pools_of(model):
            leaving.callback(pool.register_forward_pre_hook(run.pooled).remove)
        for layer, block in enumerate(blocks):
            block.forward = _replaced(run, layer, tuples)
            leaving.callback(vars(block).pop, "forward")
        yield run


def _replaced(run: Run, layer: int, tuples: bool) -> Callable[..., Any]:
    names = list(inspect.signature(run.blocks[layer].forward).parameters)[1:]

    def forward(hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        x = run.forward(layer, hidden_states, {**dict(zip(names, args, strict=False)), **options})
        return (x,) if tuples else x

    return forward
