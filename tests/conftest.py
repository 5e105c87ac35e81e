"""Shape annotations are checked here and nowhere else; tiny models are built in code, the default model is real."""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a hub; one that cannot be reached is tried for a minute

import pytest
import torch
from jaxtyping import install_import_hook

hook = install_import_hook("fewer", "beartype.beartype")
hook.__enter__()  # stays on for the whole run: every later import of fewer is checked

from tests.tiny import tiny  # noqa: E402  # the hook must come before the first import of fewer


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    import fewer

    doctest_namespace.update(torch=torch, fewer=fewer, tiny_llama=lambda: tiny("llama"))


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The converted default model; skipped, with the reason, where its package cannot be had."""
    from fewer.models import ModelUnavailable, default_model_path

    try:
        return default_model_path()
    except ModelUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def default_vision_model_path() -> Path:
    """The converted default vision model; skipped, with the reason, where it cannot be had."""
    from fewer.models import ModelUnavailable
    from fewer.vision import default_vision_model_path

    try:
        return default_vision_model_path()
    except ModelUnavailable as reason:
        pytest.skip(str(reason))
