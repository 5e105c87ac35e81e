"""RECOMP, extractive: dot products with the question's vector, and as many sentences as the paper keeps."""

import numpy as np
import pytest
import torch

import fewer
from fewer.methods.prompt.recomp_extractive import RECOMPExtractive
from fewer.prompts.source import Source
from fewer.types import BudgetError, FewerError
from tests.encoders import words_embedder

WORDS = ["the", "a", "pump", "lamp", "is", "red", "old", "where", "it", "rains", "door", "shut", ".", "?"]
TEXT = ("The pump is red. It rains.", "The old lamp. The door is shut.")


def test_agrees_with_a_naive_loop() -> None:
    embed = words_embedder(WORDS)
    ranking = RECOMPExtractive(embed).rank(Source(TEXT, question="Where is the pump?"), None)
    naive = []
    vectors = []
    for text in ("Where is the pump?", "The pump is red.", "It rains.", "The old lamp.", "The door is shut."):
        with torch.inference_mode():
            hidden = embed.model(**embed.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vectors.append(hidden.mean(0) / hidden.mean(0).norm())
    naive = [float(vectors[0] @ vector) for vector in vectors[1:]]
    assert ranking.value.tolist() == pytest.approx(naive, abs=1e-6)


@pytest.mark.parametrize("top", [1, 2, 9])
def test_without_a_budget_the_best_stay(top: int) -> None:
    method = RECOMPExtractive(words_embedder(WORDS), top=top)
    ranking = method.rank(Source(TEXT, question="Where?"), None)
    assert ranking.chosen is not None and ranking.chosen.sum() == min(top, 4)
    assert ranking.value[ranking.chosen].min() >= ranking.value[~ranking.chosen].max(initial=-np.inf)
    done = fewer.compress_prompt(TEXT, method, question="Where?", tokenizer="characters")
    assert len(Source(done.documents).sentences) == min(top, 4)


def test_errors() -> None:
    with pytest.raises(FewerError, match=r"recomp-extractive ranks by a question"):
        fewer.compress_prompt(TEXT, RECOMPExtractive(words_embedder(WORDS)), keep=0.5, tokenizer="characters")
    with pytest.raises(BudgetError, match=r"at least one sentence"):
        RECOMPExtractive(top=0)


@pytest.mark.slow
def test_the_default_encoder_finds_the_answer() -> None:
    text = "The lamp was bought in Leeds. Anna repairs the pump on Fridays. It rained all week. The door is blue."
    asked = "Who mends the pump?"
    done = fewer.compress_prompt(text, "recomp-extractive", question=asked, tokenizer="characters")
    assert done.text == "Anna repairs the pump on Fridays."
