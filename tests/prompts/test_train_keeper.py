"""Training a token classifier, on a tiny BERT and a rule that takes seconds; and the head that ships."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fewer import fit as fits
from fewer.fit import fingerprint
from fewer.prompts.source import Source
from fewer.score.embed import embedder
from fewer.score.keepers import Keeper, classifier, keeper
from fewer.score.labels import words
from fewer.train_keeper import Recipe, fit_from_reader, fit_keeper, fresh, rows
from fewer.types import FewerError

SHIPPED = Path(fits.__file__).parent / "data" / "llmlingua2.fit"
FAST = Recipe(layers=1, epochs=12, rate=5e-3, batch=8, longest=64)


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    """A random BERT of two layers that reads characters, `##` before those inside a word."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,"
    vocab = {piece: i for i, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])}
    for piece in [*letters, *(f"##{letter}" for letter in letters)]:
        vocab[piece] = len(vocab)
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=1000))  # noqa: S106
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"  # noqa: S106
    )  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    return BertModel(config).eval(), tokenizer


def digits(text: str) -> list[bool]:
    return [text[span.start].isdigit() for span in words(text)]


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    vocabulary = ["room", "four", "had", "12", "7", "903", "lamps", "and", "55", "chairs", "."]
    return [" ".join(rng.choices(vocabulary, k=10)) for _ in range(count)]


def probabilities(keeper: Keeper, text: str) -> Any:
    """The probability that each word stays: the mean over its pieces."""
    ((offsets, p),) = keeper([text])
    return Source((text,)).spread(words(text), [offsets], [p])


def test_it_learns_to_keep_digits(base: tuple[Any, Any]) -> None:
    told: list[tuple[str, float]] = []
    fit = fit_keeper(digits, texts(64), base=base, recipe=FAST, tick=lambda what, share: told.append((what, share)))
    trained, untrained = Keeper(*classifier(fit, base)), Keeper(fresh(base[0]).eval(), base[1])
    wrong = {"trained": 0, "untrained": 0}
    for text in texts(5, seed=1):
        for name, model in (("trained", trained), ("untrained", untrained)):
            wrong[name] += int(((probabilities(model, text) > 0.5) != np.array(digits(text))).sum())
    assert wrong["trained"] == 0 < wrong["untrained"], wrong
    shares = [share for _, share in told]
    assert shares == sorted(shares) and shares[-1] < 1 and told[0][0].startswith("labelling")


def test_what_the_fit_holds(base: tuple[Any, Any], tmp_path: Path) -> None:
    weights = {name: weight.clone() for name, weight in base[0].state_dict().items()}
    fit = fit_keeper(digits, texts(8), base=base, recipe=Recipe(layers=1, epochs=1), seed=3)
    assert fit.method == "llmlingua2" and fit.model == fingerprint(base[0])
    assert {name.split(".")[0] for name in fit.tensors} == {"bert", "classifier"}
    assert all(name.startswith(("bert.encoder.layer.1.", "classifier.")) for name in fit.tensors)
    assert all(tensor.dtype == torch.float16 for tensor in fit.tensors.values())
    assert "7 texts" in fit.notes["trained on"] and "seed 3" in fit.notes["trained on"]
    assert all(
        torch.equal(weight, weights[name]) for name, weight in base[0].state_dict().items()
    )  # not ours to change
    fits.save(fit, tmp_path / "fit")
    assert fits.load(tmp_path / "fit", "llmlingua2") == fit


def test_a_seed_gives_the_same_fit_and_another_another(base: tuple[Any, Any]) -> None:
    made = [fit_keeper(digits, texts(8), base=base, recipe=Recipe(epochs=1), seed=seed) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


def test_it_stops_when_held_out_texts_get_no_better(base: tuple[Any, Any]) -> None:
    def coin(text: str) -> list[float]:
        return np.random.default_rng(len(text)).integers(0, 2, len(words(text))).astype(float).tolist()

    fit = fit_keeper(coin, texts(30), base=base, recipe=Recipe(epochs=40, rate=1e-2, patience=1))
    losses = [float(loss) for loss in fit.notes["losses"].split()]
    assert len(losses) < 40 and losses[-1] >= min(losses[:-1])


def test_every_piece_of_a_word_has_its_label_and_none_is_shifted(base: tuple[Any, Any]) -> None:
    """The last word's label is at the last word, where the authors' code moves it to the separator."""
    (row,) = rows(base[1], "Ab 12, c", np.array([0.25, 1.0, 0.5, 0.75]))
    assert base[1].convert_ids_to_tokens(row.ids) == ["[CLS]", "a", "##b", "1", "##2", ",", "c", "[SEP]"]
    assert row.labels.tolist() == [-1, 0.25, 0.25, 1, 1, 0.5, 0.75, -1]


def test_long_texts_are_cut_between_words(base: tuple[Any, Any]) -> None:
    text = "abc de fghij kl m"
    made = rows(base[1], text, np.array([0.1, 0.2, 0.3, 0.4, 0.5]), longest=8)
    assert [row.labels[1:-1].tolist() for row in made] == [[0.1] * 3 + [0.2] * 2, [0.3] * 5, [0.4] * 2 + [0.5]]
    assert [len(row.ids) for row in rows(base[1], "a" * 20, np.array([1.0]), longest=8)] == [8, 8, 8, 4]
    assert rows(base[1], "", np.zeros(0)) == []


@pytest.mark.parametrize(
    ("labeller", "given", "why"),
    [
        (digits, ["one text"], "1 texts"),
        (digits, [" ", ""], "0 texts"),
        (lambda text: [0.5], ["two words", "more words"], r"gave \(1,\) for a text of 2 words"),
        (lambda text: [2.0, 0.0], ["two words", "more words"], r"in \[0, 1\]"),
        (lambda text: [float("nan"), 0.0], ["two words", "more words"], r"in \[0, 1\]"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(base: tuple[Any, Any], labeller: Any, given: list[str], why: str) -> None:
    with pytest.raises(FewerError, match=why):
        fit_keeper(labeller, given, base=base)


def test_what_fewer_fit_calls(base: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels come from the language model, and the notes say of which kind."""
    asked: list[str] = []

    def labels(self: Any, text: str) -> list[float]:
        asked.append(text)
        return [float(keep) for keep in digits(text)]

    monkeypatch.setattr("fewer.score.labels.Contrastive.__call__", labels)
    monkeypatch.setattr("fewer.train_keeper.embedder", lambda _: embedder(base))
    fit = fit_from_reader((None, None), texts(4), seed=1)
    assert asked == texts(4) and "tie=0.5" in fit.notes["labels"] and "seed 1" in fit.notes["trained on"]


@pytest.mark.slow
def test_the_head_that_ships_keeps_facts_that_random_loses() -> None:
    """Half of the words stay. The facts, their words and the prose around them were not trained on."""
    from fewer_eval.documents import planted

    assert fits.load(SHIPPED, "llmlingua2").model == fingerprint(embedder().model) and SHIPPED.stat().st_size < 8e6
    head = keeper()
    rng, alive = np.random.default_rng(0), {"head": 0, "random": 0}
    for seed in range(6):
        about = planted(seed + 1000, 4)
        units = words(about.text)
        worth = {"head": probabilities(head, about.text), "random": rng.random(len(units))}
        for name, values in worth.items():
            stays = values >= np.quantile(values, 0.5)
            left = " ".join(about.text[s.start : s.end] for s, stay in zip(units, stays, strict=True) if stay)
            alive[name] += sum(answer in left for answer in about.answers)
    assert alive["head"] > alive["random"] + 4, alive
    text = "The server is old, as you know, and it must never be restarted without a call."
    said = {text[span.start : span.end]: p for span, p in zip(words(text), probabilities(head, text), strict=True)}
    assert min(said["never"], said["without"]) > 0.5, said  # the threshold of a call without a budget
