"""An encoder's blocks in closed form, under any method of the family "vit"."""

import math
from collections.abc import Sequence
from typing import Any

from fewer.cost.record import Cost
from fewer.cost.sizes import Encoder
from fewer.methods import family_of
from fewer.methods.any.full import Full
from fewer.types import BudgetError, FewerError

CEILING = "how many tokens stay depends on the image, or on its grid: a ceiling"
UNCOUNTED = "the products by which an encoder's tokens are chosen are not counted"


def of_encoder(
    model: Any, found: Any, method: Any, keep: Any, *, tokens: int, rows: int, schedule: str | None, beside: int | None
) -> Cost:
    """What an encoder's blocks cost; see `fewer.cost.of`."""
    from fewer import fit  # which methods, that this is asked of, build on
    from fewer.adapters.encoder_run import places_of
    from fewer.adapters.encoder_setting import Setting

    fit.check(method, model)
    _, blocks, shape = found
    sizes, depth = Encoder.of(blocks[0], shape.attention, shape.mlp), len(blocks)
    setting, places = Setting.of(method, keep, schedule, None, None, None, False), places_of(method, depth)
    prefix = others(model, tokens) if beside is None else beside
    if not 0 <= prefix < tokens:
        raise FewerError(
            f"cost.of(tokens={tokens}, beside={prefix}): beside are those of the tokens that are no patches"
        )
    before = getattr(method, "before", False)

    def ends(left: Sequence[int]) -> list[tuple[int, int]]:
        came = [tokens, *left[:-1]]
        return list(zip(left if before else came, left, strict=True))

    def share(shares: Sequence[float]) -> float:
        by_layer = {
            at: prefix + max(1, math.ceil(x * (tokens - prefix) - 1e-9)) for at, x in zip(places, shares, strict=True)
        }
        left, now = [], tokens
        for layer in range(depth):
            now = by_layer.get(layer, now)
            left.append(now)
        return sizes.share(ends(left), tokens)

    budgets = setting.schedule.budgets(places, depth, prefix, halves=getattr(method, "halves", False), cost=share)
    left, now = [], tokens
    for layer in range(depth):
        now = min(now, budgets[layer].count(tokens)) if layer in budgets else now
        left.append(now)
    if isinstance(method, Full) and left[-1] < tokens:
        raise BudgetError(f"keep={keep!r} is to leave {left[-1]} tokens, and full keeps all {tokens}: ask for 1.0")
    if getattr(method, "floor", False):  # `keep` is the least that stays
        left = [tokens] * depth
    blocks_read = ends(left)
    exact, free = getattr(method, "exact", True), family_of(type(method)) == "any"
    return Cost(
        family="vit",
        tokens=rows * left[-1],
        flops=rows * sum(sizes.block_flops(*one) for one in blocks_read),
        bytes=0,
        decode_bytes=0,
        whole=rows * depth * sizes.block_flops(tokens, tokens),
        length=tokens,
        read=tuple(came for came, _ in blocks_read),
        rows=rows,
        exact=exact,
        modelled=free,
        notes=(*([] if exact else [CEILING]), *([] if free else [UNCOUNTED])),
    )


def others(model: Any, tokens: int) -> int:
    """Class, distillation and register tokens: as many as timm says, or as are left over by the grid of images of the
    model's own size; one of a text, which has no grid."""
    told = next((m.num_prefix_tokens for m in model.modules() if hasattr(m, "num_prefix_tokens")), None)
    if told is not None:
        return int(told)
    config = getattr(model, "config", None)
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int):
        return 1
    if (more := tokens - (size // patch) ** 2) < 0:
        raise FewerError(
            f"cost.of(tokens={tokens}): {type(model).__name__} makes {(size // patch) ** 2} patches of its own image "
            "size; for another one pass beside=, how many of the tokens are none"
        )
    return more
