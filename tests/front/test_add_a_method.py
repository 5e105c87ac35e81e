"""The page that shows how to add a method: short, and its method runs and obeys the laws."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fewer
from tests.adapters.encoders import encoder, inputs, output
from tests.laws.encoder_battery import LAWS

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-method.md").read_text()


@pytest.fixture(scope="module")
def loud() -> Any:
    code = re.search(r"```python\n(.*?)```", PAGE, re.S)
    assert code is not None
    names: dict[str, Any] = {"__name__": "loud"}
    exec(compile(code[1], "add-a-method.md", "exec"), names)  # noqa: S102  # our own text
    return names["Loud"]()


def test_it_takes_less_than_sixty_lines() -> None:
    assert len(PAGE.splitlines()) < 60


@pytest.mark.parametrize("law", LAWS)
def test_its_method_obeys(loud: Any, law: str) -> None:
    LAWS[law](loud)


@torch.no_grad()
def test_it_works_without_being_registered(loud: Any) -> None:
    with fewer.compress(encoder("vit"), loud, keep=0.5) as run:
        short = output(encoder("vit"), inputs("vit"))
    assert short.shape[1] == 1 + 18 and run.trace[-1].went == 19
