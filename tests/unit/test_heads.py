"""Ratings from the heads of a block: what a host adds between tokens counts, block by block and row by row."""

from dataclasses import replace

import pytest
import torch

from fewer.score import heads
from fewer.score.heads import attention, received, votes
from fewer.signals.heads import Attended

B, H, N = 3, 2, 7


def block() -> Attended:
    """Three rows, the second with two tokens of padding; and a bias between tokens that each row has for itself."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(B, H, N, 4, generator=draw) for _ in range(3))
    padding = torch.arange(N) >= torch.tensor([N, N - 2, N]).unsqueeze(1)
    bias = torch.zeros(B, N).masked_fill(padding, -torch.inf)[:, None, None]
    return Attended(query, key, value, 0.5, bias, 2 * torch.randn(B, H, N, N, generator=draw))


def test_a_hosts_bias_is_added() -> None:
    one = block()
    logits = torch.einsum("bhqd,bhkd->bhqk", one.query, one.key) * 0.5 + one.relative + one.bias
    torch.testing.assert_close(attention(one), logits.softmax(-1))
    rows = torch.tensor([4, 1])
    torch.testing.assert_close(attention(one, rows), logits.softmax(-1)[:, :, rows])


def test_pieces_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    one, start = block(), torch.full((B, N), 1 / N)
    whole = received(one), votes(one, start, 2)
    monkeypatch.setattr(heads, "BLOCK_CELLS", 1)
    torch.testing.assert_close(received(one), whole[0])
    torch.testing.assert_close(votes(one, start, 2), whole[1])


def test_padding_that_attends_to_nobody_has_no_say() -> None:
    """A host's own mask may say so of padding, and a softmax over nothing is no number."""
    one = block()
    assert one.bias is not None and one.relative is not None
    there = ~one.bias[:, 0, 0].isneginf()
    masked = replace(one, relative=one.relative.masked_fill(~there[:, None, :, None], -torch.inf))
    start = there / there.sum(-1, keepdim=True)
    torch.testing.assert_close(votes(masked, start, 2), votes(one, start, 2))
    torch.testing.assert_close(received(masked), received(one))


def test_what_is_received_is_summed_in_full_precision() -> None:
    """400 queries that give each of 400 keys about a 400th: bfloat16 rounds their sums near one to steps of 1/128."""
    draw = torch.Generator().manual_seed(0)
    half = Attended(*(torch.randn(1, 2, 400, 4, generator=draw).bfloat16() for _ in range(3)), 0.1)
    whole = Attended(half.query.float(), half.key.float(), half.value.float(), 0.1)
    torch.testing.assert_close(received(half), received(whole), atol=0, rtol=1e-3)
