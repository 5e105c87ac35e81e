"""One decision, carried out: what layers hold -> scores -> plans -> what they hold from now on; its bytes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewer.adapters.hf_policy import Policy
from fewer.allocate.levels import Levels
from fewer.codec import Coded, PairCodec
from fewer.compress import rate, settle
from fewer.ragged import Dense
from fewer.score.position import FORCED
from fewer.signals import EveryLayer, LayerScores
from fewer.signals.visual import VisualEntries
from fewer.types import Budget, BudgetError, Matching, Method, Phase, Reduction, Site, Tokens

if TYPE_CHECKING:
    from fewer.adapters.hf_layer import Layer


@torch.no_grad()
def decide(sources: "Sequence[Layer]", targets: "Sequence[Layer]", phase: Phase) -> None:
    """Decide for what the sources hold, together, by the targets' policy, and have the targets hold what is left.

    They are the same layers, or the targets are copies that another policy is tried on.
    """
    policy = targets[0].shared.policy
    for layer in targets:
        layer.due = phase
    if not policy.idle:
        start = sources[0]._clock()
        beside = sum(_beside(source, policy) for source in sources) * sources[0].shared.layers // len(sources)
        cost = cost_of(sources[0], policy, beside)
        budget = policy.budget.within(cost)
        looked = [look(source, policy.method, phase) for source in sources]
        rated = [rate(policy.method, tokens) for tokens, _, _ in looked]
        every: dict[type, Any] = {EveryLayer: LayerScores(tuple(rated))}
        known = [replace(tokens, signals={**tokens.signals, **every}) for tokens, _, _ in looked]

        def counts(budget: Budget) -> list[int]:
            plans = [settle(policy.method, budget, *one, check=False) for one in zip(known, rated, strict=True)]
            return [count for plan in plans for count in plan.counts.flatten().tolist()]

        packed = [count for source in sources for count in source.packed_counts]
        budget = _fill(sources[0], policy, budget, counts, packed, beside)
        _room(policy, budget, rated, cost)
        for target, tokens, (_, dense, order), scores in zip(targets, known, looked, rated, strict=True):
            plan = settle(policy.method, budget, tokens, scores)
            if target.coded:
                _crowded(target, int(plan.counts.sum()), int((~dense.padding).sum()))
            asked = policy.method.budget(tokens.site.layer) if isinstance(policy.method, Levels) else budget
            _filled(target, asked, tokens, scores, plan)
            target.taken(target._take(plan, dense, order, asked, tokens.signals))
        if policy.pairs is not None:
            couples = policy.pairs.couples(len(targets))
            for lower, upper in couples:
                _couple(targets[lower], targets[upper], policy.pairs)
            if not couples:
                targets[0].shared.note(f"of {len(targets)} layers none are held in pairs: there are too few")
        took = sources[0]._clock() - start
        for layer in targets:
            layer.seconds += took / len(targets)
    for layer in targets:
        layer.due = None


def _room(policy: Policy, budget: Budget, rated: Sequence[Tensor], cost: Callable[[int], int]) -> None:
    """Bytes are what a user has: where they do not hold what the method always keeps, say so instead of dropping it."""
    if policy.budget.size is None or budget.tokens is None:
        return
    always = max(int(_forced(scores).max()) for scores in rated)
    if always > budget.tokens:
        raise BudgetError(
            f"keep={budget.keep!r} holds {budget.tokens} tokens a head, and {type(policy.method).__name__} always "
            f"keeps {always} (sinks, window), which take {cost(always):,} bytes; ask for at least that, or for fewer "
            f"of them"
        )


def _filled(layer: "Layer", budget: Budget, tokens: Tokens, scores: Any, plan: Reduction) -> None:
    """Have the report say so where what the method always keeps is all that the budget holds. It is no warning: that
    much was asked for, and is kept."""
    method, counts = layer.shared.policy.method, plan.counts
    if isinstance(method, Levels):  # a user's own, head by head
        method, room = method.method, counts
    else:  # what a method shares out is shared by its scores
        room = torch.tensor([[budget.count(seen)] for seen in layer.real], device=counts.device)
    note = (
        f"keep={layer.shared.policy.budget.keep!r} gives some heads no more than what {type(method).__name__} always "
        f"keeps (sinks, window): nothing is left to its scores there"
    )
    notes = layer.shared.notes
    if note not in notes and bool(((_forced(scores) >= room) & (counts < tokens.available)).any()):
        notes.append(note)


def _forced(scores: Any) -> Tensor:
    """How many tokens of each head the method always keeps; those that are protected stay without it."""
    value: Tensor = scores.value if isinstance(scores, Matching) else scores
    return ((value >= FORCED) & value.isfinite()).sum(-1)


def _crowded(layer: "Layer", stay: int, there: int) -> None:
    """Say so where what was packed in earlier forwards, and stays, leaves little room to what came since."""
    packed = sum(layer.packed_counts)
    new, share = there - packed, stay / (sum(layer.real) * layer.keys.shape[1])
    if not new or stay - packed >= share / 4 * new:
        return
    crowded = f"keep={layer.shared.policy.budget.keep!r}: what was packed in earlier forwards stays, and leaves"
    do = "to the tokens that came since; give keep as a fraction, or leave store= out, where more is to come"
    if stay == packed:
        raise BudgetError(f"{crowded} no room {do}")
    layer.shared.note(f"{crowded} next to no room {do}")


def _couple(lower: "Layer", upper: "Layer", pairs: PairCodec) -> None:
    """Hold what both layers were just left with as one. It stays where it is in storage: behind what was coded."""
    if lower.kept is None or upper.kept is None:  # nothing new
        return
    for layer, part in zip((lower, upper), pairs.encode_pair(lower.kept, upper.kept), strict=True):
        layer.coded, layer.kept = (*layer.coded, part), None
        layer._weigh()


def look(layer: "Layer", method: Method, phase: Phase) -> tuple[Tokens, Dense, Tensor]:
    """The place a method decides at, the rectangle its plan will speak of (padding first), and the column of
    storage that each of its columns comes from."""
    dense = layer._dense(turned=False)
    b, h, n = dense.positions.shape
    order = torch.arange(n, device=layer.device).expand(b, h, n)
    if bool((dense.padding[..., 1:] & ~dense.padding[..., :-1]).any()) or len(layer.parts) > 1:
        # padding between real tokens, or tokens out of order: no part need be older than the next
        rank = torch.where(dense.padding, -1, dense.positions)
        order = rank.argsort(dim=-1, stable=True)
        dense = dense.take(order)
    signals: dict[type, Any] = {}
    for need in method.needs:
        value = layer.observers[need].value() if need in layer.observers else None
        if isinstance(value, Tensor):  # a number for each key; keys that were not observed have none yet
            value = torch.nn.functional.pad(value, (0, n - value.shape[-1])).gather(-1, order)
        signals[type(need)] = value
    if layer.shared.cutter is not None and any(isinstance(need, VisualEntries) for need in method.needs):
        signals[VisualEntries] = layer.shared.cutter.entries(dense.positions)
    tokens = Tokens(
        features=dense.keys,
        values=dense.values,
        positions=dense.positions,
        padding=dense.padding,
        protected=(order < layer.fixed) & ~dense.padding,
        seen=torch.tensor(layer.real, device=layer.device),
        mass=dense.mass,
        signals=signals,
        site=Site(layer.place, layer.shared.layers, phase),
    )
    return tokens, dense, order


def _beside(layer: "Layer", policy: Policy) -> int:
    """Bytes that stay beside what tokens take by themselves: signals that wait for the next decoding step, and what
    tokens that were packed forward by forward take more than if they had been packed at once."""
    if policy.budget.size is None:
        return 0
    signals = [
        observer.nbytes
        for need, observer in layer.observers.items()
        if need in policy.method.needs and not need.key_bytes and (observer.lasting or policy.covers("decode"))
    ]
    store, d, e, size = policy.stores[0], layer.keys.shape[-1], layer.values.shape[-1], layer.keys.element_size()
    if store is None:
        return sum(signals)
    coded = sum(sum(part.payload) for part in layer.coded if isinstance(part, Coded))
    return sum(signals) + coded - sum(store.bytes_for(count, d, e, size) for count in layer.packed_counts)


def cost_of(layer: "Layer", policy: Policy, beside: int) -> Callable[[int], int]:
    """Bytes of so many tokens in all rows, heads and layers, with their metadata, and what stays beside them."""
    b, h, _, d = layer.keys.shape
    e, size, places = layer.values.shape[-1], layer.keys.element_size(), b * h * layer.shared.layers
    return lambda tokens: int(places * policy.bytes_for(tokens, d, e, size)) + beside


def _fill(
    layer: "Layer",
    policy: Policy,
    budget: Budget,
    counts: Callable[[Budget], list[int]],
    packed: list[int],
    beside: int,
) -> Budget:
    """More tokens than that where the bytes that were asked for have room; see `Policy.fill`."""
    b, h, _, d = layer.keys.shape
    e, size, places = layer.values.shape[-1], layer.keys.element_size(), b * h * layer.shared.layers
    return policy.fill(budget, counts, max(layer.real), d, e, size, places=places, packed=packed, beside=beside)
