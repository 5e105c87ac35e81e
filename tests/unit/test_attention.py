"""Attention over packed heads and a tail equals one plain softmax over everything."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer import attention
from fewer.attention import attend
from fewer.ragged import Dense, Ragged

COUNTS = {"uneven": ((5, 0, 3), (1, 7, 2)), "even": ((4, 4, 4), (4, 4, 4)), "one": ((1, 1, 1), (1, 1, 1))}
MASKS = ("none", "causal", "bool", "heads", "additive", "padded")


def stored(counts: tuple[tuple[int, ...], ...], d: int = 8, e: int = 6) -> Ragged:
    n = max(max(row) for row in counts)
    keys, values = torch.randn(2, 3, n, d), torch.randn(2, 3, n, e)
    positions = torch.arange(n).expand(2, 3, n)
    wanted = torch.tensor(counts).unsqueeze(-1)
    return Ragged.pack(Dense(keys, values, positions, positions, torch.arange(n) < n - wanted), moved=False)


def naive(
    query: Tensor, kept: Ragged, keys: Tensor, values: Tensor, visible: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """Head by head and query by query in float64; `visible` is additive, `(b, heads, q, t)`, -inf for hidden."""
    b, heads, q, _ = query.shape
    groups, out = heads // keys.shape[1], []
    for row in range(b):
        for head in range(heads):
            start, end = kept.bounds[row][head // groups]
            k = torch.cat([kept.keys[start:end], keys[row, head // groups]]).double()
            v = torch.cat([kept.values[start:end], values[row, head // groups]]).double()
            for i in range(q):
                logits = k @ query[row, head, i].double() * scaling
                logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                logits[end - start :] += visible[row, head, i].double()
                out.append(torch.softmax(logits, 0) @ v)
    return torch.stack(out).view(b, heads, q, -1)


def masks(kind: str, heads: int, q: int, t: int) -> tuple[Tensor | None, Tensor]:
    """What the function is given, and the same as an additive mask of full size."""
    causal = torch.arange(t) <= torch.arange(q)[:, None] + t - q
    if kind in ("none", "causal"):
        visible = causal.expand(2, heads, q, t)
        given = None if kind == "none" else causal[None, None].expand(2, 1, q, t)
    elif kind == "bool":
        visible = (causal & (torch.rand(2, 1, q, t) < 0.7)).expand(2, heads, q, t)
        given = visible[:, :1]
    elif kind == "heads":
        given = visible = causal & (torch.rand(2, heads, q, t) < 0.7)
    elif kind == "additive":
        bias = torch.randn(2, 1, q, t).masked_fill(~causal, torch.finfo(torch.float32).min)
        return bias, bias.masked_fill(~causal, -torch.inf).expand(2, heads, q, t)
    else:  # the first row's first tail token is padding, as additive masks have it
        hidden = ~causal.expand(2, 1, q, t).clone()
        hidden[0, :, :, 0] = True
        given = torch.zeros(2, 1, q, t).masked_fill(hidden, torch.finfo(torch.float32).min)
        return given, torch.zeros(2, 1, q, t).masked_fill(hidden, -torch.inf).expand(2, heads, q, t)
    return given, torch.zeros(2, heads, q, t).masked_fill(~visible, -torch.inf)


def compare(
    counts: str,
    heads: int,
    q: int,
    t: int,
    mask: str,
    softcap: float | None,
    spoil: Callable[[dict[str, Any]], None] = lambda given: None,
) -> None:
    """`attend` against the naive softmax; queries that see nothing at all are left out, they have no right answer."""
    kept = stored(COUNTS[counts])
    query, keys, values = torch.randn(2, heads, q, 8), torch.randn(2, 3, t, 8), torch.randn(2, 3, t, 6)
    given, visible = masks(mask, heads, q, t)
    arguments = {
        "query": query, "parts": [kept], "keys": keys, "values": values, "mask": given, "scaling": 0.3,
        "softcap": softcap,
    }  # fmt: skip
    spoil(arguments)
    ours = attend(**arguments)
    expected = naive(query, kept, keys, values, visible, 0.3, softcap)
    some = ~expected.isnan()
    assert bool(some.any()) and ours.shape == expected.shape
    torch.testing.assert_close(ours[some].double(), expected[some], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("q", "t"), [(1, 1), (1, 9), (4, 4), (5, 9)])
@pytest.mark.parametrize("heads", [3, 6])
@pytest.mark.parametrize("counts", COUNTS)
def test_agrees_with_one_plain_softmax(
    counts: str, heads: int, q: int, t: int, mask: str, softcap: float | None
) -> None:
    compare(counts, heads, q, t, mask, softcap)


@pytest.mark.parametrize("cells", [1, 2 * 6 * 16 * 2, 2 * 6 * 16 * 3 + 5, 10**9])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("counts", ["uneven", "even"])
def test_blocks_change_nothing(counts: str, mask: str, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_CELLS", cells)
    compare(counts, 6, 7, 9, mask, None)


def test_blocks_bound_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows, six heads, at most 7 + 9 keys: 192 logits a query, so 600 cells let 3 queries through at a time."""
    sizes, block = [], attention._block

    def counted(query: Tensor, *rest: Any) -> Tensor:
        sizes.append(query.shape[2])
        return block(query, *rest)

    monkeypatch.setattr(attention, "BLOCK_CELLS", 600)
    monkeypatch.setattr(attention, "_block", counted)
    compare("uneven", 6, 7, 9, "none", None)
    assert sizes == [3, 3, 1]


def _wrong_scale(given: dict[str, Any]) -> None:
    given["scaling"] = 0.31


def _wrong_head(given: dict[str, Any]) -> None:
    given["query"] = given["query"].flip(1)


def _lost_entry(given: dict[str, Any]) -> None:
    given["values"] = given["values"].clone()
    given["values"][:, :, 0] += 0.1


def _no_cap(given: dict[str, Any]) -> None:
    given["softcap"] = None


def _no_mask(given: dict[str, Any]) -> None:
    given["mask"] = torch.zeros(2, 1, 5, 9)


@pytest.mark.parametrize("fault", [_wrong_scale, _wrong_head, _lost_entry, _no_cap, _no_mask])
def test_the_comparison_sees_faults(fault: Callable[[dict[str, Any]], None]) -> None:
    with pytest.raises(AssertionError):
        compare("uneven", 6, 5, 9, "none", 2.0, fault)


def test_worked_example() -> None:
    """Kept keys ln 2 and ln 1 with values 3 and 9, a tail key ln 3 with value 6, query 1: (2*3 + 1*9 + 3*6) / 6."""
    kept = Ragged(
        torch.tensor([[2.0], [1.0]]).log(),
        torch.tensor([[3.0], [9.0]]),
        torch.tensor([0, 1], dtype=torch.int32),
        ((2,),),
    )
    one = torch.ones(1, 1, 1, 1)
    out = attend(one, [kept], torch.tensor([[[[3.0]]]]).log(), 6 * one, None, 1.0)
    torch.testing.assert_close(out, torch.full((1, 1, 1, 1), 5.5))


def test_the_softmax_is_in_float32() -> None:
    """2,000 equal bfloat16 logits: weights of 1/2000 each; a sum in bfloat16 would stop growing at 256."""
    n = 2000
    flat = torch.zeros(n, 2, dtype=torch.bfloat16)
    ones = torch.ones(n, 2, dtype=torch.bfloat16)
    kept = Ragged(flat, ones, torch.zeros(n, dtype=torch.int32), ((n,),))
    new = torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16)
    out = attend(new, [kept], new, new, None, 1.0)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), torch.ones(1, 1, 1, 2), rtol=0.02, atol=0)


@pytest.mark.parametrize(("dtype", "said"), [(torch.bfloat16, 0.017), (torch.float16, 0.002)])
def test_half_precision_is_as_exact_as_is_said(dtype: torch.dtype, said: float) -> None:
    """Logits with a standard deviation of 9: the errors in the module's docstring, and the fused attention's beside."""
    torch.manual_seed(0)
    d, n, t, h = 128, 1024, 64, 64
    query, keys, values = ((torch.randn(1, h, m, d) * s).to(dtype) for m, s in ((1, 3), (n + t, 3), (n + t, 1)))
    fused = torch.nn.functional.scaled_dot_product_attention
    true = fused(query.double(), keys.double(), values.double())
    at = torch.arange(n).expand(1, h, n)
    dense = Dense(keys[:, :, :n], values[:, :, :n], at, at, torch.zeros(1, h, n, dtype=torch.bool))
    ours = attend(query, [Ragged.pack(dense, moved=False)], keys[:, :, n:], values[:, :, n:], None, d**-0.5)
    off, theirs = (float((out.double() - true).norm() / true.norm()) for out in (ours, fused(query, keys, values)))
    assert off == pytest.approx(said, rel=0.3) and 5 < off / theirs < 20


def test_inputs_are_not_modified() -> None:
    kept = stored(COUNTS["uneven"])
    query, keys, values, mask = (
        torch.randn(2, 6, 3, 8),
        torch.randn(2, 3, 5, 8),
        torch.randn(2, 3, 5, 6),
        torch.zeros(2, 1, 3, 5),
    )
    before = [x.clone() for x in (query, keys, values, mask, kept.keys, kept.values)]
    attend(query, [kept], keys, values, mask, 0.3, 2.0)
    for x, y in zip((query, keys, values, mask, kept.keys, kept.values), before, strict=True):
        assert torch.equal(x, y)
