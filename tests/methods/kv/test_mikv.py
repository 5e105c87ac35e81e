"""MiKV: what H2O would evict stays in few bits, on a grid that outliers of single channels do not spoil."""

import pytest
import torch
from torch import Tensor

from fewer.methods.kv.mikv import Balanced, MiKV
from fewer.ragged import Ragged
from fewer.signals import ChannelMaxima, Maxima
from fewer.tiers import ByToken, TierPart
from fewer.types import Tokens
from tests.methods.kv import naive
from tests.methods.kv.build import SIZES, Row, decide, kept, place, random_row, same_alone_and_padded, same_in_chunks
from tests.methods.kv.test_zipcache import important

ALL = (slice(None), slice(None))


def packed(keys: Tensor, bits: int, found: Maxima) -> TierPart:
    """Keys `(h, n, d)` of one row, stored with these maxima."""
    h, n, d = keys.shape
    held = Ragged(keys.reshape(-1, d), keys.reshape(-1, d), torch.arange(n).repeat(h).int(), ((n,) * h,))
    return Balanced(bits).encode(held, "prefill", {ChannelMaxima: found})


def test_worked_example_of_the_balancer() -> None:
    """Two channels: queries up to 1 and 4, keys up to 16 and 1, so b = sqrt(1/16), sqrt(4/1) = 1/4, 2.

    The key (16, 1) is stored as (4, 2), in 2 bits as the extremes of its grid, and comes out as it was. So does (8, 0),
    stored as (2, 0). The query (1, 4) reads 16 + 4 = (1 * 4) 4 + (4 / 2) 2 = 20.
    """
    keys, query = torch.tensor([[[16.0, 1], [8, 0]]]), torch.tensor([[[1.0, 4], [-0.5, 2]]])
    tokens = place(MiKV(), Row(query, keys, keys))
    found = tokens.signal(ChannelMaxima, Maxima)
    assert found.query.tolist() == [[[1, 4]]] and found.key.tolist() == [[[16, 1]]]
    part = packed(keys, 2, found)
    assert isinstance(part.held_keys, ByToken) and part.held_keys.channel is not None
    assert part.held_keys.channel.tolist() == [[4, 0.5]]
    stored, read = part.held_keys.packed.tensor(), part.logits(query[None, :, :1], ALL)[0]
    torch.testing.assert_close(stored, torch.tensor([[4.0, 2], [2, 0]]), rtol=1e-3, atol=0)  # its scales are float16
    torch.testing.assert_close(read, torch.tensor([[[20.0, 8]]]), rtol=1e-3, atol=0)


def test_worked_example_of_the_tiers() -> None:
    """One channel, queries of 1, keys ln 1, 1, 2, 4: tokens 0 to 3 got 1 + 1/2 + 1/4 + 1/8, 1/2 + 1/4 + 1/8, 2/4 + 2/8
    and 4/8. Half of the four are important: one recent, 3, and of the others the heaviest, 0."""
    keys = torch.tensor([[[1.0], [1], [2], [4]]]).log()
    tokens = place(MiKV(), Row(torch.ones(1, 4, 1), keys, keys))
    plan = decide(MiKV(), 1.0, tokens)
    assert important(tokens, plan) == [[0, 3]] and kept(tokens, plan) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int, heads: int, share: float) -> None:
    method, row = MiKV(important=share), random_row(n, heads=heads)
    tokens = place(method, row)
    scores = naive.h2o(row.query, row.keys)
    count = -(-n * round(share * 10) // 10)
    recent = count // 2
    for head, mine in zip(scores, important(tokens, decide(method, 1.0, tokens)), strict=True):
        assert mine == [*naive.best(head[: n - recent], count - recent), *range(n - recent, n)]
    found = tokens.signal(ChannelMaxima, Maxima)
    for h in range(2):
        group = row.query[h * heads // 2 : (h + 1) * heads // 2]
        for c in range(8):
            assert float(found.query[0, h, c]) == max(abs(x) for x in group[..., c].flatten().tolist())
            assert float(found.key[0, h, c]) == max(abs(x) for x in row.keys[h, :, c].tolist())


def test_padding_counts_for_nothing() -> None:
    same_alone_and_padded(MiKV(), 1.0)
    batch = place(MiKV(), rows := [random_row(n, seed=n) for n in SIZES])
    for index, row in enumerate(rows):
        alone, mine = (tokens.signal(ChannelMaxima, Maxima) for tokens in (place(MiKV(), row), batch))
        assert torch.equal(mine.query[index], alone.query[0]) and torch.equal(mine.key[index], alone.key[0])


def test_padding_may_be_no_number_at_all() -> None:
    same_alone_and_padded(MiKV(), 1.0, lengths=(10, 20), filler=torch.nan)
    batch = place(MiKV(), [random_row(10), random_row(20)], filler=torch.nan)
    assert bool(batch.signal(ChannelMaxima, Maxima).query.isfinite().all())


def test_chunks_change_nothing() -> None:
    same_in_chunks(MiKV(), 1.0)
    row = random_row(63)
    whole, parts = (place(MiKV(), row, chunks=chunks).signal(ChannelMaxima, Maxima) for chunks in ((), (5, 40)))
    assert torch.equal(whole.query, parts.query) and torch.equal(whole.key, parts.key)


def test_decoding_does_not_move_the_balancer() -> None:
    row = random_row(30)
    prompt = place(MiKV(), row.part(0, 29)).signal(ChannelMaxima, Maxima)
    later = place(MiKV(), row, chunks=[29]).signal(ChannelMaxima, Maxima)
    assert torch.equal(prompt.query, later.query) and torch.equal(prompt.key, later.key)


def outlying(n: int = 64) -> tuple[Tensor, Tensor]:
    """Keys whose channel 3 is thirty times the others, which queries hardly use."""
    row = random_row(n, heads=1, kv_heads=1)
    by = torch.ones(8).index_fill(0, torch.tensor([3]), 30)
    return row.query / by, row.keys * by


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_balancer_helps_where_a_channel_has_outliers(bits: int) -> None:
    query, keys = outlying()
    found = place(MiKV(), Row(query, keys, keys)).signal(ChannelMaxima, Maxima)
    flat = Maxima(torch.ones_like(found.query), torch.ones_like(found.key))
    true = query @ keys.transpose(-1, -2)
    off = [float((packed(keys, bits, m).logits(query[None], ALL)[0] - true).square().mean()) for m in (found, flat)]
    assert off[0] < 0.2 * off[1]


def test_without_few_bits_logits_are_those_of_the_keys() -> None:
    """Multiplied by b and divided by it again: only the grid of 8 bits is lost, a 255th of the spread."""
    query, keys = outlying()
    found = place(MiKV(), Row(query, keys, keys)).signal(ChannelMaxima, Maxima)
    true = query @ keys.transpose(-1, -2)
    torch.testing.assert_close(packed(keys, 8, found).logits(query[None], ALL)[0], true, rtol=0, atol=0.1)


def held_back(bits: int, protect: int) -> Tokens:
    return place(MiKV(bits_important=bits), random_row(40), protect=range(protect))


def test_in_full_precision_important_tokens_compete_with_new_ones() -> None:
    """Forty tokens, of which the first ten are packed: half of all forty may be in full precision."""
    tokens = held_back(16, 10)
    for head, scores in zip(important(tokens, decide(MiKV(), 1.0, tokens)), MiKV().score(tokens)[0], strict=True):
        assert head == [*range(10), *(10 + j for j in naive.best(scores[10:30], 10)), *range(30, 40)]


def test_packed_important_tokens_do_not() -> None:
    """Of the ten new ones half are important, two of them as the latest."""
    method, tokens = MiKV(bits_important=8), held_back(8, 30)
    for head, scores in zip(important(tokens, decide(method, 1.0, tokens)), method.score(tokens)[0], strict=True):
        assert head == [*range(30), *(30 + j for j in naive.best(scores[30:38], 3)), 38, 39]


def test_there_may_be_fewer_open_tokens_than_important_ones() -> None:
    tokens = held_back(16, 35)
    assert important(tokens, decide(MiKV(), 1.0, tokens)) == [list(range(40))] * 2


def test_a_channel_that_nobody_uses_is_left_alone() -> None:
    keys = torch.tensor([[[0.0, 1, 2], [0, 3, 0]]])
    query = torch.tensor([[[1.0, 0, 1]]])
    found = Maxima(query.abs(), keys.abs().amax(1, keepdim=True))
    part = packed(keys, 8, found)
    assert isinstance(part.held_keys, ByToken) and part.held_keys.channel is not None
    assert part.held_keys.channel[0, :2].tolist() == [1, 1]
    torch.testing.assert_close(part.read().keys, keys[0], rtol=0, atol=2e-2)


def test_the_stores_are_as_many_bits_as_asked() -> None:
    assert MiKV().store == (None, Balanced(3))
    assert MiKV(bits_important=8, bits_others=2).store == (Balanced(8), Balanced(2))
    assert MiKV(bits_others=16).store == (None, None)
