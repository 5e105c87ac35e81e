"""Keep everything, and say who is held in more bits and who in fewer."""

from dataclasses import replace

from jaxtyping import Bool, Int
from torch import Tensor

from fewer.types import Plan, Tokens


def fresh(tokens: Tokens) -> Bool[Tensor, "*lead n"]:
    """Marks the tokens whose tier is open: what is held packed already comes back protected, and stays as it is."""
    return ~tokens.protected & ~tokens.padding


def portion(counts: Int[Tensor, "*lead"], share: float) -> Int[Tensor, "*lead"]:
    """This share of each count, rounded up, as budgets are."""
    return (counts.double() * share - 1e-9).ceil().long()


def two_tiers(tokens: Tokens, important: Plan) -> Plan:
    """Everything stays: fresh tokens that the plan `important` drops in tier 1, all others in tier 0."""
    plan = Plan.keep(~tokens.padding)
    others = fresh(tokens) & (important.slot < 0)
    return replace(plan, tier=others.long().gather(-1, plan.survivors.clamp(min=0)))
