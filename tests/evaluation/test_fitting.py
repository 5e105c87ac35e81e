"""The text that methods are fitted on."""

import pytest

from fewer_eval.fitting import mixture
from fewer_eval.tasks.needle import _QUALITIES, _THINGS


def test_there_is_as_much_as_asked_for_and_the_same_for_a_seed() -> None:
    text = mixture(20_000)
    assert 20_000 <= len(text) <= 40_000
    assert text == mixture(20_000, seed=0) != mixture(20_000, seed=1)


@pytest.mark.parametrize("seed", range(3))
def test_it_gives_no_task_away(seed: int) -> None:
    text = mixture(60_000, seed)
    assert "magic number" not in text
    assert not any(f"{quality}-{thing}" in text for quality in _QUALITIES for thing in _THINGS)


def test_it_holds_facts_code_and_records() -> None:
    text = mixture(60_000)
    assert "Invoice " in text and "def " in text and '"place": ' in text and "name,place,item,count" in text
