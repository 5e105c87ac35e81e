"""Selective Context: sentences read alone, units, its own threshold, and a plain reference."""

from typing import Any

import numpy as np
import pytest
import torch

import fewer
from fewer.methods.prompt.selective_context import LONGEST, SelectiveContext, phrases
from fewer.prompts.source import Source
from fewer.types import Budget, FewerError
from tests.readers import bytes_reader, pairs_reader


def test_dull_phrases_go() -> None:
    nats = {"the": 1.5, "cat": 3.0, "sat": 6.0, "on": 2.5, "a": 2.0, "zinc": 9.0, "roof": 5.0, "it": 3.0, ".": 4.0}
    source = Source(("the cat sat on a zinc roof. it sat.",))
    ranking = SelectiveContext(pairs_reader(nats)).rank(source, None)
    # of each phrase the mean: the cat sat (1.5 + 3 + 6) / 3, ...
    worth = {source.of(unit): value for unit, value in zip(ranking.units, ranking.value.tolist(), strict=True)}
    said = {"the cat sat": 3.5, "on": 2.5, "a zinc roof": 16 / 3, ".": 4.0, "it": 3.0, "sat": 6.0}
    assert worth == pytest.approx(said)
    # of seven, the three lowest are below the quantile of 0.35, which is between 3.5 and 4
    assert ranking.chosen is not None
    found = fewer.compress_prompt(source.documents[0], SelectiveContext(pairs_reader(nats)), tokenizer="characters")
    assert found.text == "a zinc roof. sat."


def test_a_sentence_does_not_know_the_one_before() -> None:
    reader = bytes_reader()
    one = SelectiveContext(reader, "tokens").rank(Source(("It ran. It ran.",)), None)
    half = len(one.value) // 2
    assert np.allclose(one.value[:half], one.value[half:], atol=1e-4)
    assert not np.allclose(
        reader.surprise("It ran. It ran.")[1][:7], reader.surprise("It ran. It ran.")[1][8:], atol=1e-2
    )


@pytest.mark.parametrize("unit", ["sentences", "phrases", "tokens"])
def test_it_is_the_plain_algorithm(unit: Any) -> None:
    reader = bytes_reader()
    texts = ("The dog ran to a big red house. It was not locked!\nNobody knew.", "Every fox saw it.")
    source = Source(texts)
    ranking = SelectiveContext(reader, unit, keep=0.4).rank(source, None)
    nats: dict[tuple[int, int], float] = {}  # of each character
    for span in source.sentences:
        ids, offsets = reader.tokens(source.of(span))
        with torch.inference_mode():
            log = reader.model(torch.tensor([[256, *ids]])).logits[0].double().log_softmax(-1)
        for i, token in enumerate(ids):
            nats[span.document, span.start + int(offsets[i][0])] = -float(log[i, token])
    means = [np.mean([nats[u.document, at] for at in range(u.start, u.end)]) for u in ranking.units]
    assert np.allclose(ranking.value, means, atol=1e-4)
    threshold = np.percentile(means, 60)
    assert ranking.chosen is not None and ranking.chosen.tolist() == [mean >= threshold for mean in means]
    assert len({span.document for span in ranking.units}) == 2


def test_with_a_budget_the_best_units_that_fit_stay() -> None:
    nats = {"one": 1.5, "two": 3.0, "three": 5.0, "four": 7.0}
    method = SelectiveContext(pairs_reader(nats), "tokens")
    found = fewer.compress_prompt("one four two three", method, tokens=2, tokenizer=lambda text: len(text.split()))
    assert found.text == "four three"
    assert method.rank(Source(("one four",)), Budget(1, tokens=1)).chosen is None


def test_phrases_are_content_words_between_function_words() -> None:
    def of(*texts: str) -> list[str]:
        source = Source(texts)
        return [source.of(span) for span in phrases(source)]

    assert of("Each of the two big dogs, and a cat") == ["Each", "of", "the two big dogs", ",", "and", "a cat"]
    assert of("all the best", "the end") == ["all the best", "the end"]  # a document ends a phrase
    assert of("red\nfox  jumps\n\nover") == ["red", "fox  jumps", "over"]  # and so does a line
    assert [len(phrase.split()) for phrase in of("word " * (2 * LONGEST + 1))] == [LONGEST, LONGEST, 1]
    assert of("日本語 text") == ["日", "本", "語 text"] and of("") == []


@pytest.mark.parametrize("unit", ["sentences", "phrases", "tokens"])
def test_graphemes_line_breaks_and_empty_documents(unit: Any) -> None:
    texts = ["Naïve café 🐕‍🦺: 12 €.\r\n\r\n  It ran! ", "", "日本。 שלום"]
    for keep in (None, 0.3, 0.7):
        method = SelectiveContext(bytes_reader(), unit)
        found = fewer.compress_prompt(texts, method, keep=keep, tokenizer="characters")
        assert found.verify(texts) and fewer.restore(found.text, found.patch()) == texts


def test_sentences_longer_than_the_window() -> None:
    found = fewer.compress_prompt(
        "dog " * 60, SelectiveContext(bytes_reader(window=32)), keep=0.5, tokenizer="characters"
    )
    assert 0 < found.tokens_after <= 120


def test_an_unknown_unit_is_named() -> None:
    with pytest.raises(FewerError, match="unit='words' is none of 'sentences', 'phrases', 'tokens'"):
        fewer.compress_prompt("a text", SelectiveContext(unit="words"))
    with pytest.raises(FewerError, match=r"keep=1\.5"):
        fewer.compress_prompt("a text", SelectiveContext(keep=1.5))
