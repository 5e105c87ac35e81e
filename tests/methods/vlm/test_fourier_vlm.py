import math

import pytest
import torch

from fewer.methods.vlm.fourier_vlm import FourierVLM, lowpass
from fewer.types import Budget
from tests.methods.vlm.build import lay, place
from tests.methods.vlm.waves import decide, kept, through, video, waves


def dct(x: list[float]) -> list[float]:
    n = len(x)
    out = []
    for k in range(n):
        total = sum(x[i] * math.cos(math.pi / n * (i + 0.5) * k) for i in range(n))
        out.append(total * math.sqrt((1 if k == 0 else 2) / n))
    return out


def back(f: list[float]) -> list[float]:
    n = len(f)
    return [
        sum(f[k] * math.sqrt((1 if k == 0 else 2) / n) * math.cos(math.pi / n * (i + 0.5) * k) for k in range(n))
        for i in range(n)
    ]


def smaller(x: list[float], m: int) -> list[float]:
    return [v * math.sqrt(m / len(x)) for v in back(dct(x)[:m])]


def naive(grid: list[list[float]], rows: int, columns: int) -> list[float]:
    wide = [smaller(row, columns) for row in grid]
    tall = [smaller([row[c] for row in wide], rows) for c in range(columns)]
    return [tall[c][r] for r in range(rows) for c in range(columns)]


def test_four_numbers_become_two() -> None:
    # the two lowest frequencies of 0 0 4 4: the mean 2, and half a wave
    assert (lowpass(4, 2) @ torch.tensor([0.0, 0, 4, 4])).tolist() == pytest.approx([0.1522, 3.8478], abs=1e-3)
    assert (lowpass(4, 1) @ torch.tensor([0.0, 0, 4, 4])).tolist() == pytest.approx([2])


@pytest.mark.parametrize(("keep", "shape"), [(1, (1, 1)), (4, (2, 2)), (6, (2, 3)), (9, (3, 3)), (36, (6, 6))])
def test_as_in_plain_python(keep: int, shape: tuple[int, int]) -> None:
    x = waves(36, 1)
    tokens = place(36, features=x, grid=(6, 6))
    if keep == 36:
        plan = FourierVLM().reduce(tokens, torch.zeros(1, 36), FourierVLM().allocate(tokens, x.T, _all(36)))
        assert torch.allclose(plan.apply(tokens.features), tokens.features, atol=1e-5)
        return
    out = decide(FourierVLM(), tokens, keep).apply(tokens.features)[0].flatten().tolist()
    assert out == pytest.approx(naive(x.view(6, 6).tolist(), *shape), abs=1e-5)


def _all(n: int) -> Budget:
    return Budget(n, tokens=n)


def test_as_the_authors() -> None:
    # from compress (fourier_compressor/compress.py of whyisverysmart/Fourier-Compressor) in float32: 6 x 6 to 3 x 3,
    # and 4 x 6 to 2 x 3
    square = [
        -0.0092, 0.4452, 1.6994, 0.3275, 0.3553, -0.0262, 0.4056, -0.7686, 1.3027, -0.3813, -0.6986, 0.7203, -0.3564,
        -1.2646, 0.4865, 0.5819, 1.3823, 1.5345,
    ]  # fmt: skip
    oblong = [-0.0328, 0.5229, 1.6393, 0.3715, 0.3293, -0.0825, 0.5394, -1.1001, 1.5974, -0.5875, -0.6274, 0.9565]
    for grid, keep, expected in (((6, 6), 9, square), ((4, 6), 6, oblong)):
        x = waves(grid[0] * grid[1], 2)
        tokens = place(len(x), features=x, grid=grid)
        out = decide(FourierVLM(official=True), tokens, keep).apply(tokens.features).flatten()
        assert out.tolist() == pytest.approx(expected, abs=1e-3)
        assert torch.allclose(decide(FourierVLM(), tokens, keep).apply(tokens.features).flatten() * 2, out, atol=1e-5)


@pytest.mark.parametrize("keep", [1, 2, 5, 7, 11, 13, 17, 23, 29])
def test_any_count(keep: int) -> None:
    tokens = place(30, features=torch.full((30, 3), 2.5), grid=(5, 6))
    plan = decide(FourierVLM(), tokens, keep)
    assert plan.survivors.shape == (1, keep)
    assert torch.allclose(plan.apply(tokens.features), torch.tensor(2.5), atol=1e-5)  # a constant stays


def test_a_row_with_one_frequency_more() -> None:
    x = waves(16, 1)
    out = decide(FourierVLM(), place(16, features=x, grid=(4, 4)), 5).apply(x.unsqueeze(0))[0].flatten().tolist()
    rows = [smaller([float(x[4 * r + c]) for r in range(4)], 2) for c in range(4)]
    expected = smaller([column[0] for column in rows], 2) + smaller([column[1] for column in rows], 3)
    assert out == pytest.approx(expected, abs=1e-5)


def test_crops_and_what_is_no_rectangle() -> None:
    assert len(kept(FourierVLM(), place(13, layout=lay([(3, 3), (2, 2)])), 5)) == 5
    assert len(kept(FourierVLM(), place(12, layout=video(3, 2, 2)), 2)) == 2
    layout = lay([(3, 3)]).take(torch.tensor([0, 1, 2, 3, 5, 8]))
    x = waves(6, 1)
    out = decide(FourierVLM(), place(6, features=x, layout=layout), 3).apply(x.unsqueeze(0))[0].flatten().tolist()
    assert out == pytest.approx(smaller(x.flatten().tolist(), 3), abs=1e-5)


def test_in_a_model() -> None:
    for family in ("llava", "llava_next", "qwen3_vl"):
        through("fourier-vlm", family)
