"""TreeKV: neighbours compete at a moving pointer, blocks in prompts and tokens afterwards."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fewer.methods.kv.treekv import TreeKV, survivors
from fewer.signals import Queries, Received, Rotation
from fewer.types import Site
from tests.methods.kv import naive
from tests.methods.kv.build import (
    SIZES,
    Cache,
    HalfRotary,
    Row,
    agree,
    decide,
    kept,
    place,
    random_row,
    same_alone_and_padded,
    same_in_chunks,
)

DECODE = Site(phase="decode")


def test_worked_example() -> None:
    """Six entries of worth 5, 1, 4, 2, 3, 6 and room for three.

    Pointer 0: 5 against 1, the second goes. Pointer 1: 4 against 2, entry 3 goes. Pointer 2: 3 against 6, entry 4
    goes; 0, 2 and 5 are left. Starting at 2: 4 against 2 (entry 3 goes), then at 0: entry 1, then at 1: 4 against 3.
    """
    worth = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0]
    assert survivors(worth, 3, 0) == [0, 2, 5]
    assert survivors(worth, 3, 2) == [0, 2, 5]
    assert survivors(worth, 5, 3) == [0, 1, 2, 4, 5]
    assert survivors(worth, 6, 9) == [0, 1, 2, 3, 4, 5] and survivors(worth, 0, 1) == []


def test_of_two_equals_the_older_goes() -> None:
    assert survivors([1.0] * 3, 2, 0) == [1, 2] and survivors([1.0] * 3, 2, 1) == [0, 2]


def test_worked_example_of_a_prompt() -> None:
    """Twelve tokens, one sink, blocks of two, six kept: five are left by the sink, half of them, two, for recent ones.

    One channel, every query 1, keys ln of 1; 1, 1; 9, 1; 4, 4; 2, 2; 1; 1, 1, so that the last two queries pay in
    proportion to these. The tree holds tokens 1 to 9, in blocks (1, 1), (9, 1), (4, 4), (2, 2) and a last one of (1).
    Six must go: three blocks, room for two. Pointer 0: 1 against 5, the first block goes. Pointer 1: 4 against 2, the
    fourth goes. Pointer 0: 5 against 4, the third goes. Left are 9, 1 and 1: that is 3 tokens, and all is done.
    """
    keys = torch.tensor([[[1.0], [1], [1], [9], [1], [4], [4], [2], [2], [1], [1], [1]]]).log()
    method = TreeKV(sinks=1, recent=0.5, block=2)
    tokens = place(method, Row(torch.ones(1, 12, 1), keys, keys))
    assert kept(tokens, decide(method, 6, tokens)) == [[0, 3, 4, 9, 10, 11]]


def reference(row: Row, size: int, sinks: int, recent: int) -> list[list[int]]:
    """Algorithm 1, token by token: sums and counts that go with the entries, and a pointer that is stored.

    The cache of each head after the last token; attention is over what is held, keys at their own positions.
    """
    h, n, dim = row.keys.shape
    groups, out = row.query.shape[0] // h, []
    for head in range(h):
        held: list[int] = []
        sums: dict[int, float] = {}
        seen: dict[int, int] = {}
        pointer, room = 0, size - sinks - recent
        for t in range(n):
            held.append(t)
            sums[t], seen[t] = 0.0, 0
            keys = row.keys[head, held].double()
            for query in row.query[head * groups : (head + 1) * groups, t].double():
                for j, weight in zip(held, torch.softmax(keys @ query / dim**0.5, 0).tolist(), strict=True):
                    sums[j] += weight
            for j in held:
                seen[j] += 1
            if len(held) > size:
                left, right = held[sinks + pointer], held[sinks + pointer + 1]
                held.remove(right if sums[left] / seen[left] > sums[right] / seen[right] else left)
                pointer = (pointer + 1) % room
        out.append(held)
    return out


@pytest.mark.parametrize(("size", "sinks", "recent"), [(12, 2, 0.5), (20, 4, 0.4), (9, 0, 0.0), (8, 4, 0.9)])
def test_token_after_token_is_the_published_algorithm(size: int, sinks: int, recent: float) -> None:
    row = random_row(60)
    row = Row(row.query * 2, row.keys, row.values)
    cache = Cache(TreeKV(sinks, recent, block=3), size, site=DECODE)
    for t in range(60):
        cache.forward(row.part(t, t + 1))
    assert cache.positions.tolist() == reference(row, size, sinks, int((size - sinks) * recent))


def test_the_published_proportion() -> None:
    """Of 1,024 kept, 4 sinks, 508 recent; the tree's 512 lie between."""
    row = random_row(1100, heads=1, kv_heads=1, dim=2)
    tokens = place(TreeKV(), row, site=DECODE)
    (head,) = kept(tokens, decide(TreeKV(), 1024, tokens))
    assert head[:4] == [0, 1, 2, 3] and head[-508:] == list(range(592, 1100))
    assert len(head) == 1024 and head[515] < 592


def blockwise(weights: Tensor, n: int, size: int, method: TreeKV) -> list[int]:
    """One head's prompt: blocks evicted one after another by a stored pointer, then tokens."""
    recent = int((size - method.sinks) * method.recent + 1e-6) if size > method.sinks else 0
    entries = list(range(method.sinks, n - recent))
    surplus = n - size
    blocks = [entries[i : i + method.block] for i in range(0, len(entries), method.block)]
    pointer, room = 0, len(blocks) - surplus // method.block
    while len(blocks) > room:
        means = [sum(float(weights[j]) for j in block) / len(block) for block in blocks[pointer : pointer + 2]]
        del blocks[pointer + (means[0] > means[1])]
        pointer = (pointer + 1) % room
    left = [j for block in blocks for j in block]
    room = len(left) - (surplus - (len(entries) - len(left)))
    pointer = len(entries) - len(left)
    while len(left) > room:
        at = pointer % room
        del left[at + (float(weights[left[at]]) > float(weights[left[at + 1]]))]
        pointer += 1
    return [*range(method.sinks), *left, *range(n - recent, n)]


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("block", [1, 5, 8])
@pytest.mark.parametrize("n", [63, 130])
def test_a_prompt_agrees_with_the_reference(n: int, block: int, keep: float) -> None:
    row, method = random_row(n), TreeKV(sinks=2, block=block)
    tokens = place(method, row)
    weights = naive.attention(row.query, row.keys)[:, -block:].mean(1).view(2, 2, n).mean(1)
    agree(method.score(tokens)[0], weights)
    assert kept(tokens, decide(method, keep, tokens)) == [
        blockwise(head, n, -(-n * int(keep * 10) // 10), method) for head in weights
    ]


def test_far_tokens_are_sparse_and_near_ones_dense() -> None:
    """400 tokens through a cache of 60: the gaps in the older half of the tree are the wider ones."""
    row, cache = random_row(400, dim=2), Cache(TreeKV(), 60, site=DECODE)
    for t in range(400):
        cache.forward(row.part(t, t + 1))
    for head in cache.positions.tolist():
        gaps = [b - a for a, b in pairwise(head)][4:32]
        assert sum(gaps[:14]) > 1.5 * sum(gaps[14:])


def test_positions_are_counted_inside_the_cache() -> None:
    row, cache = random_row(50), Cache(TreeKV(block=8), 20)
    for start, end in [(0, 40), *((i, i + 1) for i in range(40, 50))]:
        plan = cache.forward(row.part(start, end))
        assert plan.moved is not None and plan.moved[0].tolist() == [list(range(end - 20, end))] * 2
    assert TreeKV(block=8).needs == {Received(), Queries(8), Rotation()}


def test_padding_and_chunks_change_nothing() -> None:
    method = TreeKV(block=4)
    same_alone_and_padded(method, 0.5)
    same_alone_and_padded(method, 0.5, lengths=(10, 20), filler=torch.nan)
    same_in_chunks(method, 0.3)
    rows = [random_row(n, seed=n) for n in (30, 50)]
    batch = place(method, rows, site=DECODE)
    for index, row in enumerate(rows):
        alone = place(method, row, site=DECODE)
        assert kept(batch, decide(method, 12, batch), index) == kept(alone, decide(method, 12, alone))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("keep", [2, 3, 4, 5, 0.01, 0.5, 1.0])
def test_any_budget_is_met(n: int, keep: float | int) -> None:
    """Budgets below the sinks keep the earliest of them, as in StreamingLLM: sinks stay because attention leans on the
    first tokens, on token 0 above all, so that is the last that may go. Protected tokens come before them."""
    for site in (Site(), DECODE):
        tokens = place(TreeKV(), random_row(n), site=site)
        plan = decide(TreeKV(), keep, tokens)
        assert plan.moved is not None and plan.moved[0, 0].tolist() == list(range(n - int(plan.counts[0, 0]), n))
        guarded = place(TreeKV(), random_row(n), site=site, protect=[n // 2])
        assert all(n // 2 in head for head in kept(guarded, decide(TreeKV(), keep, guarded)))
        for head, count in zip(kept(tokens, plan), plan.counts[0].tolist(), strict=True):
            assert head[:4] == list(range(min(count, 4)))


def test_moved_keys_keep_their_distances_inside() -> None:
    """Logits of the next query are those of a cache whose keys stand at 0 to 11 and whose query stands at 12."""
    rotary, method, n, count = HalfRotary(8), TreeKV(block=4), 30, 12
    plain, query = torch.randn(1, 2, n, 8), torch.randn(1, 2, 1, 8)
    rotated = rotary.turn(plain, torch.arange(n)[None])
    tokens = place(method, Row(rotated[0], rotated[0], plain[0]))
    plan = decide(method, count, tokens)
    assert plan.moved is not None
    moved = rotary.turn(plan.pick(tokens.features), plan.moved - plan.survivors)
    ours = rotary.turn(query, torch.tensor([[n]])) @ moved.transpose(-1, -2)
    inside = rotary.turn(plan.pick(plain), torch.arange(count)[None])
    published = rotary.turn(query, torch.tensor([[count]])) @ inside.transpose(-1, -2)
    torch.testing.assert_close(ours, published, rtol=1e-4, atol=1e-4)
