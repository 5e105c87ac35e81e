"""Merging on eviction: what goes is folded into the most similar token that stays."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import fewer
from fewer.allocate.uniform import uniform
from fewer.methods.kv.adakv import AdaKV
from fewer.methods.kv.h2o import H2O
from fewer.methods.kv.knorm import KNorm
from fewer.methods.kv.merge_evict import MergeEvict
from fewer.methods.kv.snapkv import SnapKV
from fewer.methods.kv.streaming_llm import StreamingLLM
from fewer.reduce import merge
from fewer.reduce.select import top_k
from fewer.types import Allocation, Budget, Plan, Tokens, UnknownName
from tests.methods.kv import naive
from tests.methods.kv.build import (
    SIZES,
    Row,
    decide,
    kept,
    place,
    random_row,
    same_alone_and_padded,
    same_in_chunks,
)
from tests.tiny import prompt, tiny

HOW = ("pivot", "average", "weighted")


@dataclass(frozen=True, eq=False)
class Given:
    """A scorer whose scores `(h, n)` are known beforehand."""

    scores: Tensor
    needs: frozenset[Any] = frozenset()

    def score(self, tokens: Tokens) -> Tensor:
        return self.scores.expand(len(tokens.seen), *self.scores.shape)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)


def test_worked_example() -> None:
    """Keys (2, 0), (0, 2), (3, 4), (4, 3), (0, 8); tokens 0 and 1 stay.

    Cosines with 0 and 1: token 2 has 3/5 and 4/5, token 3 has 4/5 and 3/5, token 4 has 0 and 1. So 3 goes to 0, and 2
    and 4 to 1.
    pivot: slot 0 is ((2, 0) + (3, 1.5)) / 2 = (2.5, 0.75); slot 1 is ((0, 2) + (1.5, 3) + (0, 5)) / 3 = (0.5, 10 / 3).
    average: ((2, 0) + (4, 3)) / 2 = (3, 1.5) and ((0, 2) + (3, 4) + (0, 8)) / 3 = (1, 14 / 3).
    weighted: 0.9 for tokens 3 and 2, 1 for 4: (2 + 3.6, 2.7) / 1.9 and (2.7, 2 + 3.6 + 8) / 2.9.
    Values 1, 2, 3, 4, 5 go the same ways: by average (1 + 4) / 2 and (2 + 3 + 5) / 3.
    """
    keys = torch.tensor([[[2.0, 0], [0, 2], [3, 4], [4, 3], [0, 8]]])
    values = torch.arange(1.0, 6).view(1, 5, 1)
    scores = torch.tensor([[9.0, 9, 1, 1, 1]])
    expected = {
        "pivot": [[2.5, 0.75], [0.5, 10 / 3]],
        "average": [[3, 1.5], [1, 14 / 3]],
        "weighted": [[5.6 / 1.9, 2.7 / 1.9], [2.7 / 2.9, 13.6 / 2.9]],
    }
    for how, slots in expected.items():
        method = MergeEvict(Given(scores), how)
        tokens = place(method, Row(keys, keys, values))
        plan = decide(method, 2, tokens)
        assert plan.slot.tolist() == [[[0, 1, 1, 0, 1]]] and plan.mass is None
        torch.testing.assert_close(plan.apply(tokens.features)[0, 0], torch.tensor(slots))
        torch.testing.assert_close(plan.pick(tokens.features), tokens.features[:, :, :2])
        if how == "average":
            assert plan.apply(tokens.values).flatten().tolist() == pytest.approx([2.5, 10 / 3])


def reference(keys: Tensor, values: Tensor, stay: list[int], how: str) -> tuple[Tensor, Tensor]:
    """One head, token by token: keys `(n, d)`, values `(n, e)`."""
    both = torch.cat([keys, values], -1).double()
    sums, weights = {t: both[t].clone() for t in stay}, dict.fromkeys(stay, 1.0)
    for e in range(len(keys)):
        if e in stay:
            continue
        cosines = [float(torch.cosine_similarity(keys[e].double(), keys[t].double(), 0)) for t in stay]
        target = stay[cosines.index(max(cosines))]
        weight = (max(cosines) + 1) / 2 if how == "weighted" else 1.0
        sums[target] += weight * ((both[e] + both[target]) / 2 if how == "pivot" else both[e])
        weights[target] += weight
    merged = torch.stack([sums[t] / weights[t] for t in stay])
    return merged[:, : keys.shape[1]], merged[:, keys.shape[1] :]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int, how: str) -> None:
    row = random_row(n)
    method: Any = MergeEvict(H2O(), how)
    tokens = place(method, row)
    plan = decide(method, 0.3, tokens)
    plan.check()
    columns, count = naive.h2o(row.query, row.keys), -(-n * 3 // 10)
    for head in range(2):
        recent = count // 2
        stay = [*naive.best(columns[head, : n - recent], count - recent), *range(n - recent, n)]
        assert kept(tokens, plan)[head] == stay
        for part, want in zip(
            (row.keys, row.values), reference(row.keys[head], row.values[head], stay, how), strict=True
        ):
            torch.testing.assert_close(plan.apply(part[None])[0, head], want.float(), rtol=1e-4, atol=1e-5)


def test_padding_and_chunks_change_nothing() -> None:
    same_alone_and_padded(MergeEvict(), 0.3)
    same_alone_and_padded(MergeEvict(), 0.3, lengths=(10, 20), filler=torch.nan)
    same_in_chunks(MergeEvict(), 0.3)


@pytest.mark.parametrize("how", HOW)
def test_padding_is_merged_into_nothing(how: Any) -> None:
    method, rows = MergeEvict(H2O(), how), [random_row(n, seed=n) for n in SIZES]
    batch = place(method, rows, filler=torch.nan)
    together = decide(method, 0.3, batch)
    for index, row in enumerate(rows):
        alone = decide(method, 0.3, place(method, row))
        for part, all_parts in ((row.keys, batch.features), (row.values, batch.values)):
            assert all_parts is not None
            mine = together.apply(all_parts)[index, :, : alone.survivors.shape[-1]]
            torch.testing.assert_close(mine, alone.apply(part[None])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", HOW)
def test_duplicates_leave_the_kept_tokens_as_they_are(how: Any) -> None:
    row = random_row(6)
    twice = Row(*(part.repeat(1, 3, 1) for part in (row.query, row.keys, row.values)))
    scores = (torch.arange(18) < 6).float().expand(2, 18)
    method = MergeEvict(Given(scores), how)
    tokens = place(method, twice)
    plan = decide(method, 6, tokens)
    assert plan.slot[0, 0].tolist() == [*range(6)] * 3
    torch.testing.assert_close(plan.apply(tokens.features)[0], row.keys)
    torch.testing.assert_close(plan.apply(tokens.values)[0], row.values)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = place(MergeEvict(), [random_row(n, seed=n) for n in (20, 63)])
    whole = decide(MergeEvict(), 0.3, tokens)
    monkeypatch.setattr(merge, "BLOCK_CELLS", 1)
    again = decide(MergeEvict(), 0.3, tokens)
    assert torch.equal(whole.slot, again.slot)
    torch.testing.assert_close(whole.weight, again.weight)


@pytest.mark.parametrize(
    "scorer", [KNorm(), SnapKV(window=8), AdaKV(SnapKV(window=8), floor=0.0), StreamingLLM(), MergeEvict(KNorm())]
)
def test_any_scorer_keeps_its_own(scorer: Any) -> None:
    """Uneven heads, moved keys and plans that fold already: who stays, and where, is the scorer's."""
    method, row = MergeEvict(scorer), random_row(63, heads=4, kv_heads=4)
    tokens = place(method, row)
    plan, own = decide(method, 0.2, tokens), decide(scorer, 0.2, tokens)
    assert torch.equal(plan.survivors, own.survivors) and method.needs == scorer.needs
    assert (plan.moved is None) == (own.moved is None)
    assert bool((plan.slot >= 0)[~tokens.padding].any(-1).all())
    ones = plan.apply(torch.ones_like(tokens.features))
    torch.testing.assert_close(ones, (own.survivors >= 0).float().unsqueeze(-1).expand_as(ones))
    if type(scorer) is MergeEvict:  # nothing is left to merge
        assert torch.equal(plan.weight, own.weight)


def test_a_plan_that_folds_goes_on_folding() -> None:
    """The inner plan averages tokens 0 and 1 and drops 2, which then is averaged in: (x0 + x1) / 4 + x2 / 2."""

    @dataclass(frozen=True)
    class Pair(KNorm):
        def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
            plan = Plan.keep(tokens.positions == 0)
            slot = torch.where(tokens.positions == 1, 0, plan.slot)
            return replace(plan, slot=slot, weight=(slot == 0) / 2)

    method = MergeEvict(Pair(), "average")
    tokens = place(method, random_row(3))
    plan = method.reduce(tokens, method.score(tokens), Allocation(torch.ones(1, 2, dtype=torch.long)))
    assert plan.slot.tolist() == [[[0, 0, 0]] * 2] and plan.weight.tolist() == [[[0.25, 0.25, 0.5]] * 2]


def test_a_protected_token_takes_no_one_in() -> None:
    row = random_row(30)
    tokens = place(MergeEvict(), row, protect=range(3))
    plan = decide(MergeEvict(), 10, tokens)
    assert (plan.slot[0] >= 0).all() and (plan.slot[0, :, 3:] >= 3).all()
    assert torch.equal(plan.apply(tokens.features)[0, :, :3], row.keys[:, :3])
    everything = place(MergeEvict(), row, protect=range(20, 30))
    assert int((decide(MergeEvict(), 10, everything).slot >= 0).sum()) == 20


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(UnknownName, match="how='pivotal'"):
        MergeEvict(how="pivotal")


# --- the authors' code ---

PROBE = torch.tensor([1.0, -1, 2, -2, 3, -3, 4, -4])
"""Golden numbers are the merged keys and values times this."""


def merged(method: MergeEvict, keep: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    row = Row(keys, keys, values)
    tokens = place(method, row)
    plan = decide(method, keep, tokens)
    return plan.apply(keys[None])[0], plan.apply(values[None])[0]


def forced(n: int, *stay: tuple[int, ...]) -> Given:
    return Given(torch.stack([torch.isin(torch.arange(n), torch.tensor(head)) for head in stay]).float())


@pytest.mark.parametrize(
    ("how", "stay", "keys", "values"),
    [
        (
            "pivot", ((0, 3, 5, 10, 11), (1, 2, 8, 10, 11)),
            [[7.16281, -3.08527, -3.40121, 11.16527, -4.03163], [-2.47985, 6.98209, -14.46815, 15.16505, 5.03688]],
            [[-4.96223, 2.50267, 1.97358, 3.73698, -11.69522], [4.16279, 1.00848, -0.71109, -4.58248, -0.62169]],
        ),
        (
            "weighted", ((0, 3, 5, 10, 11), (1, 2, 8, 10, 11)),
            [[6.20859, -1.57000, -5.06848, 11.89965, -0.22456], [-2.97719, 4.54795, -14.75341, 12.18230, 3.82890]],
            [[-3.80742, 6.21325, 0.31932, 4.20626, -7.90559], [3.62890, 0.21529, -0.06979, -4.54658, 0.39107]],
        ),
        (
            "pivot", ((0, 1, 2, 3, 5, 7, 10, 11), (0, 1, 2, 3, 6, 8, 10, 11)),
            [
                [7.16281, 2.94373, 4.64403, -5.09493, -5.02398, 2.16117, 9.48837, -4.23348],
                [-21.93202, -1.38985, 6.98209, 1.73328, -0.44272, -12.64462, 19.77795, 6.65112],
            ],
            [
                [-4.96223, 17.26643, 1.67115, -2.41859, 1.99482, 6.98312, 2.66540, -15.14761],
                [-7.42582, 5.33289, 1.00848, 0.99030, -3.14881, 1.22923, -4.63800, -2.18805],
            ],
        ),
    ],
    ids=["merge_kv pivot", "merge_kv weighted", "LOOK-M pivot"],
)  # fmt: skip
def test_the_authors_code_merges_the_same(how: Any, stay: Any, keys: Any, values: Any) -> None:
    """Golden, on random_row(12, seed=4, heads=2): merge_kv (Zefan-Cai/KVCache-Factory c97f9d7) with window_size 2, and
    PivotKVCache_LayerWise (SUSTechBruce/LOOK-M ecf0f51) with hh_size 6, recent_size 2, padded with zeros to its 128
    channels."""
    row = random_row(12, seed=4, heads=2)
    got = merged(MergeEvict(forced(12, *stay), how), len(stay[0]), row.keys, row.values)
    torch.testing.assert_close(got[0] @ PROBE, torch.tensor(keys), rtol=0, atol=1e-4)
    torch.testing.assert_close(got[1] @ PROBE, torch.tensor(values), rtol=0, atol=1e-4)


def test_the_authors_code_averages_the_same_token_after_token() -> None:
    """Golden: AVGMergeKVCache_LayerWise (SUSTechBruce/LOOK-M ecf0f51), hh_size 4 (its first 4), recent_size 2, on
    random_row(12, seed=4, heads=2): six tokens, then one by one, each time averaging the one that leaves the window."""
    row = random_row(12, seed=4, heads=2)
    keys, values = row.keys[:, :6], row.values[:, :6]
    for new in range(6, 12):
        keys, values = (torch.cat([x, y[:, new : new + 1]], 1) for x, y in ((keys, row.keys), (values, row.values)))
        keys, values = merged(MergeEvict(forced(7, *[(0, 1, 2, 3, 5, 6)] * 2), "average"), 6, keys, values)
    want = [
        [8.53690, 3.91679, -4.07491, -5.09493, 12.84218, -9.41701],
        [-21.93202, -1.38985, 3.39740, -3.08041, 19.77795, 6.65112],
    ]
    torch.testing.assert_close(keys @ PROBE, torch.tensor(want), rtol=0, atol=1e-4)
    want = [
        [-6.62515, 8.15042, -0.02533, -2.41859, 4.80856, -16.56397],
        [-7.42582, 5.33289, -0.15963, 3.34806, -4.63800, -2.18805],
    ]
    torch.testing.assert_close(values @ PROBE, torch.tensor(want), rtol=0, atol=1e-4)


# --- in a cache ---


@torch.no_grad()
def test_a_cache_holds_the_merged_tokens() -> None:
    """Layer 0's keys do not depend on what was dropped, so they can be merged by hand from a plain cache's."""
    model = tiny("llama")
    plain = DynamicCache(config=model.config)
    model(prompt(40), past_key_values=plain)
    with fewer.Cache(model, MergeEvict(KNorm()), 0.25) as cache:
        model(prompt(40), past_key_values=cache)
        held = cache.layers[0].kept
        for head, (start, end) in enumerate(held.bounds[0]):
            keys, values = plain.layers[0].keys[0, head], plain.layers[0].values[0, head]
            stay = naive.best(naive.knorm(keys[None])[0], 10)
            assert held.positions[start:end].tolist() == stay
            for got, want in zip((held.keys, held.values), reference(keys, values, stay, "pivot"), strict=True):
                torch.testing.assert_close(got[start:end], want.float(), rtol=1e-4, atol=1e-4)
        assert cache.report.layers[0].kept == ((10, 10),)


@torch.no_grad()
@pytest.mark.parametrize("how", HOW)
def test_a_fixed_size_is_held_while_decoding(how: Any) -> None:
    model = tiny("llama")
    with fewer.Cache(model, MergeEvict(how=how), 12, when="both", every=1) as cache:
        model(prompt(40, rows=2), past_key_values=cache)
        for seed in range(4):
            out = model(prompt(1, rows=2, seed=seed), past_key_values=cache)
            assert cache.report.layers[0].kept == ((12, 12),) * 2 and bool(out.logits.isfinite().all())
