"""Rates of an encoder, learned without labels: the whole model teaches, and only rates are trained (DiffRate).

student    the encoder with everyone there, and what the rates send away masked, so that gradients reach the rates
loss       distance of its output to the teacher's, over that of the rates it starts from, + lambda (FLOPs - target)^2
start      the rates that the method itself would take for this share of FLOPs; kept if learning makes none better
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.allocate.rates import Proxies, Rates, learn
from fewer.allocate.schedule import SHAPES
from fewer.compress import compress
from fewer.cost import Encoder
from fewer.reduce.tail import masked
from fewer.score.heads import attention_got
from fewer.signals.heads import Attended, Heads
from fewer.types import Allocation, Budget, BudgetError, FewerError, Method, Tokens, Transform, UnsupportedModel

READ = ("logits", "image_embeds", "pooler_output")
"""What a model's output is compared by, the first of these that there is, or its class token."""
SAME = 0.5
"""Masking and removing may differ by this share of what removing changes: equal ranks fall either way."""


@dataclass(frozen=True)
class Learning:
    """A method that lets nobody go: what `proxies` would send away loses its mass. `left` has the patches that would be
    left after each place of the latest forward, with gradients."""

    proxies: Proxies
    left: list[Tensor] = field(default_factory=list, compare=False)

    needs: ClassVar[frozenset[Any]] = frozenset({Heads()})

    def places(self, layers: int) -> list[int]:
        return list(range(1, layers))

    def score(self, tokens: Tokens) -> Tensor:
        with torch.no_grad():
            return attention_got(tokens.signal(Heads, Attended), tokens.site.prefix)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return Allocation(tokens.available)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Transform:
        layer, ways = tokens.site.layer, self.proxies
        if tokens.site.place == 0:
            self.left.clear()
        prune, merge = ways.kept(0, layer), ways.kept(1, layer)
        before = self.left[-1] if self.left else torch.tensor(float(ways.patches))
        self.left.append(torch.minimum(torch.minimum(prune, merge), before))
        first, second = (ways.stays(way, layer).to(scores.device) for way in (0, 1))
        return masked(tokens, scores, prune, merge, (first, second))


def learned(
    model: nn.Module, images: Iterable[Tensor], plain: Method, named: Callable[[Rates], Method], flops: float,
    steps: int, batch: int, seed: int, tick: Callable[[str, float], None],
) -> tuple[Rates, dict[str, str]]:  # fmt: skip
    """Rates for this model at this share of FLOPs, and what a reader should know of them.

    Args:
        plain: the method without rates, to start from.
        named: the method with these rates.
    """
    if not 0 < flops < 1:
        raise FewerError(f"flops={flops!r}: what remains of the FLOPs is a share between 0 and 1")
    like = next(model.parameters())
    pixels = pictures(images).to(like.device, like.dtype)
    training = model.training
    model.eval()
    try:
        return _learned(model, torch.split(pixels, batch), plain, named, flops, steps, seed, tick)
    finally:
        model.train(training)


def _learned(
    model: nn.Module, batches: tuple[Tensor, ...], plain: Method, named: Callable[[Rates], Method], flops: float,
    steps: int, seed: int, tick: Callable[[str, float], None],
) -> tuple[Rates, dict[str, str]]:  # fmt: skip
    with compress(model, plain):  # refuses what is no encoder
        tick("running the whole model", 0.0)
    with torch.no_grad():
        teacher = [read(model(x)) for x in batches]

    def missed(method: Method, keep: Any = 1.0, schedule: str | None = None) -> tuple[float, Any]:
        """The mean distance that is left with a method, and the run."""
        with torch.no_grad(), compress(model, method, keep, schedule=schedule) as run:
            off = [distance(read(model(x)), y) for x, y in zip(batches, teacher, strict=True)]
        return float(torch.cat(off).mean()), run

    before, shape, run = _best_start(lambda shape: missed(plain, f"{flops:.4f} flops", shape))
    prefix, total = run.state.prefix, run.state.originals
    merge = tuple(one.went - prefix for one in run.trace)
    came = [one.came - prefix for one in run.trace]
    prune = tuple(went + round(plain.merged * (had - went)) for had, went in zip(came, merge, strict=True))  # type: ignore[attr-defined]
    start = Rates(prune, merge, total - prefix)
    proxies, cost = Proxies(start), run.cost

    def share(rates: Rates) -> float:
        return float(cost.share([(a + prefix, b + prefix) for a, b in rates.ends], total))

    student = Learning(proxies)
    _same_masked(model, student, named(proxies.rates()), batches[0], teacher[0])
    order = torch.randint(len(batches), (steps,), generator=torch.Generator().manual_seed(seed)).tolist()

    def loss(step: int) -> tuple[Tensor, Tensor]:
        at = order[step]
        off = distance(read(model(batches[at])), teacher[at]).mean() / max(before, 1e-12)
        ends = [torch.tensor(float(proxies.patches))] * 2 + student.left  # the first block lets nobody go
        return off, share_of(cost, [(a + prefix, b + prefix) for a, b in pairwise(ends)], total)

    with torch.enable_grad(), compress(model, student):
        learn(proxies, loss, flops, steps, lambda done: tick("learning rates", done))
    rates = proxies.settled(share, flops)
    after, _ = missed(named(rates))
    notes = {
        "learned on": f"{sum(len(x) for x in batches)} images in {steps} steps",
        "FLOPs": f"{share(rates):.4f} of the blocks', {flops} asked for",
        "distance to the whole model": f"{after:.5f} on these images; {before:.5f} by the {shape} schedule at as many",
    }
    if after >= before:
        rates, notes["rates"] = start, f"those of the {shape} schedule: learning found none that are better"
        notes["FLOPs"] = f"{share(rates):.4f} of the blocks', {flops} asked for"
    return rates, notes


def _best_start(missed: Callable[[str], tuple[float, Any]]) -> tuple[float, str, Any]:
    """The shape of schedule that misses least, of those that can meet the budget at all."""
    found, refused = [], []
    for shape in SHAPES:
        try:
            found.append((*missed(shape), shape))
        except BudgetError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    off, run, shape = min(found, key=lambda one: one[0])
    return off, shape, run


def _same_masked(model: nn.Module, student: Learning, removing: Method, x: Tensor, teacher: Tensor) -> None:
    """Raise if the output reads tokens other than through attention, so that masking is not removing."""
    outputs = []
    for method in (student, removing):
        with torch.no_grad(), compress(model, method):
            outputs.append(read(model(x)))
    masks, removed = outputs
    if float(distance(masks, removed).mean()) > SAME * float(distance(removed, teacher).mean()) + 1e-6:
        raise UnsupportedModel(
            f"{type(model).__name__} pools its tokens where it should read its class token, so rates cannot be learned "
            "with what leaves masked; take published rates (schedule_name=...) or keep=..., or a model without the head"
        )


def share_of(cost: Encoder, ends: Iterable[tuple[Tensor, Tensor]], tokens: int) -> Float[Tensor, ""]:
    """`Encoder.share` with gradients to the counts."""
    blocks = [2 * a * cost.attention + 4 * a * a * cost.inner + 2 * b * cost.mlp for a, b in ends]
    return torch.stack(blocks).sum() / (len(blocks) * cost.block_flops(tokens, tokens))


def pictures(images: Any) -> Float[Tensor, "n c h w"]:
    """All images as one tensor."""
    wanted = "rates are learned on images: an iterable of float tensors, (3, h, w) or (b, 3, h, w), all of one size"
    if not isinstance(images, Iterable):
        raise FewerError(f"{wanted}; not {type(images).__name__}")
    parts = list(images)
    for one in parts:
        if not isinstance(one, Tensor) or one.ndim not in (3, 4) or not one.is_floating_point():
            what = f"{one.dtype} of shape {tuple(one.shape)}" if isinstance(one, Tensor) else type(one).__name__
            raise FewerError(f"{wanted}; not {what}")
    sizes = sorted({tuple(one.shape[-3:]) for one in parts})
    if len(sizes) > 1:
        raise FewerError(f"{wanted}; these are of sizes {', '.join(map(str, sizes))}")
    joined = [one if one.ndim == 4 else one.unsqueeze(0) for one in parts]
    if not sum(len(one) for one in joined):
        raise FewerError(f"{wanted}; there are none")
    return torch.cat(joined)


def read(output: Any) -> Float[Tensor, "b d"]:
    """What a model's output says of each image."""
    found = next((getattr(output, name) for name in READ if getattr(output, name, None) is not None), output)
    found = found if isinstance(found, Tensor) else getattr(output, "last_hidden_state", None)
    if not isinstance(found, Tensor) or found.ndim not in (2, 3):
        raise UnsupportedModel(f"an output of {type(output).__name__} has neither {', '.join(READ)} nor a class token")
    return found.float() if found.ndim == 2 else found[:, 0].float()


def distance(y: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """Squared, over the teacher's own length."""
    return (y - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)
