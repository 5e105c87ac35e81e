"""DART: pivots with great keys, and what is least like them."""

import math
from dataclasses import replace

import pytest
import torch

import fewer
from fewer.errors import FewerError
from fewer.methods.vlm.dart import DART
from fewer.signals.visual import Looked
from tests.methods.vlm.build import place, random
from tests.methods.vlm.look import look, turned
from tests.methods.vlm.run import kept, through
from tests.vlms import FAMILIES


def test_worked_example() -> None:
    angles = torch.tensor([0.0, 0.1, 1.6, 3.1, 0.2])
    features = torch.stack([angles.cos(), angles.sin()], -1)
    key = torch.zeros(1, 6, 2)
    key[0, 0] = 9.0  # token 0 has the greatest key: the pivot
    looked = look(5, lead=0, words=1, query=torch.zeros(1, 6, 2), key=key, states=torch.ones(1, 2), still=True)
    tokens = place(5, features=features, looked=looked)
    method = DART(image=1, text=0)
    assert kept(method, tokens, 1) == [0]
    assert kept(method, tokens, 2) == [0, 3]  # the one that points the other way
    assert kept(method, tokens, 3) == [0, 2, 3]


def reference(looked: object, features: torch.Tensor, keep: int) -> list[int]:
    """The same in plain Python."""

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    def norm(column: int) -> float:
        return sum(abs(x) for head in looked.key[:, column].tolist() for x in head)  # type: ignore[attr-defined]

    states, n = features.tolist(), len(features)
    own = sorted(sorted(range(n), key=lambda j: -norm(3 + j))[:4])
    words = sorted(sorted(range(6), key=lambda i: -norm(3 + n + i))[:4])
    pivots = [states[j] for j in own] + [looked.states[3 + i].tolist() for i in words]  # type: ignore[attr-defined]
    chosen = set(own)
    each, more = divmod(keep - 4, 8)
    for number, pivot in enumerate(pivots):
        free = sorted(set(range(n)) - chosen, key=lambda j: cosine(pivot, states[j]))
        chosen.update(free[: each + (number < more)])
    return sorted(chosen)


@pytest.mark.parametrize("keep", [5, 12, 17, 29])
def test_against_plain_python(keep: int) -> None:
    looked, features = look(30, seed=8), random(1, 30, 8, seed=9)
    assert kept(DART(), place(30, features=features, looked=looked), keep) == reference(looked, features[0], keep)


@pytest.mark.parametrize(
    ("seed", "found"),
    [
        (0, [0, 1, 3, 4, 5, 6, 8, 9, 12, 15, 18, 19]),
        (1, [0, 1, 2, 4, 5, 7, 8, 9, 10, 13, 15, 17]),
        (2, [0, 2, 5, 6, 7, 8, 9, 11, 12, 16, 17, 19]),
        (3, [0, 3, 4, 5, 6, 8, 10, 11, 15, 16, 17, 18]),
    ],
)
def test_as_the_authors(seed: int, found: list[int]) -> None:
    """Numbers of a port of their get_retained_image_token (4 + 4 pivots, one token each) on these keys and states."""
    tokens = place(20, features=random(1, 20, 8, seed=seed + 50), looked=look(20, seed=seed))
    assert kept(DART(), tokens, 12) == found


@pytest.mark.parametrize("wide", [8, 4])
def test_padding_before_a_row_changes_no_norm(wide: int) -> None:
    """Seven places on, all keys are turned further; of some models in part, by tables that are scaled."""
    plain = look(30, seed=8)
    angle = torch.arange(39).unsqueeze(1) * 0.5 ** torch.arange(wide // 2)
    features = random(1, 30, 8, seed=9)

    def moved(by: int) -> Looked:
        turns = torch.stack(
            [torch.cat([one, one], -1) for one in ((angle + by * angle[1]).cos(), (angle + by * angle[1]).sin())]
        )
        turns = 1.3 * turns
        key = torch.cat([turned(plain.plain_key[..., :wide], *turns), plain.plain_key[..., wide:]], -1)
        return replace(plain, key=key, turns=turns)

    alone, padded = (place(30, features=features, looked=moved(by)) for by in (0, 7))
    norms = moved(0).key[:, plain.visual].abs().sum((0, 2))
    assert torch.equal(DART().score(alone)[0], norms), "bit for bit those of the keys as they are"
    torch.testing.assert_close(DART().score(padded)[0], norms)
    assert kept(DART(), padded, 12) == kept(DART(), alone, 12)
    later = replace(moved(7), before=3)  # of a later chunk, where it is not known how far the row was moved
    as_it_is = later.key[:, plain.visual].abs().sum((0, 2))
    assert torch.equal(DART().score(place(30, features=features, looked=later))[0], as_it_is)
    assert not torch.allclose(as_it_is, norms)


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "smolvlm"])
@torch.no_grad()
def test_a_padded_row_is_the_row_alone(family: str) -> None:
    """Where positions count the columns, padding and all, as a forward without a mask's positions has them."""
    case = FAMILIES[family]()
    for name, weights in case.model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weights.mul_(15)
    inputs = case.inputs([1, 1, 1])
    with fewer.compress(case.model, DART(), keep=0.3) as run:
        case.model(**inputs)
    both = run.kept
    for row in range(3):
        with fewer.compress(case.model, DART(), keep=0.3) as run:
            case.model(**case.row(inputs, row))
        assert torch.equal(run.kept[0][0], both[row][0])


def test_duplicates_and_extremes() -> None:
    same = place(20, features=torch.ones(1, 20, 8), looked=look(20))
    assert len(kept(DART(), same, 9)) == 9
    tokens = place(20, looked=look(20, words=2))  # fewer words than pivots
    for keep in (1, 4, 5, 19):
        assert len(kept(DART(), tokens, keep)) == keep


def test_bad_arguments() -> None:
    with pytest.raises(FewerError, match="layer=0"):
        DART(layer=0)
    with pytest.raises(FewerError, match="one pivot"):
        DART(image=0)
    assert DART().after(32) == (1,)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_through_a_model(family: str) -> None:
    assert {after for after, _ in through(family, "dart")} == {1}
