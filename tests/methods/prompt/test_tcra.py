"""TCRA: each word left out on its own, as a plain loop does it; windows that bound the cost; summaries that fit."""

from typing import Any

import numpy as np
import pytest
import torch

import fewer
from fewer.methods.prompt.tcra import TCRA
from fewer.prompts.source import Source
from fewer.score.embed import Embedder
from fewer.score.writing import summariser
from fewer.types import BudgetError, FewerError
from tests.encoders import words_embedder
from tests.readers import bytes_reader

WORDS = ["the", "a", "pump", "lamp", "is", "red", "old", "where", "it", "rains", "door", "shut", "here", ".", "!", "?"]
WORDS += map(str, range(50))
TEXT = "The pump is red. It rains here!"


def moved(embed: Embedder, text: str, start: int, end: int) -> float:
    """1 - cos between a text and the text without these characters."""
    vectors = []
    for said in (text, text[:start] + text[end:]):
        with torch.inference_mode():
            hidden = embed.model(**embed.tokenizer(said, return_tensors="pt")).last_hidden_state[0].double()
        vectors.append(hidden.mean(0) / hidden.mean(0).norm())
    return float(1 - vectors[0] @ vectors[1])


def test_agrees_with_a_naive_loop() -> None:
    embed = words_embedder(WORDS)
    documents = (TEXT, "The old lamp.")
    ranking = TCRA(embed).rank(Source(documents), None)
    assert len(ranking.units) == 13 and ranking.chosen is None
    for (document, start, end), value in zip(ranking.units, ranking.value, strict=True):
        assert value == pytest.approx(moved(embed, documents[document], start, end), abs=1e-5)
    assert ranking.value.std() > 1e-3


def test_words_that_move_least_go_first() -> None:
    embed = words_embedder(WORDS)
    done = fewer.compress_prompt(TEXT, TCRA(embed), keep=0.6, tokenizer="characters")
    ranked = sorted(done.units, key=lambda unit: unit.score)
    assert all(unit.kept for unit in ranked[-3:]) and not all(unit.kept for unit in ranked[:3]) and done.extractive


def test_windows_hold_whole_sentences_and_bound_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    embed, read = words_embedder(WORDS), []
    text = " ".join(f"The pump {n} is red." for n in range(40)) + " the" * 45
    call = Embedder.__call__

    def counting(self: Embedder, texts: Any) -> Any:
        read.append(list(texts))
        return call(self, texts)

    monkeypatch.setattr(Embedder, "__call__", counting)
    source = Source((text,))
    ranking = TCRA(embed, window=20).rank(source, None)
    windows = read[0]
    assert [len(w.split()) for w in windows[:13]] == [15] * 13  # three sentences of six tokens each
    assert [len(w.split()) for w in windows[13:]] == [5, 20, 20, 5]  # and one that is too long, in parts
    assert " ".join(windows) == text
    assert sum(map(len, read[1:])) == len(ranking.units) == len(source.words)
    start = text.index("The pump 3 ")
    inside = ranking.value[np.flatnonzero(ranking.units.start == start + 4)[0]]
    assert inside == pytest.approx(moved(embed, windows[1], 4, 8), abs=1e-5)


def test_summaries_are_put_in_place_and_undone() -> None:
    text = "The pump is red and very old. " * 30 + "\n\n" + "It rains here. " * 20
    asked: list[tuple[str, int]] = []

    def write(piece: str, tokens: int) -> str:
        asked.append((piece, tokens))
        return "Red pump. It is old. And so it goes on for ever and ever, past what was asked. " * 10

    done = fewer.compress_prompt(text, TCRA(summarise=write), keep=0.3, tokenizer="characters")
    assert not done.extractive and done.tokens_after <= 0.3 * len(text)
    assert fewer.restore(done.text, done.patch()) == text
    assert "".join("".join(piece.split()) for piece, _ in asked) == "".join(text.split())
    for piece, tokens in asked:
        assert 0.2 * len(piece) < tokens <= 0.3 * len(piece)
    assert all(run.written is None or run.written.endswith(".") for run in done.runs)
    assert sum(run.written is not None for run in done.runs) == len(asked)  # none is lost


def test_summaries_without_a_budget_keep_the_papers_share() -> None:
    text = "The pump is red. " * 20
    done = fewer.compress_prompt(text, TCRA(summarise=lambda piece, _: piece), tokenizer="characters")
    assert 0.25 * len(text) < done.tokens_after <= 0.35 * len(text) + 1  # a space at the end


def test_what_comes_back_empty_is_left_out_and_said() -> None:
    text = "One is here. " * 30 + "Two is here. " * 30
    method = TCRA(summarise=lambda piece, tokens: "" if piece.startswith("One") else "Two.")
    done = fewer.compress_prompt(text, method, keep=0.3, tokenizer="characters")
    assert "came back empty" in done.notes[0]
    with pytest.raises(FewerError, match=r"gave NoneType, not text"):
        fewer.compress_prompt(text, TCRA(summarise=lambda piece, tokens: None), keep=0.3, tokenizer="characters")  # type: ignore[arg-type,return-value]


def test_a_language_model_summarises() -> None:
    reader = bytes_reader(window=600)
    write = summariser(reader)
    said = write("The pump is red. " * 60, 12)  # longer than the window
    assert isinstance(said, str) and said == write("The pump is red. " * 60, 12)
    assert len(reader.tokenizer(said).input_ids) <= 3 * 12


def test_odd_texts_and_errors() -> None:
    embed = words_embedder(WORDS)
    for text in ("x", "...", "的的的 是。", "\r\n a \r\n"):
        assert np.isfinite(TCRA(embed).rank(Source((text, "", text)), None).value).all()
    with pytest.raises(BudgetError, match=r"window=1"):
        TCRA(window=1)
    with pytest.raises(BudgetError, match=r"no threshold of its own"):
        fewer.compress_prompt(TEXT, TCRA(embed), tokenizer="characters")


@pytest.mark.slow
def test_the_default_encoder_keeps_what_a_sentence_is_about() -> None:
    text = "In the end it was the volcano that destroyed the harbour, and so on."
    done = fewer.compress_prompt(text, "tcra", keep=0.5, tokenizer="characters")
    assert "volcano" in done.text and "harbour" in done.text


@pytest.mark.slow
def test_the_default_language_model_summarises() -> None:
    text = "The museum in Lund opens at nine on Mondays. It is closed in July. Tickets cost four euros. " * 3
    done = fewer.compress_prompt(text, TCRA(summarise="default"), keep=0.4)
    assert 0 < done.tokens_after <= 0.4 * done.tokens_before and fewer.restore(done.text, done.patch()) == text
