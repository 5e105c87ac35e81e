"""`fewer fit` of methods that are trained on documents: what they are given."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from fewer.fit import Fit, load
from fewer.methods import METHODS
from fewer.score.surprise import Reader
from tests.front.test_cli import fewer, model

__all__ = ["fewer", "model"]


class Trained:
    """A method that notes what it was given."""

    fits_on: ClassVar[str] = "documents"

    @classmethod
    def fit_to(cls, model: Any, contexts: Any, *, seed: int, tick: Any) -> Fit:
        assert isinstance(model, Reader) and len(model.surprise(contexts[0])[1]) > 0
        tick("training", 0.5)
        return Fit("trained", "none", {"seed": torch.tensor([seed])}, {"texts": "|".join(contexts)})


def test_an_own_text_comes_in_pieces_with_a_reader(
    fewer: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "trained", Trained)
    sentence = "A sentence of the text that is to be trained on. "
    (tmp_path / "own.txt").write_text(sentence * 100)
    words = ("fit", "trained", "--model", model, "--data", str(tmp_path / "own.txt"), "--seed", "3")
    code, _, err = fewer(*words, "--out", str(tmp_path / "fit"))
    assert code == 0, err
    fit = load(tmp_path / "fit", "trained")
    texts = fit.notes["texts"].split("|")
    assert " ".join(texts) == (sentence * 100).strip() and all(1500 < len(text) <= 1600 for text in texts[:-1])
    assert fit.tensors["seed"].tolist() == [3]
    code, _, err = fewer(*words, "--tokens", "800", "--out", str(tmp_path / "fit"))
    assert code == 0 and len(load(tmp_path / "fit").notes["texts"].split("|")) == 2
