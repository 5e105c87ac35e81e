"""Visual tokens in closed form: what every layer reads, and then holds, under methods of the family "vlm"."""

from collections.abc import Sequence
from typing import Any

from fewer.cost.encoders import CEILING
from fewer.cost.layers import Place, layer
from fewer.cost.record import Cost
from fewer.cost.sizes import Decoder
from fewer.methods import family_of, resolve
from fewer.methods.any.full import Full
from fewer.types import Budget, FewerError

UNCOUNTED = "the products by which visual tokens are chosen are not counted here; a run's report counts them"


def of_pictures(
    model: Any, methods: Sequence[Any], keep: Any, *, tokens: int, visual: Sequence[int], separators: int, rows: int,
    new_tokens: int, store: Any, per: str | None, counted: str | None,
) -> Cost:  # fmt: skip
    """What a prompt with pictures costs; see `fewer.cost.of`. The vision tower is not in it."""
    from fewer.adapters.hf_bind import Host  # hosts are imported on use
    from fewer.adapters.hf_policy import Policy
    from fewer.adapters.vlm_stages import Stages

    had, chosen = sum(visual), [resolve(one) for one in methods]
    if not visual or min(visual) < 1 or separators < 0 or had + separators > tokens:
        raise FewerError(
            f"cost.of(tokens={tokens}, visual={list(visual)}, separators={separators}): visual is how many tokens each "
            "picture of a prompt has, and tokens all that the prompt has"
        )
    caching = chosen.pop() if chosen and family_of(type(chosen[-1])) == "kv" else None
    host, sizes = Host.of(model), Decoder.of(model)
    place = Place.of(host, sizes)
    stages = Stages(chosen, keep, sizes.layers, per or "picture", counted or "last", caching is not None)
    groups = list(visual) if stages.per == "picture" else [had]
    ways = []
    for one in groups:
        counts = zip(stages.counts(one), stages.cuts, strict=True)
        ways.append(stages.read(one, [one if isinstance(method, Full) else count for count, (_, method, *_) in counts]))
    shown = [sum(left) for left in zip(*ways, strict=True)]
    text, first = tokens - had - separators, sizes.layers
    if stages.at and not stages.whole:
        first = min(stages.at) + 1  # the first layer that is given fewer tokens
    read = tuple(
        text + left + (separators if layer < first or shown[-1] == had else 0) for layer, left in enumerate(shown)
    )
    exact = all(getattr(one, "exact", True) for one in chosen)
    inside, budget = resolve("full"), Budget.parse(1.0)
    if caching is not None and not stages.whole:
        wanted = sum(stages.budget.count(one) for one in groups)
        inside, budget = (
            caching,
            Budget(keep if not isinstance(keep, (list, tuple)) else keep[-1], tokens=text + wanted),
        )
    policy = Policy.of(inside, budget, None, None, store)
    final = any(getattr(one, "final", False) for one in chosen) and not stages.whole
    total, notes, index = 0, set() if exact else {CEILING}, 0
    for number, mine in enumerate(host.plain_layers()):
        if not mine:
            total += rows * place.heads * tokens * place.entry
            continue
        there = read[-1] if final else read[number]
        late = number >= first or there < read[number]
        found = layer(policy, budget, place, sizes, place.tokens(index, there, tokens), rows=rows, cuts=True, late=late)
        total, notes, index = total + found.bytes, notes | found.notes, index + 1
    free = caching is None and all(family_of(type(one)) == "any" for one in chosen)
    grown = rows * place.heads * sizes.layers * place.entry * (new_tokens // 2)
    return Cost(
        family="vlm",
        tokens=rows * read[-1],
        flops=rows * round(sum(sizes.layer_flops(count) for count in read)),
        bytes=total,
        decode_bytes=sizes.decode_bytes(total + grown),
        whole=rows * round(sizes.layers * sizes.layer_flops(tokens)),
        length=tokens,
        read=read,
        rows=rows,
        exact=not notes,
        modelled=free,
        notes=(*sorted(notes), *([] if free else [UNCOUNTED])),
    )
