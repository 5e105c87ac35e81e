"""Statistical: what the text says of its own words; facts that are kept where stop-word removal loses them."""

import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
import regex

import fewer
from fewer.methods.prompt.statistical import PRIOR, Statistical
from fewer.prompts.source import Ranking, Source
from fewer.types import Budget, BudgetError, FewerError
from fewer_eval.cited import FACTS, subject, told
from fewer_eval.fitting import prose

STOP = (
    "a an the and or but if then of to in on at by for with from as is are was were be been being this that these "
    "those it its they them their he his she her you your we our i not no do does did has have had will would can "
    "could should may might must there here which who what when where why how all any each some such than too so also "
    "only into over about after before between during out up down off again once other more most own same just both "
    "few nor while because"
)


@dataclass(frozen=True)
class StopWords:
    """Stop words and signs go first, then others at random: what most people would write in five minutes."""

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        said = [source.of(span).casefold() for span in source.words]
        stop = STOP.split()
        stays = np.array([word not in stop and word[0].isalnum() for word in said])
        return Ranking(source.words, stays + 0.5 * np.random.default_rng(0).random(len(said)))


def texts(count: int) -> list[tuple[str, list[tuple[int, int]]]]:
    """Documentation of Python in which eight facts are planted, and where the words are that a fact is nothing without:
    those of whom it is told, and what."""
    out = []
    for index in range(count):
        rng, sentences, facts = random.Random(index), [], []
        while len(sentences) < 60:
            sentences += prose(rng, 10)
        for _ in range(8):
            fact = FACTS[rng.choice(sorted(FACTS))]
            who, answer = subject(fact.about, rng), fact.answer(rng)
            facts.append((told(fact, who, answer, rng), who.removeprefix("the "), answer))
        for sentence, _, _ in facts:
            sentences.insert(rng.randrange(len(sentences) + 1), sentence)
        text, wanted = " ".join(sentences), []
        for sentence, who, answer in facts:
            at = text.index(sentence)
            wanted.append([
                (at + place + word.start(), at + place + word.end())
                for part in (who, answer)
                for place in [sentence.casefold().index(part.casefold())]
                for word in regex.finditer(r"\S+", part)
            ])  # fmt: skip
        out.append((text, wanted))
    return out


def words(text: str) -> int:
    """A token a word or sign, as large vocabularies have it: to drop a stop word saves as much as to drop another."""
    return len(regex.findall(r"\w+|[^\w\s]", text))


def survive(method: object, keep: float, count: int = 12) -> float:
    """The share of facts of which every such word is left."""
    found = []
    for text, facts in texts(count):
        done = fewer.compress_prompt(text, method, keep=keep, tokenizer=words)  # type: ignore[arg-type]
        here = np.zeros(len(text), dtype=bool)
        for span in done.kept:
            here[span.start : span.end] = True
        found += [all(here[start:end].all() for start, end in words) for words in facts]
    return float(np.mean(found))


@pytest.mark.parametrize(("keep", "margin"), [(0.5, 0.0), (0.4, 0.1), (0.3, 0.3)])
def test_keeps_facts_that_random_and_stop_words_lose(keep: float, margin: float) -> None:
    """At half the tokens dropping stop words is nearly all that is needed; below that it draws among what is left."""
    ours, stop, drawn = (survive(method, keep) for method in (Statistical(), StopWords(), "random"))
    assert ours > stop + margin and ours > drawn + 0.6 and ours > 0.8


def test_by_hand() -> None:
    source = Source(("The pump is red. The pump weighs 40 kg.",))
    plain = Statistical(shape=0.0, again=0.0, near=0.0)
    ranking = plain.rank(source, None)
    said = [source.of(span) for span in ranking.units]
    assert said == ["The", "pump", "is", "red", ".", "The", "pump", "weighs", "40", "kg", "."]
    worth = dict(zip(said, ranking.value.tolist(), strict=True))
    assert worth["pump"] == pytest.approx(-math.log((2 + PRIOR / 16) / (11 + PRIOR)))
    assert worth["is"] == pytest.approx(-math.log((1 + PRIOR / 4) / (11 + PRIOR)))
    assert worth["."] == 0 and worth["weighs"] > worth["pump"] > worth["The"]
    shaped = Statistical(shape=4.0, again=0.0, near=0.0).rank(source, None).value - ranking.value
    assert shaped.tolist() == pytest.approx([0.0] * 8 + [4.0, 0, 0])  # no capital counts where a sentence begins
    again = Statistical(shape=0.0, again=1.0, near=0.0).rank(source, None).value
    assert again[6] == pytest.approx(ranking.value[6] / (1 + math.log(2))) and again[1] == ranking.value[1]


def test_near_is_a_share_of_the_sentence() -> None:
    source = Source(("One two. Three.", "Vier.\nFünf!"))
    own = Statistical(near=0.0).rank(source, None).value
    shared = Statistical(near=1.0).rank(source, None).value
    sentences = [[0, 1, 2], [3, 4], [5, 6], [7, 8]]
    for mine in sentences:
        words = [i for i in mine if own[i] > 0]
        assert shared[mine] == pytest.approx(np.full(len(mine), own[words].mean()))


def test_the_question_lifts_its_words() -> None:
    text = "Ada keeps the grey parrot in a cage. Emil keeps the brown tortoise in a box. " * 2
    without = fewer.compress_prompt(text, "statistical", keep=0.4, tokenizer="characters")
    asked = fewer.compress_prompt(text, "statistical", keep=0.4, tokenizer="characters", question="Whose tortoise?")
    assert asked.text.count("tortoise") == 2 and asked.text != without.text


def test_names_numbers_and_signs_have_a_shape() -> None:
    text = "we paid $ 30 to Anna for get_value at 5 % in NASA via mcDonald"
    source = Source((text,))
    lifted = Statistical(near=0.0).rank(source, None).value > Statistical(near=0.0, shape=0.0).rank(source, None).value
    assert {source.of(span) for span, up in zip(source.words, lifted, strict=True) if up} == {
        "$", "30", "Anna", "get_value", "5", "%", "NASA", "mcDonald",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["x", "...", "的的的 是。", "\r\n a \r\n", "مرحبا بالعالم 42"])
def test_odd_texts(text: str) -> None:
    first, second = (Statistical().rank(Source((text, "", text)), None) for _ in range(2))
    assert np.isfinite(first.value).all() and (first.value == second.value).all()


def test_bad_settings_are_refused() -> None:
    for name, value, said in (
        ("near", 1.5, "not a share"), ("again", -1.0, "at least 0"), ("asked", math.nan, "at least 0"),
    ):  # fmt: skip
        with pytest.raises(FewerError, match=f"{name}={value!r} .*{said}"):
            Statistical(**{name: value})
    with pytest.raises(BudgetError, match=r"no threshold of its own"):
        fewer.compress_prompt("one two three", "statistical", tokenizer="characters")
