"""TidalDecode: every token stays; which layers choose, and which read what was chosen."""

import pytest
import torch

from fewer.methods.kv.tidaldecode import TidalDecode
from fewer.types import FewerError
from tests.methods.kv.build import SIZES, decide, kept, place, random_row, same_alone_and_padded


def test_the_published_layers() -> None:
    """Layers 0 and 1 read everything, 2 and 9 choose, all others read the choice (TidalDecode, section 3; 9 of 32)."""
    roles = [TidalDecode().reads(layer) for layer in range(32)]
    assert roles == ["all"] * 2 + ["choose"] + ["chosen"] * 6 + ["choose"] + ["chosen"] * 22
    assert [TidalDecode(start=0, correction=0).reads(layer) for layer in range(3)] == ["choose", "chosen", "chosen"]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("keep", [0.1, 3, 1.0])
def test_everything_stays(n: int, keep: float) -> None:
    tokens = place(TidalDecode(), random_row(n))
    plan = decide(TidalDecode(), keep, tokens)
    assert kept(tokens, plan) == [list(range(n))] * 2
    assert torch.equal(plan.pick(tokens.features), tokens.features)


def test_padding_does_not() -> None:
    same_alone_and_padded(TidalDecode(), 1.0)
    same_alone_and_padded(TidalDecode(), 1.0, lengths=(10, 20), filler=torch.nan)


@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"start": -1}, {"start": 5, "correction": 4}])
def test_settings_that_mean_nothing(wrong: dict[str, int]) -> None:
    with pytest.raises(FewerError, match=f"{next(iter(wrong))}="):
        TidalDecode(**wrong)
