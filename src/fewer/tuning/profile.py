"""Budgets of their own for layers and heads: what one method should keep where, at the total that it has.

The measure is how far the compressed model's predictions of the full model's own answers are from the full model's, in
bits a token; levels are searched for by `fewer.allocate.evolve`, over layers first and from there over heads.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewer.adapters.hf_cache import Cache
from fewer.allocate.evolve import Found, evolve
from fewer.tuning.examples import Example
from fewer.tuning.hosts import shares_of
from fewer.tuning.journal import Journal
from fewer.tuning.setting import Held
from fewer.tuning.texts import Texts, watching

START = 3
"""The level that stands for the even share: levels are quarters of it, from one quarter to twice."""
STAGES = (2, 6)
"""Examples that offspring are judged on, and those that are left."""
GENERATIONS, OFFSPRING, SURVIVORS = 12, 12, (3, 1)


@dataclass(frozen=True)
class Profile:
    """A method with budgets of its own; `history` is the fitness of the even start and after each generation."""

    held: Held
    history: tuple[float, ...]

    def scaled(self, share: float) -> Held:
        """The same slope at another total."""
        keep = self.held.keep
        assert isinstance(keep, tuple)
        return replace(self.held, keep=tuple(
            tuple(_short(one * share) for one in level) if isinstance(level, tuple) else _short(level * share)
            for level in keep
        ))  # fmt: skip


class Divergence:
    """How far a cache's predictions along the full model's answers are from the full cache's, in bits a token."""

    @torch.inference_mode()
    def __init__(self, host: Texts, held: Held, examples: Sequence[Example]) -> None:
        self.host, self.held = host, held
        self.cases: list[tuple[Cache, Tensor, Tensor]] = []
        method = host.method(held)
        for example in examples:
            before, after = host.asker.prompt(example.context, example.question)
            full = Cache(host.model, watching([method]), 1.0)
            logits = host.read(full, before if host.unseen else torch.cat([before, after], 1))
            full.freeze()
            answering = full.fork()
            if host.unseen:
                logits = host.read(answering, after)
            said = host.asker.answers(host.asker.greedy(answering, logits.argmax(-1), host.most))[0]
            ids = torch.tensor([said], device=before.device)
            ids = torch.cat([after, ids], 1) if host.unseen else ids
            true = self._predicted(full.fork(), ids)
            self.cases.append((full, ids, true))

    def __enter__(self) -> "Divergence":
        return self

    def __exit__(self, *exc: object) -> None:
        for full, _, _ in self.cases:
            full.release()

    @torch.inference_mode()
    def __call__(self, held: Held, examples: int) -> float:
        """The mean over the first so many examples."""
        keep = list(held.keep) if isinstance(held.keep, tuple) else held.keep
        total = 0.0
        for full, ids, true in self.cases[:examples]:
            cache = full.under(self.host.method(self.held), keep, store=self.held.store)
            theirs = self._predicted(cache, ids)
            total += float((true.exp() * (true - theirs)).sum(-1).mean()) / math.log(2)
        return total / examples

    def _predicted(self, cache: Cache, ids: Tensor) -> Tensor:
        logits: Tensor = self.host.model(ids, past_key_values=cache).logits[0]
        return logits.float().log_softmax(-1)


def search(
    host: Texts, held: Held, examples: Sequence[Example], journal: Journal, *, seed: int = 0,
    tick: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Profile:  # fmt: skip
    """Levels for the layers, then for the heads, of one method that keeps a fraction.

    What was judged is in the journal: a search that was broken off judges only what it had not.
    """
    even = held.keep
    assert isinstance(even, float)
    step = even / (START + 1)
    asked = " ".join(example.key for example in examples[: STAGES[-1]])
    most = min(2 * START + 1, int(1 / step + 1e-9) - 1)

    def keeps(levels: Sequence[int], heads: int) -> Held:
        shares = [_short(step * (level + 1)) for level in levels]
        if heads == 1:
            return replace(held, keep=tuple(shares))
        return replace(held, keep=tuple(tuple(shares[i : i + heads]) for i in range(0, len(shares), heads)))

    with Divergence(host, held, examples[: STAGES[-1]]) as judge:
        counts = [min(many, len(judge.cases)) for many in STAGES]
        shape = shares_of(judge.cases[0][0].report)
        layers, heads = len(shape), len(shape[0])

        def run(start: Sequence[int], each: int, name: str) -> Found:
            return evolve(
                start, most, lambda levels, stage: judge(keeps(levels, each), counts[stage]), generations=GENERATIONS,
                offspring=OFFSPRING, survivors=SURVIVORS, seed=seed, known=journal.known(f"{held} {name} {asked}"),
                tick=lambda done, best: tick(f"levels of {name}", done, GENERATIONS),
            )  # fmt: skip

        found = run([START] * layers, 1, "layers")
        if heads == 1:
            return Profile(keeps(found.levels, 1), found.history)
        finer = run([level for level in found.levels for _ in range(heads)], heads, "heads")
    return Profile(keeps(finer.levels, heads), (*found.history, *finer.history[1:]))


def _short(share: float) -> float:
    return min(1.0, round(share, 6))
