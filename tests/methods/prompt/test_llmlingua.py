"""LLMLingua: windows over what stayed, the documents that it takes, and a reference without caches."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import fewer
from fewer.methods.prompt.llmlingua import LLMLingua
from fewer.prompts.protect import protected
from fewer.prompts.source import Source
from fewer.score.surprise import Reader
from fewer.types import Budget, BudgetError, FewerError
from tests.readers import bytes_reader, pairs_reader

TEXT = "Naïve café: 12 €.\r\nThe dog 🐕‍🦺 ran, and ran; it did not stop!"


def kept(text: str, method: LLMLingua, tokens: int, **more: Any) -> list[str]:
    """The words that stay, of texts whose words are a token each."""
    return fewer.compress_prompt(text, method, tokens=tokens, tokenizer=lambda t: len(t.split()), **more).text.split()


def test_the_rarer_half_of_each_window_stays() -> None:
    model = pairs_reader({"the": 1.5, "red": 5.0, "fox": 6.0, "of": 2.0, "an": 2.5, "owl": 3.0})
    method = LLMLingua(model, window=4)
    # the windows are |the red of fox| and |the an of owl|: `owl` stays, though `red` and `fox` are all rarer than it
    assert kept("the red of fox the an of owl", method, 4) == ["red", "fox", "an", "owl"]
    # as one window of eight it would have been
    assert kept("the red of fox the an of owl", LLMLingua(model, window=8), 4) == ["red", "fox", "an", "owl"]
    assert kept("the red fox fox the an of owl", LLMLingua(model, window=8), 3) == ["red", "fox", "fox"]
    assert kept("the red fox fox the an of owl", method, 4) == ["fox", "fox", "an", "owl"]


def test_a_word_is_judged_after_what_stayed_not_after_what_stood_there() -> None:
    nats = {"new": 4.0, "york": 5.0, "of": 2.0, "is": 3.0}
    model = pairs_reader(nats, {("new", "york"): 0.5})
    text = "of new of york is of"
    # `york` comes after `of`, but what stayed of the first window is `new`, after which it says nothing
    windows = LLMLingua(model, window=3)
    source = Source((text,))
    value = dict(zip(text.split(), windows.rank(source, Budget(3, tokens=len(text) // 2)).value.tolist(), strict=False))
    assert value["york"] < 0 < value["new"]
    # with all in one window it is judged after `of`, and stays
    assert "york" in kept(text, LLMLingua(model, window=6), 3)


@pytest.mark.parametrize("words", [1, 3, 7, 199, 201, 399, 405])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
def test_the_share_is_met_in_short_texts_and_last_windows(words: int, keep: float) -> None:
    rng = np.random.default_rng(words)
    nats = {f"w{i}": 4.0 + i / 10 for i in range(20)}
    text = " ".join(f"w{i}" for i in rng.integers(0, 20, words))
    source = Source((text,), counter=fewer.prompts.counting.counter(lambda t: len(t.split())))
    ranking = LLMLingua(pairs_reader(nats)).rank(source, Budget.parse(keep))
    assert ranking.chosen is not None
    assert abs(ranking.chosen.sum() - keep * words) <= 1
    last = words % 200
    assert abs(ranking.chosen[words - last :].sum() - keep * last) <= 1
    assert (ranking.value[ranking.chosen] >= 0).all() and (ranking.value[~ranking.chosen] <= 0).all()


def plain(reader: Reader, ids: list[int]) -> list[float]:
    with torch.inference_mode():
        log = reader.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return (-log[torch.arange(len(ids) - 1), ids[1:]]).tolist()


def reference(reader: Reader, text: str, share: float, window: int) -> list[str]:
    """The pieces that stay, in plain Python: no cache, no arrays, each character a piece."""
    ids, offsets = reader.tokens(text)
    before, out, owed = list(reader.start), [], 0.0
    for at in range(0, len(ids), window):
        part = ids[at : at + window]
        loss = plain(reader, before + part)[len(before) - 1 :]
        black = [i for i in range(len(part)) if not text[slice(*offsets[at + i])].isspace()]
        owed += share * len(black)
        best = sorted(black, key=lambda i: (-loss[i], i))[: int(owed + 0.5)]
        owed -= len(best)
        out += [int(offsets[at + i][0]) for i in sorted(best)]
        before += [token for i, token in enumerate(part) if i in best or i not in black]
    return out


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("window", [5, 20, 200])
def test_it_is_the_plain_algorithm(share: float, window: int) -> None:
    reader = bytes_reader()
    text = "The dog ran, and ran; it did not stop! " * 3
    source = Source((text,))
    ranking = LLMLingua(reader, window=window).rank(source, Budget.parse(share))
    assert ranking.chosen is not None
    exact = math.ceil(share * len(text)) / len(text)
    assert ranking.units.start[ranking.chosen].tolist() == reference(reader, text, exact, window)


def test_documents_that_surprise_are_taken_until_they_hold_twice_the_budget() -> None:
    model = pairs_reader({"dull": 1.0, "odd": 3.0, "rare": 7.0})
    documents = ("dull dull dull dull", "rare rare rare rare", "odd odd odd odd", "dull dull odd odd")
    found = fewer.compress_prompt(documents, LLMLingua(model, coarse=2.0), tokens=3, tokenizer=lambda t: len(t.split()))
    assert [(span.document, found.source.of(span)) for span in found.kept] == [(1, "rare rare rare")]
    # 2 x 3 tokens: the second document holds 4, the third more than the rest
    ranking = LLMLingua(model, coarse=2.0).rank(found.source, Budget(3, tokens=3))
    worth = [ranking.value[ranking.units.of(document)] for document in range(4)]
    assert worth[1].min() > worth[2].max() and worth[2].min() > worth[3].max() > worth[0].max()
    assert ranking.order is None
    # with more to choose from, the fourth is read too: its words are judged, not left out with it
    worth = LLMLingua(model, coarse=3.0).rank(found.source, Budget(3, tokens=3)).value
    assert worth[-1] > worth[-3] > worth[0]


def test_protected_text_is_part_of_what_stayed_and_takes_its_share() -> None:
    model = pairs_reader({"new": 1.5, "york": 5.0, "of": 2.0}, {("new", "york"): 0.4})
    text = "new of york of of york"
    for rules, stays in ((["new"], ["of", "york"]), ([], ["of", "york", "york"])):
        source = Source((text,), protected=protected((text,), rules))
        ranking = LLMLingua(model, window=2).rank(source, Budget.parse(0.5))
        assert ranking.chosen is not None
        # `new` is half of the first window: `of` goes with it, and then `york` says nothing
        assert [text.split()[i] for i in np.flatnonzero(ranking.chosen)] == stays


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.95])
def test_graphemes_white_space_and_line_breaks(keep: float) -> None:
    text = TEXT + "\n\n  \t" + TEXT
    found = fewer.compress_prompt(
        [text, "", " \n", TEXT], LLMLingua(bytes_reader(window=64)), keep=keep, tokenizer="characters"
    )
    assert found.tokens_after <= found.limit and found.verify([text, "", " \n", TEXT])
    assert fewer.restore(found.text, found.patch()) == [text, "", " \n", TEXT]


def test_without_a_budget_it_asks_for_one_and_reads_nothing() -> None:
    with pytest.raises(BudgetError, match="llmlingua has no threshold of its own"):
        fewer.compress_prompt("a text", LLMLingua("no such model"))
    with pytest.raises(FewerError, match="window=0"):
        fewer.compress_prompt("a text", LLMLingua(bytes_reader(), window=0), keep=0.5, tokenizer="characters")


@pytest.mark.slow
def test_a_rare_number_outlives_chance(default_model_path: Any) -> None:
    """Half of a dull text stays, and more of the digits in it than chance would keep."""
    facts = [f"The number of the locker is {n}." for n in (7391, 8254, 9167)]
    dull = "It was the end of the day, and all of the people in the house went to bed as they did every night. "
    text = dull + facts[0] + " " + dull + facts[1] + " " + dull + facts[2] + " " + dull

    def digits(method: Any) -> float:
        return sum(c.isdigit() for c in fewer.compress_prompt(text, method, keep=0.5).text) / 12

    chance = np.mean([digits(fewer.methods.any.random.Random(seed)) for seed in range(10)])
    assert digits("llmlingua") > chance + 0.2
