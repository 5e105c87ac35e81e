"""Provence: the joint head by hand, its two rules, and a head that learns which sentences answer."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import fewer
from fewer.fit import Fit, fingerprint, save
from fewer.methods.prompt.provence import Provence
from fewer.prompts.source import Source
from fewer.score.embed import Embedder
from fewer.score.joint import Cited, Row, judge
from fewer.train_joint import loss_of, row_of
from fewer.types import BudgetError, FewerError
from fewer_eval.cited import FACTS, HELD_OUT, passages
from tests.encoders import words_embedder

WORDS = ["the", "a", "pump", "lamp", "is", "red", "old", "where", "it", "rains", "door", "shut", "here", ".", "?"]
DOCUMENTS = ("The pump is red. It rains here.", "The old lamp. The door is shut.")


def drawn(embed: Embedder, seed: int = 0, **more: torch.Tensor) -> Fit:
    """Random heads, of a size that spreads probabilities out."""
    draw = torch.Generator().manual_seed(seed)
    wide = embed.model.config.hidden_size
    heads = {f"{name}.weight": torch.randn(wide, generator=draw) for name in ("rerank", "keep")}
    heads |= {"rerank.bias": torch.tensor(0.3), "keep.bias": torch.tensor(-0.2)}
    return Fit("provence", fingerprint(embed.model), heads | more)


def by_hand(embed: Embedder, fit: Fit, question: str, passage: str) -> tuple[float, list[float]]:
    """The rerank score, and the keep probability of each of the passage's tokens."""
    read = embed.tokenizer(question, passage, return_tensors="pt", return_token_type_ids=True)
    first = read["input_ids"][0].tolist().index(3) + 1  # after [SEP]
    whole = torch.tensor([[2, *embed.tokenizer(question, add_special_tokens=False).input_ids, 3,
                           *embed.tokenizer(passage, add_special_tokens=False).input_ids, 3]])  # fmt: skip
    kinds = torch.tensor([[int(i >= first) for i in range(whole.shape[1])]])
    with torch.inference_mode():
        hidden = embed.model(input_ids=whole, token_type_ids=kinds).last_hidden_state[0]
    keep = (hidden @ fit.tensors["keep.weight"] + fit.tensors["keep.bias"]).sigmoid()
    return float(hidden[0] @ fit.tensors["rerank.weight"] + fit.tensors["rerank.bias"]), keep[first:-1].tolist()


def test_agrees_with_the_heads_by_hand() -> None:
    embed = words_embedder(WORDS)
    fit = drawn(embed)
    ranking = Provence(fit, embed).rank(Source(DOCUMENTS, question="Where is the pump?"), None)
    scores, means = [], []
    for document, split in zip(DOCUMENTS, (5, 4), strict=True):  # tokens of the first sentence
        score, keep = by_hand(embed, fit, "Where is the pump?", document)
        scores.append(score)
        means += [np.mean(keep[:split]), np.mean(keep[split:])]
    assert ranking.value.tolist() == pytest.approx(means, abs=1e-5) and np.std(means) > 0.01
    assert ranking.chosen is not None and (ranking.chosen == (np.array(means) > 0.1)).all()
    assert ranking.notes == (f"rerank scores: {scores[0]:.2f}, {scores[1]:.2f}",) and ranking.order is None
    best = int(np.argmax(scores))
    reordered = Provence(fit, embed, reorder=True).rank(Source(DOCUMENTS, question="Where is the pump?"), None)
    assert reordered.order == (best, 1 - best)


def test_the_majority_rule_counts_tokens() -> None:
    embed = words_embedder(WORDS)
    fit = drawn(embed, seed=3)
    source = Source(DOCUMENTS, question="Where is it?")
    shares = []
    for document, split in zip(DOCUMENTS, (5, 4), strict=True):
        keep = np.array(by_hand(embed, fit, "Where is it?", document)[1]) > 0.5
        shares += [keep[:split].mean(), keep[split:].mean()]
    ranking = Provence(fit, embed, threshold=0.5, rule="majority").rank(source, None)
    assert ranking.chosen is not None and ranking.chosen.tolist() == [share > 0.5 for share in shares]


def test_long_documents_are_read_in_runs_of_sentences() -> None:
    embed = words_embedder(WORDS, longest=24)
    fit = drawn(embed)
    text = "The pump is red. It rains here. The old lamp. The door is shut. " * 3 + "the " * 60
    ranking = Provence(fit, embed).rank(Source((text,), question="Where?"), None)
    first = by_hand(embed, fit, "Where?", "The pump is red. It rains here. The old lamp. The door is shut.")[1]
    assert ranking.value[0] == pytest.approx(np.mean(first[:5]), abs=1e-5)
    assert ranking.value[3] == pytest.approx(np.mean(first[13:]), abs=1e-5)
    assert len(ranking.value) == 13 and (ranking.value > 0).all()


def test_layers_in_the_fit_take_the_place_of_the_encoders_own() -> None:
    embed = words_embedder(WORDS)
    name = "encoder.layer.1.output.dense.weight"
    other = dict(embed.model.named_parameters())[name].detach() * -1
    before = dict(embed.model.named_parameters())[name].detach().clone()
    source = Source(DOCUMENTS, question="Where?")
    plain, changed = (Provence(fit, embed).rank(source, None).value for fit in
                      (drawn(embed), drawn(embed, **{name: other})))  # fmt: skip
    assert not np.allclose(plain, changed)
    assert (dict(embed.model.named_parameters())[name] == before).all()
    with torch.no_grad():
        dict(embed.model.named_parameters())[name].copy_(other)
    fit = replace(drawn(embed), model=fingerprint(embed.model))
    assert np.allclose(Provence(fit, embed).rank(source, None).value, changed, atol=1e-6)


def test_the_loss_by_hand() -> None:
    embed = words_embedder(WORDS)
    tensors = drawn(embed).tensors
    example = Cited("Where is it?", ("The pump is red.", "It rains."), (True, False))
    other = Cited("Where?", ("The old lamp.",), (False,))
    row = row_of(embed, example)
    assert row.useful == [1] * 5 + [0] * 3 and len(row.passage) == 8
    with torch.inference_mode():
        loss = loss_of(judge(embed, tensors, [row, row_of(embed, other)]))
    each, rerank = [], []
    for one, useful in ((example, row.useful), (other, [0] * 4)):
        score, keep = by_hand(embed, Fit("", "", tensors), one.question, " ".join(one.sentences))
        each += [-np.log(p if use else 1 - p) for p, use in zip(keep, useful, strict=True)]
        rerank.append((score - float(any(useful))) ** 2)
    assert float(loss) == pytest.approx(np.mean(each) + 0.05 * np.mean(rerank), rel=1e-4)
    assert judge(embed, tensors, [Row([], [5], [])]).logits.shape == (1, 4)


def simple(count: int) -> list[Cited]:
    """The sentence that holds the question's only word answers; one time in six, none does."""
    rng, made = random.Random(0), []
    for _ in range(count):
        said = rng.sample(["pump", "lamp", "door"], 2)
        asked = rng.choice(said) if rng.random() < 5 / 6 else ({"pump", "lamp", "door"} - {*said}).pop()
        sentences = tuple(f"{noun} {rng.choice(['red', 'old', 'shut'])}." for noun in said)
        made.append(Cited(asked, sentences, tuple(noun == asked for noun in said)))
    return made


def test_a_head_learns(tmp_path: Any) -> None:
    embed = words_embedder(WORDS)
    told: list[float] = []
    fit = Provence.fit_to(
        embed, simple(240), epochs=20, rate=3e-3, batch=16, tick=lambda what, share: told.append(share)
    )
    assert told == sorted(told) and told[0] >= 0 and told[-1] < 1
    assert set(fit.notes) == {"fitted on", "recipe", "loss"} and "216 passages" in fit.notes["fitted on"]
    assert all(name.startswith(("encoder.layer.", "keep.", "rerank.")) for name in fit.tensors)
    save(fit, tmp_path / "head.safetensors")
    method = Provence.load(tmp_path / "head.safetensors", model=embed, threshold=0.5)
    text = "Lamp shut. Pump old."
    for noun, answer in (("lamp", "Lamp shut."), ("pump", "Pump old."), ("door", "")):
        done = fewer.compress_prompt(text, method, question=noun, tokenizer="characters")
        assert done.text == answer
    scores = Provence(fit, embed).rank(Source((text, "Door red. Pump old."), question="door"), None).notes
    without, with_answer = (float(score) for score in scores[0].removeprefix("rerank scores: ").split(", "))
    assert with_answer > 0.6 > 0.4 > without


def test_a_fit_depends_on_its_seed_alone() -> None:
    embed = words_embedder(WORDS)
    first, again, other = (Provence.fit_to(embed, simple(20), epochs=1, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and first.model == fingerprint(embed.model)
    assert all(weight.grad is None for weight in embed.model.parameters())


def test_without_layers_the_heads_alone_are_fitted() -> None:
    fit = Provence.fit_to(words_embedder(WORDS), simple(20), layers=0, epochs=1)
    assert set(fit.tensors) == {"keep.weight", "keep.bias", "rerank.weight", "rerank.bias"}


def test_errors() -> None:
    embed, other = words_embedder(WORDS), words_embedder(WORDS, seed=1)
    asked: dict[str, Any] = {"keep": 0.5, "tokenizer": "characters", "question": "Where?"}
    with pytest.raises(FewerError, match=r"Provence has to be fitted"):
        fewer.compress_prompt(DOCUMENTS, Provence(model=embed), **asked)
    with pytest.raises(FewerError, match=r"fitted to another model"):
        fewer.compress_prompt(DOCUMENTS, Provence(drawn(other), embed), **asked)
    with pytest.raises(FewerError, match=r"provence ranks by a question"):
        fewer.compress_prompt(DOCUMENTS, Provence(drawn(embed), embed), **{**asked, "question": None})
    with pytest.raises(BudgetError, match=r"threshold=3"):
        Provence(threshold=3.0)
    with pytest.raises(FewerError, match=r"cannot be fitted to 3 examples"):
        Provence.fit_to(embed, simple(3))
    with pytest.raises(FewerError, match=r"layers=5: this BertModel has 2 layers"):
        Provence.fit_to(embed, simple(20), layers=5)


def test_generated_passages() -> None:
    made, held = passages(200, seed=1), passages(50, seed=1, held_out=True)
    assert made == passages(200, seed=1) and made != passages(200, seed=2)
    assert 0.1 < np.mean([not any(one.useful) for one in made]) < 0.3
    assert all(len(one.sentences) == len(one.useful) and sum(one.useful) <= 2 for one in made + held)
    asked = {question.split("{}")[0] for name in HELD_OUT for question in FACTS[name].asked}
    never = asked - {question.split("{}")[0] for name in set(FACTS) - set(HELD_OUT) for question in FACTS[name].asked}
    assert not any(one.question.startswith(tuple(never)) for one in made)
    for one in made:
        assert "{" not in "".join((one.question, *one.sentences)).replace("{}", "") or any(
            "{" in s for s in one.sentences
        )


@pytest.mark.slow
def test_the_command_fits_it(tmp_path: Any) -> None:
    from typer.testing import CliRunner

    from fewer.cli import app

    file = tmp_path / "provence.fit"
    done = CliRunner().invoke(app, ["fit", "provence", "--tokens", "64", "--out", str(file), "--json"])
    assert done.exit_code == 0, done.output
    method = Provence.load(file)
    ranking = method.rank(Source(DOCUMENTS, question="Where is the pump?"), None)
    assert ((ranking.value > 0) & (ranking.value < 1)).all()
    refused = CliRunner().invoke(app, ["fit", "provence", "--data", str(file), "--out", str(file)])
    assert refused.exit_code != 0
