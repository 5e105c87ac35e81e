"""LongLLMLingua: what a question makes likelier, shares by rank, the order of documents, and a plain reference."""

from typing import Any

import numpy as np
import pytest
import torch

import fewer
from fewer.methods.prompt.longllmlingua import RESTRICT, LongLLMLingua, losses, shared
from fewer.prompts.source import Source
from fewer.score.surprise import Reader
from fewer.score.windows import GLUE, Read, pruned
from fewer.types import Budget, BudgetError, FewerError, MissingSignal
from tests.readers import bytes_reader, pairs_reader


class Told:
    """A prefix after which each word is as surprising as a table says."""

    most = 100

    def __init__(self, reader: Reader, nats: dict[str, float]) -> None:
        self.reader = reader
        self.nats = {reader.tokens(word)[0][0]: value for word, value in nats.items()}
        self.kept: list[int] = []

    def tried(self, ids: list[int]) -> np.ndarray[Any, Any]:
        return np.array([self.nats[token] for token in ids])

    def keep(self, ids: list[int]) -> None:
        self.kept += ids


def test_what_the_question_makes_likelier_stays() -> None:
    # "Which river?": `nile` is rare either way, but less so after the question; `zebra` is rarer
    alone = {"the": 1.0, "nile": 8.0, "zebra": 11.0, "and": 1.5}
    asked = {"the": 1.0, "nile": 4.0, "zebra": 11.0, "and": 1.7}
    reader = pairs_reader(alone)
    source = Source(("the zebra and the nile",))
    prefixes: Any = (Told(reader, alone), Told(reader, asked))
    read = Read.of(source, reader)
    value, chosen = pruned.__wrapped__(source, read, [0], [0.2], prefixes, 200)  # stand-ins for prefixes
    assert [source.of(unit) for unit, stays in zip(read.units, chosen, strict=True) if stays] == ["nile"]
    # 4 nats for the river, 0 for the animal: the edge is at 2
    assert value.tolist() == pytest.approx([-2, -2, -2.2, -2, 2])
    assert prefixes[0].kept == prefixes[1].kept == reader.tokens("nile")[0]


def plain(reader: Reader, ids: list[int]) -> list[float]:
    with torch.inference_mode():
        log = reader.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return (-log[torch.arange(len(ids) - 1), ids[1:]]).tolist()


DOCUMENTS = ("the dog ran home", "nobody saw the red fox", "it rained for twelve days", "foxes eat mice and dogs")


def test_documents_are_ranked_by_the_loss_of_the_question() -> None:
    reader = bytes_reader()
    found = losses(reader, Read.of(Source(DOCUMENTS), reader), "Who saw it?")
    asked = reader.tokens(GLUE + "Who saw it?" + RESTRICT)[0]
    for text, loss in zip(DOCUMENTS, found, strict=True):
        before = [256, *reader.tokens(text)[0]]
        assert loss == pytest.approx(np.mean(plain(reader, before + asked)[len(before) - 1 :]), abs=1e-4)
    assert np.ptp(found) > 1e-3
    assert losses(reader, Read.of(Source(("", "a")), reader), "Who?")[0] == float("inf")


def test_a_document_longer_than_the_window_is_as_good_as_its_best_piece() -> None:
    reader = bytes_reader(window=160)
    asked = reader.tokens(GLUE + "Who?" + RESTRICT)[0]
    room = 160 - 1 - 1 - len(asked)
    long = "".join(chr(97 + i * i % 26) for i in range(3 * room))
    pieces = tuple(long[at : at + room] for at in range(0, len(long), room))
    one = losses(reader, Read.of(Source((long,)), reader), "Who?")[0]
    assert one == pytest.approx(min(losses(reader, Read.of(Source(pieces), reader), "Who?")), abs=1e-4)


@pytest.mark.parametrize(
    ("reorder", "order"), [("sort", lambda r: r), ("two_stage", lambda r: r[::2] + r[1::2][::-1]), ("original", sorted)]
)
def test_the_order_of_documents(reorder: Any, order: Any) -> None:
    reader = bytes_reader()
    loss = losses(reader, Read.of(Source(DOCUMENTS), reader), "Who saw it?")
    ranked = sorted(range(4), key=loss.__getitem__)
    assert ranked != sorted(ranked)
    method = LongLLMLingua(reader, reorder=reorder)
    found = fewer.compress_prompt(DOCUMENTS, method, keep=0.8, question="Who saw it?", tokenizer="characters")
    assert list(dict.fromkeys(run.document for run in found.runs)) == order(ranked)
    assert fewer.restore(found.text, found.patch()) == list(DOCUMENTS)
    # 2 x 20 characters: the two best documents, and none of the others
    found = fewer.compress_prompt(DOCUMENTS, method, tokens=18, question="Who saw it?", tokenizer="characters")
    assert {run.document for run in found.runs} <= set(ranked[:2])


def test_the_best_document_keeps_the_largest_share() -> None:
    # one half, and the steps that `control_context_budget` of llmlingua 0.2.2 gave for four documents and 0.3
    assert shared(np.array([0.3, 0.1, -0.1, -0.3]), [10, 10, 10, 10], 20.0).tolist() == pytest.approx(
        [0.8, 0.6, 0.4, 0.2]
    )
    # shares end at 0 and at 1, and the others make up for it
    assert shared(np.array([0.3, 0.0, -0.3]), [10, 10, 10], 27.0).tolist() == pytest.approx([1.0, 1.0, 0.7])
    uneven = shared(np.array([0.3, 0.0, -0.3]), [100, 10, 500], 150.0)
    assert uneven @ [100, 10, 500] == pytest.approx(150) and uneven[0] - uneven[1] == pytest.approx(0.3)
    assert shared(np.zeros(2), [5, 5], 99.0).tolist() == [1, 1]


def reference(reader: Reader, documents: list[str], shares: list[float], window: int, question: str) -> list[list[int]]:
    """Where the characters that stay begin, document by document: no cache, no arrays."""
    row: list[tuple[int, int, int]] = []  # token, document, place; document -1 for what parts documents
    for index, text in enumerate(documents):
        ids, offsets = reader.tokens(text)
        row += [(token, -1, 0) for token in reader.tokens(GLUE)[0]] if index else []
        row += [(t, -1 if text[a] == " " else index, int(a)) for t, (a, _) in zip(ids, offsets.tolist(), strict=True)]
    heads = [[256], [256, *reader.tokens(question + GLUE)[0]]]
    owed = [0.0] * len(documents)
    out: list[list[int]] = [[] for _ in documents]
    for at in range(0, len(row), window):
        part = row[at : at + window]
        ids = [token for token, _, _ in part]
        loss = [plain(reader, head + ids)[len(head) - 1 :] for head in heads]
        gain = [a - b for a, b in zip(*loss, strict=True)]
        stays = {i for i, (_, document, _) in enumerate(part) if document < 0}
        for document in range(len(documents)):
            mine = [i for i, piece in enumerate(part) if piece[1] == document]
            owed[document] += shares[document] * len(mine)
            best = sorted(mine, key=lambda i: (-gain[i], i))[: int(owed[document] + 0.5)]
            owed[document] -= len(best)
            stays |= set(best)
            out[document] += sorted(part[i][2] for i in best)
        heads = [head + [ids[i] for i in sorted(stays)] for head in heads]
    return out


@pytest.mark.parametrize("window", [10, 200])
def test_it_is_the_plain_algorithm(window: int) -> None:
    reader, question = bytes_reader(), "Who saw it?"
    source = Source(DOCUMENTS, question=question)
    ranking = LongLLMLingua(reader, window=window).rank(source, Budget.parse(0.5))
    assert ranking.chosen is not None and ranking.order is not None
    order = list(ranking.order)
    lengths = [len(DOCUMENTS[i]) for i in order]
    shares = shared(np.array([0.3, 0.1, -0.1, -0.3]), lengths, float(np.ceil(sum(lengths) / 2))).tolist()
    wanted = reference(reader, [DOCUMENTS[i] for i in order], shares, window, question)
    for document, places in zip(order, wanted, strict=True):
        mine = ranking.units.of(document)
        assert ranking.units.start[mine][ranking.chosen[mine]].tolist() == places


def test_another_question_keeps_other_words() -> None:
    found = [
        fewer.compress_prompt(DOCUMENTS, LongLLMLingua(bytes_reader()), keep=0.5, question=q, tokenizer="characters")
        for q in ("Who saw it?", "How long did it rain?")
    ]
    assert found[0].text != found[1].text


def test_one_document_needs_no_ranking() -> None:
    method = LongLLMLingua(bytes_reader())
    found = fewer.compress_prompt("the dog ran home", method, tokens=9, question="Who?", tokenizer="characters")
    assert 0 < found.tokens_after <= 9


def test_without_a_question_or_a_budget_it_says_so() -> None:
    with pytest.raises(MissingSignal, match=r"question=.*llmlingua"):
        fewer.compress_prompt("a text", LongLLMLingua("no such model"), keep=0.5)
    with pytest.raises(BudgetError, match="threshold"):
        fewer.compress_prompt("a text", LongLLMLingua("no such model"), question="Who?")
    with pytest.raises(FewerError, match="reorder='best'"):
        fewer.compress_prompt("a text", LongLLMLingua(reorder="best"), question="Who?", keep=0.5)


@pytest.mark.slow
def test_the_document_with_the_answer_comes_first(default_model_path: Any) -> None:
    documents = [
        "Bread rises because yeast makes gas out of sugar, and the dough holds it.",
        "The lighthouse on the cape was built in 1869 and burned whale oil until it was given electric light.",
        "A chess game ends in a draw when the same position comes up three times.",
    ]
    question = "When was the lighthouse on the cape built?"
    found = fewer.compress_prompt(documents, "longllmlingua", keep=0.5, question=question)
    assert found.runs[0].document == 1
    assert "1869" in found.text
