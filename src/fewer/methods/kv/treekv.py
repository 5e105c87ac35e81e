"""TreeKV (arXiv 2501.04987): neighbours compete at a place that moves on, so the cache thins out smoothly to the left.

    s_j = S_j / n_j             mean attention that token j received from the n_j queries that have seen it
    where the cache holds one too many:  of the tree's entries i and i + 1 the lower goes;  i = (i + 1) mod r
    a prompt, block by block:   the last block's queries rate, entries are blocks, by the mean over their tokens
    the first tokens and the recent ones are outside the tree; positions are counted inside the cache

Of a cache of 1,024, 4 are sinks, 508 recent and 512 the tree's: r is the tree's room alone. The pointer is not stored:
i follows from how many tokens were evicted before. Keys are moved as in our StreamingLLM: every distance is then the
one inside the cache.

Differs from the paper: the size of a block is not in what could be read, 64 is ours; less than a block that is still
too many goes token by token, so that counts are exact; n_j counts the queries from the token on, all of which must have
been observed; after a prompt the pointer starts where that many single evictions would have left it. Scores are summed
over grouped query heads, and each of the heads that share them decides for itself.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fewer import checks
from fewer.allocate.uniform import uniform
from fewer.reduce.select import top_k
from fewer.score.attention import per_head, window_attention
from fewer.score.position import must_stay, sinks_stay
from fewer.signals import Queries, QueryWindow, Received, Rotation
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class TreeKV:
    """A cyclic pointer, and the lower of the two neighbours at it.

    Args:
        sinks: first tokens that always stay.
        recent: share of what the sinks leave that goes to the most recent tokens.
        block: tokens of a block in prompts, and queries that rate them.
    """

    sinks: int = 4
    recent: float = 508 / 1020
    block: int = 64

    card: ClassVar[Card] = Card(
        source="arXiv 2501.04987",
        faithfulness="paper",
        differs="the size of blocks is ours; what is less than a block goes token by token",
        slugs=("treekv",),
    )
    when: ClassVar[str] = "both"
    every: ClassVar[int] = 1

    def __post_init__(self) -> None:
        checks.counts(0, sinks=self.sinks)
        checks.counts(block=self.block)
        checks.shares(recent=self.recent)

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Received(), Queries(last=self.block), Rotation()})

    def score(self, tokens: Tokens) -> Tensor:
        if tokens.site.phase == "prefill":
            last = tokens.signal(Queries, QueryWindow)
            seen = window_attention(last, tokens.features, tokens.positions, tokens.padding)
            return per_head(seen, tokens.positions.shape[1])
        queries = tokens.seen.view(-1, 1, 1) - tokens.positions  # every one from the token's own on
        return tokens.signal(Received, Tensor) / queries

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        recent = ((allocation.counts - self.sinks).clamp(min=0) * self.recent + 1e-6).long()
        outside = (tokens.positions < self.sinks) | (tokens.positions >= (tokens.seen.view(-1, 1) - recent)[..., None])
        tree = scores.isfinite() & ~outside  # protected tokens are at +inf, padding at -inf
        stays, worth = ~tree.cpu(), scores.cpu()  # the pointer goes step by step: once there and back is cheapest
        evicted, surplus = tokens.seen.view(-1, 1) - tokens.available, tokens.available - allocation.counts
        for row, heads in enumerate(zip(evicted.tolist(), surplus.tolist(), strict=True)):
            for head, (before, many) in enumerate(zip(*heads, strict=True)):
                entries = (~stays[row, head]).nonzero().flatten()
                kept = self._thinned(worth[row, head, entries], many, before, tokens.site.phase == "prefill")
                stays[row, head, entries[kept]] = True
        outcome = sinks_stay(must_stay(torch.zeros_like(scores), stays.to(scores.device)), tokens, self.sinks)
        plan = top_k(torch.where(scores.isfinite(), outcome, scores), allocation)
        slots = torch.arange(plan.survivors.shape[-1], device=plan.slot.device)
        return replace(plan, moved=tokens.seen.view(-1, 1, 1) - plan.counts.unsqueeze(-1) + slots)

    def _thinned(self, scores: Tensor, surplus: int, before: int, blocks: bool) -> Tensor:
        """The entries that stay when `surplus` of them go, blocks first; `before` tokens have gone already."""
        places = torch.arange(len(scores), device=scores.device)
        if blocks and surplus >= self.block:
            cut = torch.split(places, self.block)
            means = [float(scores[part].mean()) for part in cut]
            left = survivors(means, len(cut) - surplus // self.block, before // self.block)
            places = torch.cat([places[:0], *(cut[index] for index in left)])
        gone = len(scores) - len(places)
        return places[survivors(scores[places].tolist(), len(places) - (surplus - gone), before + gone)]


def survivors(scores: list[float], room: int, pointer: int) -> list[int]:
    """What is left of entries that come one after another into a cache with room for so many."""
    held = list(range(len(scores)))
    if room < 1:
        return []
    while len(held) > room:
        at = pointer % room  # the last two are room - 1 and the one that is too many
        held.pop(at + 1 if scores[held[at]] > scores[held[at + 1]] else at)
        pointer += 1
    return held
