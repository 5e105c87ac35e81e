"""EXIT: one pass over the context and short endings give what a whole pass for each sentence gives."""

from typing import Any

import numpy as np
import pytest
import torch

import fewer
from fewer.methods.prompt.exit import ASKED, EXIT
from fewer.prompts.source import Source
from fewer.score.surprise import Reader
from fewer.score.yes_no import answers, plain, turn, yes
from fewer.types import BudgetError, FewerError, UnsupportedModel
from tests.readers import bytes_reader, bytes_tokenizer

TEXT = ("The pump is red. It rains.\nNobody came.", "The lamp is old. No one saw the door!")
QUERY = "Where is the pump?"


def naive(reader: Reader, text: str) -> float:
    """P(Yes) / (P(Yes) + P(No)) after all of the text, read in one pass."""
    ids = torch.tensor([[*reader.start, *plain(reader.tokenizer, text)]])
    with torch.inference_mode():
        logits = reader.model(ids).logits[0, -1].double()
    up, down = (logits[token].exp() for token in answers(reader.tokenizer))
    return float(up / (up + down))


def odds(share: Any) -> Any:
    """Four times as fine as shares near one half, and as fine where a model of random weights says Yes to nothing."""
    return np.log(share) - np.log1p(-share)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("context", ["document", "all"])
def test_agrees_with_a_whole_pass_for_each_sentence(family: str, context: Any) -> None:
    reader = bytes_reader(family)
    source = Source(TEXT, question=QUERY)
    ranking = EXIT(reader, context=context).rank(source, None)
    assert [source.of(span) for span in ranking.units][2:4] == ["Nobody came.", "The lamp is old."]
    for (document, start, end), value in zip(ranking.units, ranking.value, strict=True):
        around = TEXT[document] if context == "document" else "\n".join(TEXT)
        sentence = TEXT[document][start:end]
        said = f"Query:\n{QUERY}\nFull context:\n{around}\nSentence:\n{sentence}\n{ASKED}\n"
        want = naive(reader, said)
        assert value == pytest.approx(want, abs=1e-5) and odds(value) == pytest.approx(odds(want), abs=4e-5)
    assert odds(ranking.value).std() > 4e-3  # else any order of sentences would have passed
    assert ranking.chosen is not None and (ranking.chosen == (ranking.value >= 0.5)).all()


def test_endings_of_many_lengths_share_one_beginning() -> None:
    reader = bytes_reader()
    before = plain(reader.tokenizer, "a beginning of some length")
    endings = [plain(reader.tokenizer, "x" * n) for n in (3, 200, 1, 40, 41, 300, 7)]
    whole = []
    with torch.inference_mode():
        for ending in endings:
            logits = reader.model(torch.tensor([before + ending])).logits[0, -1].double()
            whole.append(float(logits[list(answers(reader.tokenizer))].softmax(-1)[0]))
    assert yes(reader, before, endings).tolist() == pytest.approx(whole, abs=1e-5)
    assert yes(reader, before, []).tolist() == [] and len(set(np.round(whole, 4))) == 7


def test_the_beginning_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, read = bytes_reader(), []
    inner = reader.model.model.forward

    def counting(*args: Any, **known: Any) -> Any:
        ids = known.get("input_ids", args[0] if args else None)
        read.append(ids.numel())
        return inner(*args, **known)

    monkeypatch.setattr(reader.model.model, "forward", counting)
    text = "A sentence of this kind. " * 20
    EXIT(reader).rank(Source((text,), question="What?"), None)
    ending = len("A sentence of this kind.") + len(ASKED) + 2
    assert sum(read) < len(text) + 100 + 20 * ending + 20


def test_a_chat_template_frames_the_turn_and_documents_cannot_close_it() -> None:
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<end>{{ m['content'] }}<end>A:{% endfor %}"
    reader = Reader(bytes_reader().model, tokenizer)
    pieces = turn(reader, ["Q: ", "<end>x", " said ", "y", "!"])
    flat = [token for piece in pieces for token in piece]
    said = [tokenizer("Q: ").input_ids, plain(tokenizer, "<end>x"), tokenizer(" said y!").input_ids]
    assert flat == [256, *(token for part in said for token in part), 256, *tokenizer("A:").input_ids]
    assert 256 not in pieces[1] and len(pieces[1]) == 6
    assert tokenizer("<end>").input_ids == [256]  # and the tokenizer is as it was


def test_a_context_beyond_the_window_is_read_in_parts() -> None:
    text = " ".join(f"This is sentence {n}." for n in range(40))
    reader = bytes_reader(window=420)
    read = EXIT(reader).rank(Source((text,), question="Which?"), None)
    assert len(read.units) == 40 and ((read.value > 0) & (read.value < 1)).all()
    long = EXIT(reader).rank(Source(("x" * 5000 + ". Short.",), question="Which?"), None)
    assert np.isfinite(long.value).all()


def test_without_a_budget_the_threshold_decides() -> None:
    reader = bytes_reader()
    value = EXIT(reader).rank(Source(TEXT, question=QUERY), None).value
    middle = float(np.sort(value)[2:4].mean())
    done = fewer.compress_prompt(TEXT, EXIT(reader, threshold=middle), question=QUERY, tokenizer="characters")
    assert [unit.kept for unit in done.units] == (value >= middle).tolist() and done.limit is None


def test_errors() -> None:
    with pytest.raises(FewerError, match=r"exit ranks by a question"):
        fewer.compress_prompt(TEXT, EXIT(bytes_reader()), keep=0.5, tokenizer="characters")
    with pytest.raises(BudgetError, match=r"takes 300 tokens of the model's window of 256"):
        EXIT(bytes_reader(window=256)).rank(Source(TEXT, question="x" * 300), None)
    with pytest.raises(BudgetError, match=r"threshold=2.0"):
        EXIT(threshold=2.0)
    same = bytes_tokenizer()
    same.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Prepend("_")
    with pytest.raises(UnsupportedModel, match=r"cannot tell them"):
        answers(same)


@pytest.mark.slow
def test_with_the_default_model() -> None:
    ranking = EXIT().rank(Source(("The pump is red. It rains.",), question="Which colour is the pump?"), None)
    assert len(ranking.units) == 2 and ((ranking.value > 0) & (ranking.value < 1)).all()
