"""The front door: `compress` a model, and `step`, the four stages in order.

score  ->  allocate  ->  reduce  ->  (the host applies the plan)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fewer.methods import resolve
from fewer.types import Budget, BudgetError, FewerError, Keep, Method, Plan, Tokens

if TYPE_CHECKING:
    from fewer.adapters.hf_cache import Run


def step(method: Method, budget: Budget, tokens: Tokens) -> Plan:
    """Decide, at one place, who stays. This is the whole of every method; hosts only carry the decision out."""
    scores = method.score(tokens)  # 1 what is each token worth?
    scores = torch.where(tokens.protected, torch.inf, scores)
    scores = torch.where(tokens.padding, -torch.inf, scores)
    allocation = method.allocate(tokens, scores, budget)  # 2 how many may stay, and where?
    plan = method.reduce(tokens, scores, allocation)  # 3 who stays, who joins whom?
    _promised(method, tokens, allocation.counts, plan)
    return replace(plan, note=allocation.note or plan.note)  # 4 the host applies it; restore() undoes it


def _promised(method: Method, tokens: Tokens, counts: torch.Tensor, plan: Plan) -> None:
    """Every plan keeps what it was told to, whoever wrote the method."""
    name = type(method).__name__
    plan.check(tokens.padding)
    if not torch.equal(plan.counts, counts):
        raise FewerError(f"{name} was to keep {counts.tolist()} tokens and kept {plan.counts.tolist()}")
    if bool((tokens.protected & ~tokens.padding & (plan.slot < 0)).any()):
        most = int((tokens.protected & ~tokens.padding).sum(-1).max())
        raise BudgetError(f"{name}: {most} tokens are protected, which is more than the budget lets stay")


@contextmanager
def compress(
    model: Any, method: str | Method, keep: Keep, *, when: str = "prefill", every: int = 64
) -> Iterator["Run"]:
    """Shorten what a model keeps, for as long as the context lasts; leaving it restores the model bit for bit.

    Args:
        model: a transformers decoder (`PreTrainedModel`), used inside through `generate` or plain calls.
        method: a name from `fewer.METHODS`, or an object with the four members of `fewer.Method`.
        keep: what stays: a fraction in (0, 1], a token count a head, or bytes for all compressed layers ("64MB").
        when: "prefill" compresses after every forward of more than one token, "decode" after every `every` generated
            tokens (the cache then stays at a fixed size plus at most `every`), "both" does both.
        every: decoding steps between two compressions.

    Yields:
        A `Run`; its `report` tells what the latest cache saved and cost.

    Raises:
        BudgetError, UnknownName, MissingSignal, UnsupportedModel: see `fewer.types`. Nothing is changed then.

    >>> model = tiny_llama()
    >>> prompt = torch.arange(40).unsqueeze(0)
    >>> with compress(model, "knorm", keep=0.25) as run:
    ...     answer = model.generate(prompt, max_new_tokens=4, do_sample=False)
    >>> run.report.layers[0].kept  # 10 of 40, and the 3 generated tokens that were read
    ((13, 13),)
    """
    from fewer.adapters import hf_cache  # hosts are imported on use: `import fewer` needs no transformers

    with hf_cache.session(model, hf_cache.Policy.of(resolve(method), Budget.parse(keep), when, every)) as run:
        yield run
