"""CompressKV (arXiv 2508.02401): semantic retrieval heads vote, and layers that lose more keep more.

    once, for a model:  score heads by their attention to a needle while the model says it; measure each layer's error
    a   = mean over the last w queries of softmax(q_w K^T), for the 4 best heads of the layer
    s   = mean over these heads of pool(a before the window, kernel)           one score for all key-value heads
    C_l = 32 + e_l (total - 32 L), at least 32, at most 3 averages, the rest one by one: exact
    layer l keeps the window, and the top of s before it, C_l in all

Differs from the paper: a layer's 32 is less where the budget's average is, and 3 averages are at most the prompt; fits
count answers by ROUGE-1 recall over 50 on tokens, where the authors' is on stemmed words, and add a needle token's
attention once, theirs as often as it stands there; errors are summed over answer steps, measured on the same needles.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewer import checks
from fewer.allocate.uniform import uniform
from fewer.fit import Fit, fingerprint, load
from fewer.reduce.select import top_k
from fewer.score.attention import smooth, window_attention
from fewer.score.position import latest, must_stay
from fewer.score.retrieval import Needle, head_scores, layer_errors
from fewer.signals import Queries, QueryWindow
from fewer.types import Allocation, Budget, Card, FewerError, Plan, Tokens

LEAST = 32
"""Tokens that every layer is sure of, and that errors are measured at."""
MOST = 3  # averages that a layer holds


def shares(errors: Sequence[float], total: int, least: int, most: int) -> list[int]:
    """Tokens for each layer, between `least` and `most` and `total` in all: in proportion to its error, and what that
    leaves over, or is short of, one by one: to layers of the greatest errors first, or from those of the smallest."""
    spare = total - least * len(errors)
    parts = [min(max(least + round(error * spare), least), most) for error in errors]
    ranked = sorted(range(len(errors)), key=lambda layer: -errors[layer])
    while left := total - sum(parts):
        sign = 1 if left > 0 else -1
        room = {i: most - parts[i] if left > 0 else parts[i] - least for i in ranked[::sign]}
        able = [i for i in room if room[i] > 0]
        rounds = max(1, min(abs(left) // len(able), min(room[i] for i in able)))  # as often as all of them take one
        for i in able[: abs(left)]:
            parts[i] += sign * rounds
    return parts


@dataclass(frozen=True)
class CompressKV:
    """Votes of retrieval heads.

    Args:
        fit: `heads`, scores of query heads `(layers, heads)`, and `errors` of layers, which sum to 1; see `fit_to`.
        window: last queries that observe, and last tokens that stay.
        kernel: width of the pooling, odd.
        voters: heads of a layer that vote.
    """

    fit: Fit | None = None
    window: int = 8
    kernel: int = 5
    voters: int = 4

    card: ClassVar[Card] = Card(
        source="arXiv 2508.02401",
        faithfulness="official",
        training="fit",
        differs="small budgets scale the 32; fits count answers by recall of tokens, and each step once",
        slugs=("compresskv",),
    )
    fits_on: ClassVar[str] = "needles"

    def __post_init__(self) -> None:
        checks.counts(window=self.window, voters=self.voters)
        checks.odd(kernel=self.kernel)

    @classmethod
    def load(cls, path: str | Path, **settings: Any) -> "CompressKV":
        """With the fit in this file; see `fewer.fit.load` for what is refused."""
        return cls(load(path, "compresskv"), **settings)

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Queries(last=self.window)})

    def fitted(self, name: str, tokens: Tokens) -> Tensor:
        """One tensor of the fit."""
        if self.fit is None:
            raise FewerError(
                "CompressKV must know which heads of the model retrieve: `fewer fit compresskv --model MODEL --out "
                "FILE`, then CompressKV.load(FILE)"
            )
        found = self.fit.tensors[name]
        if tokens.site.layer >= len(found):
            raise FewerError(f"layer {tokens.site.layer} is not in a fit of {len(found)} layers")
        return found

    def score(self, tokens: Tokens) -> Tensor:
        observers, h = tokens.signal(Queries, QueryWindow), tokens.positions.shape[1]
        ranked = self.fitted("heads", tokens)[tokens.site.layer].argsort(descending=True, stable=True)
        voters = ranked[: self.voters].to(tokens.features.device)
        asked = voters // (observers.query.shape[1] // h)  # the key-value head of each
        seen = window_attention(
            replace(observers, query=observers.query[:, voters]),
            tokens.features[:, asked],
            tokens.positions[:, asked],
            tokens.padding[:, asked],
        )  # (b, voters, n)
        window = latest(tokens, self.window)
        votes = smooth(seen * ~window[:, asked], self.kernel).mean(1, keepdim=True)
        return must_stay(votes.expand(-1, h, -1), window)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        even = uniform(tokens, budget, self.window)
        errors, counts = self.fitted("errors", tokens).tolist(), even.counts.clone()
        for row, seen in enumerate(tokens.seen.tolist()):
            if seen > self.window:
                share = budget.count(seen)
                parts = shares(errors, share * len(errors), min(LEAST, share), min(MOST * share, seen))
                counts[row] = parts[tokens.site.layer]  # every layer works the same list out
        return Allocation(torch.minimum(counts, tokens.available), note=even.note)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)

    @staticmethod
    def fit_to(
        model: Any,
        contexts: Sequence[Needle],
        *,
        seed: int = 0,
        tick: Callable[[str, float], None] = lambda what, share: None,
    ) -> Fit:
        """Have the model find each needle, twice: for the scores of heads, and then for the errors of layers.

        Args:
            model: a transformers decoder.
            contexts: needle tasks; the errors want prompts of more than 32 tokens.
            seed, tick: nothing is drawn; `tick` is called with what is being done and the share of all work done.
        """
        heads, found = head_scores(model, contexts, lambda what, share: tick(what, share / 2))
        name, notes = fingerprint(model), {"needles found": f"{found} of {len(contexts)}"}
        voting = CompressKV(Fit("compresskv", name, {"heads": heads}))
        errors = layer_errors(model, contexts, voting, LEAST, lambda what, share: tick(what, (1 + share) / 2))
        return Fit("compresskv", name, {"heads": heads, "errors": errors}, notes)
