"""ZipCache: probes say who gets more bits; how often a token could be seen is taken out of what it got."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewer.methods.kv.zipcache import ZipCache
from fewer.ragged import Ragged
from fewer.signals import ProbeQueries, Probes, QueryWindow, Step
from fewer.tiers import ChannelSeparable
from fewer.types import Plan, Tokens
from tests.methods.kv import naive
from tests.methods.kv.build import SIZES, Row, agree, decide, kept, place, random_row, same_alone_and_padded

LAST = ZipCache(important=0.4, probes=0.1)
"""With fewer than ten queries the last one is the only probe."""


def important(tokens: Tokens, plan: Plan, row: int = 0) -> list[list[int]]:
    """The positions that each head of a row holds in more bits."""
    assert plan.tier is not None
    there = (plan.survivors[row] >= 0) & (plan.tier[row] == 0)
    found = tokens.positions[row].gather(-1, plan.survivors[row].clamp(min=0))
    return [found[head][there[head]].tolist() for head in range(len(there))]


def probes_of(tokens: Tokens) -> ProbeQueries:
    return tokens.signal(Probes, ProbeQueries)


def test_worked_example() -> None:
    """One channel, the last query, 1, and keys ln 4, 1, 1, 2, 8: weights 4, 1, 1, 2, 8 sixteenths.

    Queries that see them: 5, 4, 3, 2, 1. So the scores are 4/80, 1/64, 1/48, 2/32, 8/16, and of five tokens 40 %, two,
    are important: 4 and 3. By attention alone they would have been 4 and 0. Nothing is dropped.
    """
    keys = torch.tensor([[[4.0], [1], [1], [2], [8]]]).log()
    tokens = place(LAST, Row(torch.ones(1, 5, 1), keys, keys))
    agree(LAST.score(tokens)[0, 0], torch.tensor([4 / 80, 1 / 64, 1 / 48, 2 / 32, 8 / 16]))
    plan = decide(LAST, 1.0, tokens)
    assert important(tokens, plan) == [[3, 4]] and kept(tokens, plan) == [[0, 1, 2, 3, 4]]


def naive_scores(row: Row, probes: list[int]) -> Tensor:
    """Sums over probes and the group's heads, each column divided by the queries that see it."""
    weights, n, h = naive.attention(row.query, row.keys), len(row), row.keys.shape[0]
    groups = row.query.shape[0] // h
    out = torch.zeros(h, n, dtype=torch.float64)
    for head in range(row.query.shape[0]):
        for probe in probes:
            for j in range(n):
                out[head // groups, j] += weights[head, probe, j] / (n - j)
    return out


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int, heads: int) -> None:
    method, row = ZipCache(), random_row(n, heads=heads)
    tokens = place(method, row)
    probes = probes_of(tokens).window.positions[0].tolist()
    expected = naive_scores(row, probes) / len(probes) / (heads // 2)  # means, where the reference has sums
    agree(method.score(tokens)[0], expected)
    others = [naive.best(head, n - int(0.4 * n)) for head in expected]
    assert important(tokens, decide(method, 1.0, tokens)) == others


# ThisisBillhe/ZipCache, commit b6932b9: lines 776-796 of zipcache/models/modeling_llama.py run on random_row(40) with a
# causal mask, manual_seed(0) before the draw and k_unimportant_ratio 0.4; true_mixedprec_compress_channelwise (4 and 2
# bits) and its inverse on the keys, and true_channel_tokenwise_compress on each class of each head's values.
DRAWN = [38, 39, 34, 23]
SCORES = [
    [0.002855, 0.00589, 0.011917, 0.00642, 0.007624, 0.004538, 0.004997, 0.011598],
    [0.003846, 0.002855, 0.005509, 0.004955, 0.008641, 0.004775, 0.00573, 0.008372],
]
OTHERS = [
    [0, 1, 3, 4, 5, 6, 10, 11, 12, 15, 18, 20, 24, 25, 27, 29],
    [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 14, 15, 17, 24, 25, 27],
]
KEYS = {
    (0, 0): [0.3778, 0.8572, 0.9818, 0.4822, -0.9719, -0.6765, 0.7378, 1.9448],
    (1, 39): [-0.7804, 0.7497, -1.0468, 0.1057, -0.0974, -1.6258, -1.1295, -0.2373],
}
VALUES = {
    (0, 0): [-0.3498, -0.3494, 1.4739, 1.9433, -1.3906, -0.3229, 0.8177, -1.4423],
    (1, 39): [0.443, 0.0249, -0.3107, -1.3894, 0.0232, 0.5889, 0.0208, 1.4007],
}


def test_golden() -> None:
    method, row = ZipCache(), random_row(40)
    at = torch.tensor(DRAWN)
    none = torch.zeros(1, len(DRAWN), dtype=torch.bool)
    theirs = ProbeQueries(QueryWindow(row.query[None, :, at], at[None], none, 8**-0.5, None), torch.tensor([40]))
    tokens = replace(place(method, row), signals={Probes: theirs})
    torch.testing.assert_close(8 * method.score(tokens)[0, :, :8], torch.tensor(SCORES), rtol=0, atol=1e-6)
    plan = decide(method, 1.0, tokens)
    assert [sorted(set(range(40)) - set(head)) for head in important(tokens, plan)] == OTHERS
    for (head, position), key in KEYS.items():
        other = position in OTHERS[head]
        same = [j for j in range(40) if (j in OTHERS[head]) == other]
        held = Ragged(row.keys[head, same], row.values[head, same], torch.tensor(same).int(), ((len(same),),))
        out = ChannelSeparable(2 if other else 4).encode(held, "prefill", {}).read()
        place_of = same.index(position)
        torch.testing.assert_close(out.keys[place_of], torch.tensor(key), rtol=0, atol=3e-3)  # scales are float16
        torch.testing.assert_close(out.values[place_of], torch.tensor(VALUES[head, position]), rtol=0, atol=3e-3)


def test_padding_counts_for_nothing() -> None:
    same_alone_and_padded(ZipCache(), 1.0)
    batch = place(ZipCache(), rows := [random_row(n, seed=n) for n in SIZES])
    plan = decide(ZipCache(), 1.0, batch)
    for index, row in enumerate(rows):
        alone = place(ZipCache(), row)
        assert important(batch, plan, index) == important(alone, decide(ZipCache(), 1.0, alone))


def test_padding_may_be_no_number_at_all() -> None:
    same_alone_and_padded(ZipCache(), 1.0, lengths=(10, 20, 1), filler=torch.nan)


def test_a_decoded_token_is_rated_by_its_own_query_and_nothing_else() -> None:
    """The single query sees every key, so nothing is divided."""
    row = random_row(30)
    tokens = place(ZipCache(), row, chunks=[29])
    expected = naive.attention(row.query, row.keys)[:, -1].view(2, 2, 30).mean(1)
    agree(ZipCache().score(tokens)[0], expected)


def test_a_later_chunk_is_rated_by_its_own_probes() -> None:
    """Its 10 queries all see the 30 keys before it, so those are divided by 10, and its own by 10, 9, ... 1."""
    row = random_row(40)
    tokens = place(ZipCache(probes=0.1), row, chunks=[30])
    probes = probes_of(tokens).window.positions[0].tolist()
    assert len(probes) == 2 and probes[-1] == 39 and 30 <= probes[0] < 39
    weights = naive.attention(row.query, row.keys)[:, probes].mean(1).view(2, 2, 40).mean(1)
    agree(ZipCache(probes=0.1).score(tokens)[0], weights / torch.tensor([min(40 - j, 10) for j in range(40)]))


def test_what_is_held_packed_is_not_classed_again() -> None:
    """Of the ten tokens that are not protected, six are important, whatever the others score."""
    row, method = random_row(30), ZipCache()
    tokens = place(method, row, protect=range(20))
    plan = decide(method, 1.0, tokens)
    scores = method.score(tokens)[0, :, 20:]
    best = [[*range(20), *(20 + j for j in naive.best(head, 6))] for head in scores]
    assert important(tokens, plan) == best


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.01, 1), (0.6, 6), (0.61, 7), (1.0, 10)])
def test_the_share_is_rounded_up(share: float, count: int) -> None:
    tokens = place(ZipCache(important=share), random_row(10))
    assert [len(head) for head in important(tokens, decide(ZipCache(important=share), 1.0, tokens))] == [count] * 2


# --- probes ---


def shown(n: int, padding: int = 0, place_: int = 0) -> Step:
    positions = torch.arange(-padding, n).clamp(min=-1)[None]
    query = positions[:, None, :, None].float().expand(1, 2, -1, 4)
    return Step(query, positions, positions < 0, lambda: (query, query, query), 1.0, None, None, place=place_)


@pytest.mark.parametrize(
    ("n", "last", "drawn"), [(1, 1, 0), (7, 1, 0), (20, 1, 1), (39, 2, 1), (40, 2, 2), (130, 7, 6)]
)
def test_probes_are_the_last_and_some_of_the_others(n: int, last: int, drawn: int) -> None:
    observer = Probes().start()
    observer.observe(shown(n))
    found = observer.value()
    positions = found.window.positions[0].tolist()
    assert positions[drawn:] == list(range(n - last, n)) and len(positions) == last + drawn
    assert positions == sorted(set(positions)) and found.among.tolist() == [n]
    assert found.window.query[0, 0, :, 0].tolist() == positions and not bool(found.window.padding.any())


def test_probes_are_drawn_for_each_layer_and_seed() -> None:
    def drawn(seed: int, layer: int, padding: int = 0) -> list[int]:
        observer = Probes(seed=seed).start()
        observer.observe(shown(200, padding, layer))
        return list(observer.value().window.positions[0].tolist())

    assert drawn(0, 0) == drawn(0, 0) == drawn(0, 0, padding=13)
    assert len({tuple(drawn(seed, layer)) for seed in range(3) for layer in range(3)}) == 9


def test_probes_are_let_go_of_when_they_were_used() -> None:
    observer = Probes().start()
    assert observer.nbytes == 0 and observer.value() is None
    observer.observe(shown(40))
    window = observer.value().window
    assert observer.nbytes == window.query.nbytes + window.positions.nbytes + window.padding.nbytes + 8
    observer.rows(torch.tensor([0, 0]))
    assert observer.value().window.query.shape[0] == 2 and observer.value().among.tolist() == [40, 40]
    observer.regather(torch.zeros(1, 2, 40, dtype=torch.long))
    assert observer.nbytes == 0
