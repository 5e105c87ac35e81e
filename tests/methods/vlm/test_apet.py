import pytest
import torch

from fewer.methods.vlm.apet import ApET
from fewer.types import FewerError, Site, Transform
from tests.methods.vlm.build import place
from tests.methods.vlm.waves import decide, kept, through, waves

WAVES = waves(30, 16)


def test_what_the_basis_cannot_say() -> None:
    # the basis is one token, and with this seed it is west: east is a multiple of it, north is not
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [-3.0, 0.0], [0.1, 3.0]])
    method, tokens = ApET(basis=1, seed=2), place(5, features=x)
    assert method.score(tokens)[0].tolist() == pytest.approx([0, 0, 1, 0, 3], abs=1e-3)
    assert kept(method, tokens, 2) == [2, 4]


def test_others_join_the_most_alike_into_their_mean() -> None:
    x = torch.tensor([[9.0, 0.0], [0.0, 9.0], [1.0, 0.1], [0.1, 1.0], [0.0, 2.0]])
    plan = decide(ApET(basis=1, seed=4), place(5, features=x), 2)
    out = plan.apply(x.unsqueeze(0))[0]
    for slot, survivor in enumerate(plan.survivors[0].tolist()):
        members = (plan.slot[0] == slot).nonzero().flatten()
        assert survivor in members.tolist()
        assert torch.allclose(out[slot], x[members].mean(0))
    assert (plan.slot >= 0).all()


def naive(x: torch.Tensor, basis: int, first: int) -> list[float]:
    chosen = [first]
    while len(chosen) < basis:
        chosen.append(max(range(len(x)), key=lambda i: min(float((x[i] - x[j]).square().sum()) for j in chosen)))
    base = x[chosen].double()
    best = torch.linalg.lstsq(base.T, x.double().T).solution  # without the ridge, which is small
    errors: list[float] = (x.double().T - base.T @ best).norm(dim=0).tolist()
    return errors


def test_as_in_plain_python() -> None:
    x = torch.randn(25, 16, generator=torch.Generator().manual_seed(7))
    first = int(torch.randint(25, (), generator=torch.Generator().manual_seed(11)))
    scores = ApET(basis=5, seed=11).score(place(25, features=x))[0]
    assert scores.tolist() == pytest.approx(naive(x, 5, first), abs=1e-3)


def test_as_the_authors() -> None:
    # from encode_images and token_merging (llava/model/llava_arch.py), and from token_merging of modeling_llama_x.py of
    # MaQianKun0/ApET in float32, with the basis 14, 17, 13, 6: the sums of the twelve tokens that go on
    tokens = place(30, features=WAVES)
    method = ApET(basis=4, official=True)
    assert method.score(tokens)[0, :4].tolist() == pytest.approx([2.2991, 2.7978, 2.506, 2.7506], abs=1e-3)
    plan = decide(method, tokens, 12)
    assert plan.survivors[0].tolist() == [1, 3, 8, 10, 11, 15, 16, 19, 25, 26, 28, 29]
    first = [2.0985, 0.3799, -14.0988, 0.2226, -0.1196, 0.6949, -0.1956, -0.8996, -4.9158, 2.4188, 2.903, 0.3863]
    out = plan.apply(WAVES.unsqueeze(0))[0]
    assert out.sum(-1).tolist() == pytest.approx(first, abs=1e-3)
    assert out[3, :5].tolist() == pytest.approx([0.3916, -0.67, 0.849, -0.9466, 0.9885], abs=1e-3)
    later = [2.0985, -14.0988, 0.3799, -0.1956, -0.1196, 0.6949, 0.2226, -0.8996, -4.9158, 2.4188, 2.903, 0.3863]
    site = Site(15, 32, "prefill", 0, None, place=1, places=2)
    out = decide(method, place(30, features=WAVES, site=site), 12).apply(WAVES.unsqueeze(0))[0]
    assert out.sum(-1).tolist() == pytest.approx(later, abs=1e-3)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("count", [1, 10, 11, 29])
def test_exact_counts(official: bool, count: int) -> None:
    method = ApET(official=official)
    assert len(kept(method, place(30, features=WAVES), count)) == count
    assert len(kept(method, place(30, features=torch.ones(30, 4)), count)) == count
    assert isinstance(decide(method, place(30, features=WAVES), count), Transform) == official


@pytest.mark.parametrize("noise", [0.0, 1e-3])
@pytest.mark.parametrize("norm", [1.0, 1e2, 1e4])
def test_blank_pictures(norm: float, noise: float) -> None:
    """One of them says it all, however large it is, but for the noise."""
    draw = torch.Generator().manual_seed(3)
    one = torch.nn.functional.normalize(torch.randn(64, generator=draw), dim=0)
    x = norm * (one + noise / 8 * torch.randn(49, 64, generator=draw))
    for method in (ApET(), ApET(official=True)):
        scores = method.score(place(49, features=x))[0]
        assert scores.dtype == torch.float32
        assert float(scores.max()) <= norm * (2 * noise + 1e-5)
        assert len(kept(method, place(49, features=x), 12)) == 12


def test_seeds() -> None:
    one, again, other = (ApET(basis=2, seed=seed).score(place(30, features=WAVES)) for seed in (0, 0, 5))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_where_it_cuts() -> None:
    assert ApET().after(32) == (-1, 15)
    assert ApET(at=(0.0,)).after(32) == (-1,)
    assert ApET().after(2) == (-1, 0)
    assert 576 * (32 / 576) ** ApET().path(2)[0] == pytest.approx(96)


def test_bad_arguments() -> None:
    with pytest.raises(FewerError, match="basis=0"):
        ApET(basis=0)
    with pytest.raises(FewerError, match="at="):
        ApET(at=(1.0,))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_in_a_model(family: str) -> None:
    assert [after for after, *_ in through("apet", family).plan] == [-1] * 3 + [1] * 3
