"""The front door: `compress` a model, and `step`, the four stages in order.

score  ->  allocate  ->  reduce  ->  (the host applies the plan)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fewer.methods import resolve, resolve_store
from fewer.types import Budget, BudgetError, FewerError, Keep, Method, Plan, Tokens

if TYPE_CHECKING:
    from fewer.adapters.hf_cache import Run
    from fewer.codec import Codec


def step(method: Method, budget: Budget, tokens: Tokens) -> Plan:
    """Decide, at one place, who stays. This is the whole of every method; hosts only carry the decision out."""
    return settle(method, budget, tokens, rate(method, tokens))


def rate(method: Method, tokens: Tokens) -> torch.Tensor:
    """The first half: scores, with what must stay at +inf and what is not there at -inf."""
    scores = method.score(tokens)  # 1 what is each token worth?
    scores = torch.where(tokens.protected, torch.inf, scores)
    return torch.where(tokens.padding, -torch.inf, scores)


def settle(method: Method, budget: Budget, tokens: Tokens, scores: torch.Tensor) -> Plan:
    """The second half. A host that must know the scores of every layer first calls the halves one by one."""
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
    if plan.mass is not None:
        had = tokens.available if tokens.mass is None else tokens.mass.masked_fill(tokens.padding, 0).sum(-1)
        if bool((plan.mass.clamp(min=0).sum(-1) > had * (1 + 1e-5)).any()):
            raise FewerError(f"{name} gives its slots more mass than the tokens had")


@contextmanager
def compress(
    model: Any,
    method: str | Method,
    keep: Keep = 1.0,
    *,
    when: str | None = None,
    every: int | None = None,
    store: "str | Codec | None" = None,
) -> Iterator["Run"]:
    """Shorten what a model keeps, for as long as the context lasts; leaving it restores the model bit for bit.

    Args:
        model: a transformers decoder (`PreTrainedModel`), used inside through `generate` or plain calls.
        method: a name from `fewer.METHODS`, or an object with the four members of `fewer.Method`.
        keep: what stays: a fraction in (0, 1], a token count a head, or bytes for all compressed layers ("64MB").
        when: "prefill" compresses after every forward of more than one token, "decode" after every `every` generated
            tokens (the cache then stays at a fixed size plus at most `every`), "both" does both. Left out, it is what
            the method was published with, and "prefill" for most.
        every: decoding steps between two compressions; 64 unless the method was published with another number.
        store: how what is kept is held: a name such as "kivi-4bit", or a `Codec`. Left out, in full precision, or as
            the method itself says.

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

    policy = hf_cache.Policy.of(resolve(method), Budget.parse(keep), when, every, resolve_store(store))
    with hf_cache.session(model, policy) as run:
        yield run
