"""How many survive at each head and layer."""

from dataclasses import replace

import pytest
import torch

from fewer.allocate.across_heads import across_heads
from fewer.allocate.by_layer import falling
from fewer.allocate.uniform import uniform
from fewer.types import Allocation, Budget, BudgetError, Site, Tokens

ONLY = Site()


def tokens(*rows: int, h: int = 2, seen: tuple[int, ...] | None = None, site: Site = ONLY) -> Tokens:
    """Rows of these lengths, padded at the front; `seen` where more came by than is there."""
    longest = max(rows)
    padding = torch.arange(longest) < (longest - torch.tensor(rows)).view(-1, 1, 1)
    padding = padding.expand(-1, h, -1)
    seen = rows if seen is None else seen
    positions = torch.arange(longest) - (longest - torch.tensor(seen)).view(-1, 1, 1)
    return Tokens(
        features=torch.zeros(len(rows), h, longest, 1),
        positions=positions.expand(-1, h, -1),
        padding=padding,
        protected=torch.zeros_like(padding),
        seen=torch.tensor(seen),
        site=site,
    )


def even(place: Tokens, count: int) -> Allocation:
    return uniform(place, Budget.parse(count))


# --- uniform ---


def test_every_head_keeps_the_rows_share() -> None:
    found = uniform(tokens(100, 7, 1), Budget.parse(0.25))
    assert found.counts.tolist() == [[25, 25], [2, 2], [1, 1]] and found.note == "" and found.floor is None


def test_a_share_is_of_what_was_seen_and_never_more_than_there_is() -> None:
    """Of 100 tokens seen 30 are left: a half would be 50, so all 30 stay; a fifth is 20."""
    place = tokens(30, seen=(100,))
    assert uniform(place, Budget.parse(0.5)).counts.tolist() == [[30, 30]]
    assert uniform(place, Budget.parse(0.2)).counts.tolist() == [[20, 20]]
    assert uniform(place, Budget.parse(64)).counts.tolist() == [[30, 30]]


def test_rows_within_the_window_are_kept_whole_and_named() -> None:
    found = uniform(tokens(100, 8, 9, 3, 3), Budget.parse(4), window=8)
    assert found.counts.tolist() == [[4, 4], [8, 8], [4, 4], [3, 3], [3, 3]]
    assert found.note == "rows of [8] tokens are no longer than the window of 8 and are kept whole"
    assert uniform(tokens(8, 5, 5), Budget.parse(0.5), window=8).note.startswith("rows of [5, 8] tokens")


def test_a_budget_in_bytes_must_be_counted_first() -> None:
    with pytest.raises(BudgetError, match="call within"):
        uniform(tokens(10), Budget.parse("1KB"))
    assert uniform(tokens(10), Budget.parse("1KB").within(lambda n: 250 * n)).counts.tolist() == [[4, 4]]


# --- falling ---


def fall(place: Tokens, keep: float | int, beta: int, reserved: int) -> Allocation:
    return falling(place, Budget.parse(keep), reserved, beta, even=uniform(place, Budget.parse(keep)))


def layers(place: Tokens, count: int, beta: int, reserved: int, depth: int) -> list[int]:
    found = [fall(replace(place, site=Site(layer, depth)), count, beta, reserved).counts for layer in range(depth)]
    assert all(torch.equal(layer[..., :1].expand_as(layer), layer) for layer in found)
    return [int(layer[0, 0]) for layer in found]


@pytest.mark.parametrize(
    ("n", "count", "reserved", "depth", "shape"),
    [
        (100, 12, 2, 3, [21, 12, 3]),  # 10 free: 19, 10, 1
        (100, 10, 0, 2, [19, 1]),
        (20, 12, 2, 3, [20, 12, 4]),  # 19 wanted, 18 there
        (100, 10, 10, 3, [10, 10, 10]),  # nothing free
        (100, 10, 64, 3, [10, 10, 10]),
        (10, 10, 2, 3, [10, 10, 10]),  # everything stays
        (100, 12, 2, 1, [12]),  # a single layer
    ],
)
def test_the_slope(n: int, count: int, reserved: int, depth: int, shape: list[int]) -> None:
    assert layers(tokens(n), count, 10, reserved, depth) == shape
    assert sum(shape) == count * depth


@pytest.mark.parametrize("depth", [2, 3, 5, 16])
@pytest.mark.parametrize("count", [2, 9, 40, 77, 99])
@pytest.mark.parametrize("beta", [1, 2, 20])
def test_the_layers_total_is_the_even_one(depth: int, count: int, beta: int) -> None:
    found = layers(tokens(100), count, beta, 8, depth)
    assert sum(found) == count * depth
    assert max(found) <= 100 and min(found) >= min(8, count)
    assert found == sorted(found, reverse=True)


def test_rows_of_a_batch_fall_for_themselves() -> None:
    place, depth = tokens(100, 40, 3), 3
    for layer in range(depth):
        site = Site(layer, depth)
        together = fall(replace(place, site=site), 0.25, 20, 4).counts
        for row, n in enumerate((100, 40, 3)):
            assert torch.equal(together[row], fall(tokens(n, site=site), 0.25, 20, 4).counts[0])


# --- across heads ---


def test_more_to_the_heads_that_hold_the_best() -> None:
    """Four tokens in all; the best four are three of head 0 and one of head 1, so without a floor 3 and 1."""
    scores = torch.tensor([[[9.0, 8, 7, 0, 0], [6, 5, 4, 3, 2]]])
    place = tokens(5)
    assert across_heads(place, scores, even(place, 2), 0.0).counts.tolist() == [[3, 1]]
    assert across_heads(place, scores, even(place, 2), 1.0).counts.tolist() == [[2, 2]]
    found = across_heads(place, scores, even(place, 2), 0.5)  # 1 each, and 2 by 3 : 1, that is 1.5 and 0.5
    assert int(found.counts.sum()) == 4 and found.counts.tolist() in ([[3, 1]], [[2, 2]])
    assert found.floor is not None and found.floor.tolist() == [[1, 1]]


def test_padding_is_never_among_the_best() -> None:
    """The short row has two tokens a head; its total of 2 is shared by them, not by the padding in front."""
    place = tokens(6, 2)
    scores = torch.rand(2, 2, 6).masked_fill(place.padding, -torch.inf)
    scores[1, :, -2:] = torch.tensor([[0.9, 0.8], [0.1, 0.2]])
    found = across_heads(place, scores, even(place, 2), 0.0)
    assert found.counts[1].tolist() == [2, 2], "a row of two keeps both"
    half = across_heads(place, scores, uniform(place, Budget.parse(0.5)), 0.0)
    assert half.counts[1].tolist() == [2, 0] and int(half.counts[0].sum()) == 6


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.29, 0.7, 1.0])
@pytest.mark.parametrize("count", [2, 3, 17, 50, 100])
def test_totals_and_floors(count: int, floor: float) -> None:
    place = tokens(100, 60, h=5)
    scores = torch.rand(2, 5, 100).masked_fill(place.padding, -torch.inf)
    scores[:, 0] *= 3
    share = even(place, count)
    found = across_heads(place, scores, share, floor)
    assert torch.equal(found.counts.sum(-1), share.counts.sum(-1))
    assert bool((found.counts <= place.available).all())
    assert found.floor is not None and bool((found.counts >= found.floor).all())
    assert bool((found.floor <= floor * share.counts + 1e-4).all()) and bool(
        (found.floor > floor * share.counts - 1).all()
    )


def test_heads_that_an_earlier_compression_left_uneven_share_the_whole_total() -> None:
    """Of 100 tokens seen head 0 holds 35 and head 1 only 15; at 20 a head there are 40 to share, not 20 + 15."""
    whole = tokens(35, seen=(100,))
    padding = whole.padding.clone()
    padding[:, 1, :20] = True
    place = replace(whole, padding=padding)
    scores = torch.rand(1, 2, 35).masked_fill(padding, -torch.inf)
    found = across_heads(place, scores, even(place, 20), 0.2)
    assert int(found.counts.sum()) == 40
    assert bool((found.counts <= place.available).all())


def test_across_heads_passes_the_note_on() -> None:
    share = Allocation(torch.tensor([[2, 2]]), note="a remark")
    assert across_heads(tokens(5), torch.rand(1, 2, 5), share, 0.2).note == "a remark"
