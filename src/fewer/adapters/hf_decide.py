"""One decision, carried out: what layers hold -> scores -> plans -> what they hold from now on."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewer.adapters.hf_policy import Policy
from fewer.allocate.levels import Levels
from fewer.codec import PairCodec
from fewer.compress import rate, settle
from fewer.score.position import FORCED
from fewer.signals import EveryLayer, LayerScores
from fewer.types import Budget, BudgetError, Phase

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
        beside = sum(source.beside(policy) for source in sources) * sources[0].shared.layers // len(sources)
        cost = sources[0].cost(policy, beside)
        budget = policy.budget.within(cost)
        looked = [source.look(policy.method, phase) for source in sources]
        rated = [rate(policy.method, tokens) for tokens, _, _ in looked]
        every: dict[type, Any] = {EveryLayer: LayerScores(tuple(rated))}
        known = [replace(tokens, signals={**tokens.signals, **every}) for tokens, _, _ in looked]

        def counts(budget: Budget) -> list[int]:
            plans = [settle(policy.method, budget, *one, check=False) for one in zip(known, rated, strict=True)]
            return [count for plan in plans for count in plan.counts.flatten().tolist()]

        packed = [count for source in sources for count in source.packed_counts]
        budget = sources[0].fill(policy, budget, counts, packed, beside)
        _room(policy, budget, rated, cost)
        for target, tokens, (_, dense, order), scores in zip(targets, known, looked, rated, strict=True):
            plan = settle(policy.method, budget, tokens, scores)
            if target.coded:
                _crowded(target, int(plan.counts.sum()), int((~dense.padding).sum()))
            asked = policy.method.budget(tokens.site.layer) if isinstance(policy.method, Levels) else budget
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
    always = max(int((scores == FORCED).sum(-1).max()) for scores in rated)
    if always > budget.tokens:
        raise BudgetError(
            f"keep={budget.keep!r} holds {budget.tokens} tokens a head, and {type(policy.method).__name__} always "
            f"keeps {always} (sinks, window), which take {cost(always):,} bytes; ask for at least that, or for fewer "
            f"of them"
        )


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
