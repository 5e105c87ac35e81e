"""Labels for a classifier that shortens texts: from a pair of texts, and from a language model."""

import difflib
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fewer.score.labels import Alignment, Contrastive, aligned, apart, common, trusted, words
from fewer.score.surprise import Reader
from fewer.types import FewerError
from tests.tiny import tiny


def kept(text: str, shortened: str) -> list[str]:
    mask = aligned(text, shortened).keep
    return [text[span.start : span.end] for span, stays in zip(words(text), mask, strict=True) if stays]


def test_a_pair_by_hand() -> None:
    text = "The committee, after a long debate, did not approve the 3.5% raise."
    made = aligned(text, "committee did not approve 3.5% raise.")
    assert " ".join(kept(text, "committee did not approve 3.5% raise.")) == "committee did not approve 3.5 % raise ."
    assert made.variation == 0 and made.gap == 0


def test_case_is_ignored_only_where_nothing_agrees_exactly() -> None:
    assert kept("The end. the END", "the END") == ["the", "END"]
    assert aligned("The end. the END", "the END").keep.tolist() == [False, False, False, True, True]
    assert aligned("Not all of it", "ALL IT").keep.tolist() == [False, True, False, True]


def test_a_repeated_word_is_the_one_next_to_what_follows() -> None:
    assert aligned("the cat saw the dog", "the dog").keep.tolist() == [False, False, False, True, True]


def test_difflib_would_not_find_the_longest() -> None:
    """The longest common run, "d e f g", is not part of the longest common subsequence: a b c and what is after."""
    text, shortened = list("defgaxbxcxhxi"), list("abchidefg")
    assert len(common(text, shortened)) == 5
    matched = difflib.SequenceMatcher(None, text, shortened, autojunk=False).get_matching_blocks()
    assert sum(block.size for block in matched) == 4


def test_what_the_writer_made_up_and_moved_is_measured() -> None:
    made = aligned("one two three four", "one two purple five")
    assert (made.variation, made.gap) == (0.5, 0.0) and made.keep.tolist() == [True, True, False, False]
    moved = aligned("one two three four", "three four one two")
    assert moved.variation == 0 and moved.gap == 0.5 and moved.keep.sum() == 2


@pytest.mark.parametrize(("text", "shortened"), [("", ""), ("a b", ""), ("", "a"), (" \n", "a"), ("a b", "c d")])
def test_nothing_in_common(text: str, shortened: str) -> None:
    made = aligned(text, shortened)
    assert not made.keep.any() and len(made.keep) == len(words(text))
    assert made.variation == (1.0 if shortened else 0.0) and made.gap == 0


def naive(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


few = st.lists(st.sampled_from("abcd"), max_size=40)


@settings(max_examples=300, deadline=None)
@given(few, few)
def test_the_subsequence_is_common_and_as_long_as_by_the_table(a: list[str], b: list[str]) -> None:
    pairs = common(a, b)
    assert all(a[i] == b[j] for i, j in pairs)
    assert all(x[0] < y[0] and x[1] < y[1] for x, y in pairwise(pairs))
    assert len(pairs) == naive(a, b)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["The", "the", "cat", "sat", "7", ",", "naïve"]), max_size=30), st.data())
def test_what_was_only_deleted_is_found_again(said: list[str], data: Any) -> None:
    """A text shortened by deletion alone has no faults, and as many words stay as were kept."""
    mask = data.draw(st.lists(st.booleans(), min_size=len(said), max_size=len(said)))
    shortened = [word for word, stays in zip(said, mask, strict=True) if stays]
    made = aligned(" ".join(said), " ".join(shortened))
    assert (made.variation, made.gap) == (0, 0) and made.keep.sum() == len(shortened)


def test_the_worst_tenth_goes_twice() -> None:
    def fault(variation: float, gap: float) -> Alignment:
        return Alignment(np.zeros(1, dtype=bool), variation, gap)

    made = [fault(0.01 * index, 0.01 * (20 - index)) for index in range(20)]
    # 18 and 19 vary most; of the 18 that are left, one has the widest gap: the first
    assert trusted(made).tolist() == [index for index in range(20) if index not in (0, 18, 19)]
    assert trusted([fault(0.0, 0.0)] * 20).tolist() == list(range(20))  # what is without fault stays
    assert trusted(made, worst=0.0).tolist() == list(range(20)) and trusted([]).tolist() == []
    with pytest.raises(FewerError, match=r"worst=1\.5"):
        trusted(made, worst=1.5)


@pytest.fixture(scope="module")
def reader() -> Reader:
    """A random model that reads bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)} | {"<end>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")  # noqa: S106
    return Reader(tiny("llama", vocab_size=257, eos_token_id=256), fast)


TEXT = "A small dog ran home. It ran fast, and it did soon stop!\n\nThe dog is 12 years old."


def test_sentences_read_apart_are_those_read_one_by_one(reader: Reader) -> None:
    offsets, values = apart(reader, TEXT)
    sentences = ["A small dog ran home.", " It ran fast, and it did soon stop!", "\n\nThe dog is 12 years old."]
    assert "".join(sentences) == TEXT
    at, ids = 0, reader.tokens(TEXT)[0]
    for number, sentence in enumerate(sentences):
        # white space between two sentences is read with the one before
        more = len(sentence) - len(sentence.lstrip()) if number else 0
        after = sentences[number + 1] if number < 2 else ""
        count = len(sentence) - more + len(after) - len(after.lstrip())
        alone = reader.of_ids(ids[at : at + count], reader.start + reader.tokens("\n\n")[0])
        np.testing.assert_allclose(values[at : at + count], alone, rtol=1e-4, atol=1e-4)
        at += count
    assert at == len(ids) == len(values) and len(offsets) == len(ids)


def test_a_sentence_longer_than_the_window_is_read_in_pieces(reader: Reader) -> None:
    narrow = Reader(reader.model, reader.tokenizer, window=16)
    _, values = apart(narrow, "x" * 50)
    assert len(values) == 50 and np.isfinite(values).all() and (values > 0).all()


def test_worth_is_what_the_formula_says(reader: Reader) -> None:
    labeller, units = Contrastive(reader, tie=2.0), words(TEXT)
    read, alone = reader.surprise(TEXT)[1], apart(reader, TEXT)[1]  # a byte is a token here, and a character
    for span, worth in zip(units, labeller.worth(TEXT), strict=True):
        with_document, without = read[span.start : span.end].sum(), alone[span.start : span.end].sum()
        assert worth == pytest.approx(without + 2 * max(without - with_document, 0))


def test_a_negation_is_labelled_to_stay_whatever_it_is_worth(reader: Reader) -> None:
    text = "It did not stop, don't Never knot."
    labels = Contrastive(reader).labels(text, np.linspace(9.0, 0.0, len(words(text))))
    kept = [text[span.start : span.end] for span, label in zip(words(text), labels, strict=True) if label == 1]
    assert kept == ["not", "don't", "Never"]


def test_labels_are_above_a_half_for_the_share_that_stays(reader: Reader) -> None:
    soft, hard = Contrastive(reader)(TEXT), Contrastive(reader, soft=0.0)(TEXT)
    assert soft.shape == hard.shape == (len(words(TEXT)),)
    assert ((soft > 0.5) == (hard == 1)).all() and set(hard) == {0.0, 1.0}
    assert hard.mean() == pytest.approx(0.4, abs=1 / len(hard))
    worth = Contrastive(reader).worth(TEXT)
    border = float(np.quantile(worth, 0.6))
    assert soft[0] == pytest.approx(1 / (1 + math.exp(-(worth[0] - border))))


def test_words_that_are_worth_thousands_of_nats_have_labels(reader: Reader) -> None:
    labels = Contrastive(reader).labels("a b c d", np.array([1.0, 5000.0, 9000.0, 9000.0]))
    assert labels[0] < 1e-9 and labels[3] > 1 - 1e-9


def test_a_text_without_words_has_no_labels(reader: Reader) -> None:
    assert Contrastive(reader)(" \n").shape == Contrastive(reader)("").shape == (0,)


@pytest.mark.slow
def test_the_default_model_keeps_names_and_numbers() -> None:
    from fewer.score.surprise import reader as default

    text = "As you may know, the code of the safe in the hall is 48213, and it was Farida who chose it."
    labels = Contrastive(default())(text)
    said = {text[span.start : span.end]: label for span, label in zip(words(text), labels, strict=True)}
    assert min(said["48213"], said["Farida"], said["safe"]) > 0.8
    assert np.mean([said[word] for word in ("you", "may", "know", "of", "it", "was", "who")]) < 0.4, said
