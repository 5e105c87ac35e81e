"""SCOPE: chunks, the order in which they are written anew, what is checked, and what stands where that fails."""

from collections.abc import Sequence

import numpy as np
import pytest

import fewer
from fewer.methods.prompt.scope import SCOPE
from fewer.prompts.chunks import allowed, best, coherent, cosine
from fewer.score.rewriting import asking
from fewer.types import BudgetError, FewerError
from tests.encoders import words_embedder
from tests.readers import bytes_reader

SEA = "Ships sail over deep water. Deep water carries ships. Ships and water, water and ships, every ship sails deep."
BREAD = (
    "Bread needs flour and yeast. Flour with yeast makes bread. Yeast lifts flour, flour makes bread, all need yeast."
)
TEXT = f"{SEA}\n{BREAD}"
WORDS = sorted({word.strip(".,").lower() for word in TEXT.split()})
ENCODER = words_embedder(WORDS, layers=1)


class Writer:
    """Writes the keywords and then the text again, in as many words as it may; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str], int]] = []

    def __call__(self, text: str, keywords: Sequence[str], tokens: int) -> str:
        self.asked.append((text, list(keywords), tokens))
        return " ".join([*keywords, *text.split()][:tokens])


def count(text: str) -> int:
    return len(text.split())


def shortened(rewrite: object, keep: float = 0.5, **more: object) -> fewer.prompts.compression.Compression:
    method = SCOPE(alike=0.0, longest=20, rewrite=rewrite, model=ENCODER)
    return fewer.compress_prompt([SEA, BREAD], method, keep=keep, tokenizer=count, **more)  # type: ignore[arg-type]


def test_the_least_relevant_chunk_is_written_first_and_the_other_left_alone() -> None:
    writer = Writer()
    method = SCOPE(alike=-1.0, longest=99, rewrite=writer, model=ENCODER, keywords=2)
    done = fewer.compress_prompt([SEA, BREAD], method, keep=0.8, question=BREAD, tokenizer=count)
    assert writer.asked[0][0] == SEA
    _, keywords, tokens = writer.asked[0]
    assert len(keywords) == min(2, max(1, tokens // 8)) and all(word in SEA for word in keywords)
    assert done.tokens_after <= 32 and not done.extractive and not done.notes
    assert done.verify([SEA, BREAD]) and fewer.restore(done.text, done.patch()) == [SEA, BREAD]
    other = Writer()
    method = SCOPE(alike=-1.0, longest=99, rewrite=other, model=ENCODER)
    fewer.compress_prompt([SEA, BREAD], method, keep=0.8, question=SEA, tokenizer=count)
    assert other.asked[0][0] == BREAD


def naive_chunks(
    vectors: np.ndarray, sizes: list[int], documents: list[int], alike: float, longest: int
) -> list[list[int]]:
    runs: list[list[int]] = []
    for i in range(len(vectors)):
        if runs:
            mean = np.mean([vectors[j] for j in runs[-1]], axis=0)
            like = float(mean @ vectors[i] / (np.linalg.norm(mean) * np.linalg.norm(vectors[i])))
            fits = sum(sizes[j] for j in runs[-1]) + sizes[i] <= longest
            if like >= alike and fits and documents[runs[-1][0]] == documents[i]:
                runs[-1].append(i)
                continue
        runs.append([i])
    return runs


def test_chunks_agree_with_plain_python() -> None:
    rng = np.random.default_rng(0)
    for alike in (-1.0, 0.0, 0.4):
        vectors, sizes = rng.normal(size=(40, 3)), rng.integers(1, 9, 40).tolist()
        documents = np.sort(rng.integers(0, 3, 40)).tolist()
        found = coherent(vectors, np.array(sizes, dtype=np.float64), documents, alike, 20)
        assert [list(run) for run in found] == naive_chunks(vectors, sizes, documents, alike, 20)
    assert cosine(np.zeros((1, 3)), np.ones(3)).tolist() == [0.0]


def test_what_may_stay_meets_the_room() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        sizes, weights = rng.integers(1, 50, 6).astype(np.float64), rng.random(6) + 0.1
        room = float(rng.integers(0, 200))
        out = allowed(sizes, weights, room)
        assert (out <= sizes + 1e-9).all() and out.sum() == pytest.approx(min(room, sizes.sum()))
        free = out < sizes - 1e-9
        if free.sum() > 1:
            assert np.ptp(out[free] / (sizes * weights)[free]) < 1e-9, "in proportion, where nothing caps it"
    assert best(np.array([1.0, 3.0, 2.0]), np.array([1.0, 5.0, 4.0]), 6.0).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("rewrite", "why"),
    [
        (lambda text, words, tokens: "something else", "a keyword was missing"),
        (lambda text, words, tokens: "", "a keyword was missing"),
        (lambda text, words, tokens: text + text, "what was written was longer"),
    ],
)
def test_sentences_stand_where_what_was_written_fails(rewrite: object, why: str) -> None:
    done = shortened(rewrite, 0.6)
    assert done.extractive and any(note.endswith(f"lost sentences, not rewritten: {why}") for note in done.notes)
    assert done.tokens_after <= (done.limit or 0) and done.text


def test_what_is_protected_is_not_rewritten() -> None:
    done = shortened(Writer(), 0.6, protect=["carries", "lifts"])
    assert "carries" in done.text and "lifts" in done.text and done.extractive
    assert done.notes[0].endswith("it holds something protected")


def test_short_chunks_are_apart() -> None:
    writer = Writer()
    method = SCOPE(alike=1.0, rewrite=writer, model=ENCODER)  # each sentence is a chunk, and shorter than 16 words
    done = fewer.compress_prompt(TEXT, method, keep=0.5, tokenizer=count)
    assert not writer.asked and done.extractive


def test_a_function_that_gives_no_text_is_refused() -> None:
    with pytest.raises(FewerError, match=r"SCOPE\(rewrite=...\): the function gave int, not text"):
        shortened(lambda text, words, tokens: 7)


def test_it_has_no_threshold_of_its_own() -> None:
    with pytest.raises(BudgetError, match="no threshold"):
        fewer.compress_prompt(TEXT, SCOPE(rewrite=Writer(), model=ENCODER), tokenizer=count)


def test_a_language_model_is_asked_in_words() -> None:
    read = bytes_reader()
    said = asking(read)(SEA, ["water"], 12)
    assert isinstance(said, str) and said == asking(read)(SEA, ["water"], 12)
    done = shortened(read, 0.5)  # a random model says nothing that holds the keywords
    assert done.extractive and done.notes


@pytest.mark.slow
def test_the_default_models_shorten_a_paragraph() -> None:
    text = (
        "The harbour of Kessel was opened in 1921 after nine years of work. Its first keeper, Ana Brandt, lived in the "
        "lighthouse with her two sons. Every evening she lit the lamp, and each morning she wrote down which ships had "
        "come and gone. In the winter of 1934 the lamp failed, and three ships were lost on the rocks. "
    ) * 2
    done = fewer.compress_prompt(text.strip(), SCOPE(keywords=1), keep=0.5, question="Why were ships lost?")
    assert done.tokens_after <= (done.limit or 0) and done.text
    assert not done.extractive or done.notes, "either something was rewritten, or a note says why not"


@pytest.mark.parametrize("wrong", [{"alike": 2.0}, {"beta": -0.1}, {"longest": 0}, {"keywords": -1}])
def test_settings_that_cannot_be(wrong: dict[str, float]) -> None:
    (name, value) = next(iter(wrong.items()))
    with pytest.raises(FewerError, match=rf"{name}={abs(value) if name == 'alike' else value}"):
        SCOPE(**wrong)  # type: ignore[arg-type]
