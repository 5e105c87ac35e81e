"""BM25: Lucene's formula by hand and in plain Python; a budget; questions that share nothing."""

import math
import random
from collections import Counter

import pytest

import fewer
from fewer.methods.prompt.bm25 import BM25, terms
from fewer.prompts.source import Source
from fewer.types import BudgetError, FewerError


def test_by_hand() -> None:
    """Three sentences of 3, 3 and 6 words, mean 4. "red" is in two of three: idf ln(1 + 1.5 / 2.5) = ln 1.6; "pump" in
    one: ln(1 + 2.5 / 1.5). With k1 = 1.5 and b = 0.75, a length of 3 counts 1.5 (0.25 + 0.75 3/4) = 1.21875."""
    source = Source(("Red pump leaks. Red door closes. Nothing else happened here all day.",), question="Red pump?")
    found = BM25().rank(source, None).value
    assert found[0] == pytest.approx((math.log(1.6) + math.log(1 + 2.5 / 1.5)) / 2.21875)
    assert found[1] == pytest.approx(math.log(1.6) / 2.21875)
    assert found[2] == 0


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4), (2.0, 0.0)])
def test_agrees_with_a_naive_loop(k1: float, b: float) -> None:
    rng = random.Random(0)
    names = ["pump", "door", "key", "lamp", "red", "blue", "the", "of", "is"]
    sentences = [[rng.choice(names) for _ in range(rng.randint(1, 9))] for _ in range(20)]
    query = ["red", "pump", "the", "pump", "unknown"]
    documents = tuple(" ".join(f"{' '.join(s).capitalize()}." for s in part) for part in (sentences[:9], sentences[9:]))
    source = Source(documents, question=" ".join(query))
    found = BM25(k1=k1, b=b).rank(source, None)
    assert len(found.units) == 20
    mean = sum(map(len, sentences)) / 20
    for sentence, value in zip(sentences, found.value, strict=True):
        count, naive = Counter(sentence), 0.0
        for word in query:
            inside = sum(word in other for other in sentences)
            if inside:
                idf = math.log(1 + (20 - inside + 0.5) / (inside + 0.5))
                naive += idf * count[word] / (count[word] + k1 * (1 - b + b * len(sentence) / mean))
        assert value == pytest.approx(naive)


def test_keeps_what_was_asked_for() -> None:
    text = "The lamp is old. The pump, serial KX-4711, is red. It rained. The door is shut."
    done = fewer.compress_prompt(text, "bm25", tokens=36, tokenizer="characters", question="Which pump is KX-4711?")
    assert done.text == "The pump, serial KX-4711, is red."


def test_terms_are_parts_of_words_in_lower_case() -> None:
    source = Source(("Don't touch KX-4711. 红色的泵!",))
    assert terms(source, source.sentences) == [["don", "t", "touch", "kx", "4711"], ["红", "色", "的", "泵"]]


@pytest.mark.parametrize("question", ["zebra", "?!", "…"])
def test_a_question_that_shares_nothing_ranks_nothing(question: str) -> None:
    for text in ("One two. Three.", "... !!!"):
        ranked = BM25().rank(Source((text,), question=question), None)
        assert not ranked.value.any() and "no word of the question stands in the text" in ranked.notes[0]


def test_errors() -> None:
    with pytest.raises(FewerError, match=r"bm25 ranks by a question"):
        fewer.compress_prompt("One. Two.", "bm25", keep=0.5, tokenizer="characters")
    with pytest.raises(BudgetError, match=r"no threshold of its own"):
        fewer.compress_prompt("One. Two.", "bm25", tokenizer="characters", question="one")
    for name, value, said in (("b", 2.0, "not a share"), ("k1", -1.0, "at least 0")):
        with pytest.raises(FewerError, match=f"{name}={value!r} .*{said}"):
            BM25(**{name: value})
