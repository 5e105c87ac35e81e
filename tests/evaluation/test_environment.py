"""What a report says about the machine: filled in, and true where it can be checked."""

import os
import platform
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from fewer_eval import environment
from fewer_eval.environment import hardware, versions


def test_hardware_is_filled_in() -> None:
    found = hardware()
    assert list(found) == ["cpu", "cores", "memory", "accelerator", "platform"]
    assert all(value.strip() for value in found.values())
    assert 1 <= int(found["cores"]) <= (os.cpu_count() or 1)
    assert float(found["memory"].removesuffix(" GiB")) > 0


def test_the_accelerator_is_named_when_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware()["accelerator"] == "none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Example H9")
    assert hardware()["accelerator"] == "Example H9"


def test_versions_name_python_and_the_packages() -> None:
    found = versions()
    assert list(found) == ["python", "torch", "transformers", "fewer"]
    assert found["python"] == platform.python_version()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_a_package_that_is_not_installed_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(environment, "version", missing)
    assert versions()["fewer"] == "not installed"
