"""Positions of visual tokens, worked out by hand."""

import torch

from fewer.adapters.vlm_places import centred, compacted, unturned
from fewer.types import Plan


def test_one_axis_is_counted_through() -> None:
    places = torch.arange(8).unsqueeze(0)  # two words, four visual tokens, two words
    kept = torch.tensor([[0, 1, 3, 5, 6, 7]])
    out, shift = compacted(places, kept, [torch.tensor([2, 3, 4, 5])])
    assert out[0, kept[0]].tolist() == [0, 1, 2, 3, 4, 5] and shift.tolist() == [2]


def test_each_axis_of_three_closes_its_own_gaps() -> None:
    # a word at 0, a picture of 3 x 3 from 1 on, a word at 4
    t = torch.tensor([0, *[1] * 9, 4])
    h = torch.tensor([0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4])
    w = torch.tensor([0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4])
    kept = torch.tensor([[0, 1, 3, 7, 9, 10]])  # the picture's corners
    out, shift = compacted(torch.stack([t, h, w]).unsqueeze(1), kept, [torch.arange(1, 10)])
    got = out[:, 0, kept[0]]
    assert got.tolist() == [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]
    assert shift.tolist() == [1], "the word after it came at 4 and comes at 3"


def test_rows_are_counted_by_themselves_and_padding_not() -> None:
    places = torch.tensor([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
    kept = torch.tensor([[-1, 2, 4, 5], [0, 1, 4, 5]])
    out, shift = compacted(places, kept, [torch.tensor([3, 4]), torch.tensor([2, 3])])
    assert out[0, [2, 4, 5]].tolist() == [0, 1, 2] and out[1, [0, 1, 4, 5]].tolist() == [0, 1, 2, 3]
    assert shift.tolist() == [1, 2]


def test_a_fold_stands_at_the_mean_of_its_members() -> None:
    places = torch.stack([torch.tensor([[0, 5, 5, 5, 9]]), torch.tensor([[0, 5, 7, 9, 9]])])
    plan = Plan(torch.tensor([[0, 0, 1]]), torch.tensor([[0.25, 0.75, 2.0]]), torch.tensor([[0, 2]]))
    out = centred(places, 0, torch.tensor([1, 2, 3]), plan)
    assert out[0, 0].tolist() == [0, 5, 5, 5, 9]
    assert out[1, 0].tolist() == [0, 6.5, 7, 9, 9], "a quarter of 5 and three of 7; a weight of 2 is no other place"


def test_turning_back() -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    angle = torch.arange(5.0).unsqueeze(1) * torch.tensor([1.0, 0.5, 0.1, 0.01])
    for scale in (1.0, 1.3):
        cos, sin = scale * torch.cat([angle, angle], -1).cos(), scale * torch.cat([angle, angle], -1).sin()
        half = torch.cat([-x[..., 4:], x[..., :4]], -1)
        torch.testing.assert_close(unturned(x * cos + half * sin, cos, sin), x)
