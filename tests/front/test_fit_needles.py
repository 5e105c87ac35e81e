"""`fewer fit` of methods that are fitted on questions: what they are given."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fewer import cli
from fewer_eval.fitting import asked
from tests.front.test_cli import fewer, model

__all__ = ["fewer", "model"]

WORDS = "Some words to hide a number in. " * 200


@pytest.mark.parametrize("own", [None, WORDS])
@pytest.mark.parametrize("template", [None, "<user>{{ messages[0].content }}<model>"])
def test_needles_are_where_they_are_said_to_be(model: str, template: str | None, own: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    made = cli._needles(tokenizer, own, 3000, 600, seed=0)
    assert len(made) == 5
    for needle in made:
        text = tokenizer.decode(needle.prompt[0])
        said = tokenizer.decode(needle.prompt[0, needle.start : needle.end])
        number = tokenizer.decode(needle.answer)
        assert said.startswith("The number painted on the ") and said.endswith(f" is {number}")
        assert number.isdigit() and text.count(number) == 1 and "Answer with the number only." in text
        assert text.startswith("<user>") and text.endswith("<model>") if template else text.endswith(".\n")
    depths = [needle.start / needle.prompt.shape[1] for needle in made]
    assert min(depths) < 0.4 and max(depths) > 0.6  # of the sentence ends that are near


def test_texts_are_full_and_repeatable(model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    first = asked(tokenizer, 500, 3, seed=1)
    assert first == asked(tokenizer, 500, 3, seed=1) != asked(tokenizer, 500, 3, seed=2)
    for about in first:
        assert 450 <= len(about.text.encode()) <= 500 and about.fact in about.text and about.fact.endswith(about.answer)


def test_a_model_that_finds_nothing_is_told_so(fewer, model: str, tmp_path: Path) -> None:
    words = ("fit", "compresskv", "--model", model, "--tokens", "600", "--length", "600", "--out", str(tmp_path / "f"))
    code, _, err = fewer(*words)
    assert code == 2 and "finds none of 1 needles" in " ".join(err.split()) and not (tmp_path / "f").exists()
