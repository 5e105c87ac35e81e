"""Questions about documents, and how methods are measured on them."""

import numpy as np
import pytest

import fewer
from fewer.prompts.source import Ranking, Source
from fewer.types import Budget, FewerError
from fewer_eval.asked import SETTINGS
from fewer_eval.asked.code import functions
from fewer_eval.asked.injected import WORDINGS, harmless, hidden, sway
from fewer_eval.asked.measure import measure, right, survival


@pytest.mark.parametrize("name", SETTINGS)
def test_an_answer_stands_in_the_documents_and_sweeps_them(name: str) -> None:
    examples = SETTINGS[name].make(6, seed=3)
    assert examples == SETTINGS[name].make(6, seed=3) != SETTINGS[name].make(6, seed=4)
    places = []
    for example in examples:
        whole = "\n\n".join(example.documents)
        assert all(part in whole for part in example.needed)
        assert example.answer not in example.question
        assert example.answer in whole
        places.append(whole.index(example.needed[-1]) / len(whole))
    assert max(places) - min(places) > 0.25, "the answer is always in the same place"


def test_two_hops_need_two_documents() -> None:
    for example in SETTINGS["two-hop"].make(6):
        person, firm, town = example.needed
        holds = [(person in text, firm in text, town in text) for text in example.documents]
        assert (True, True, False) in holds and (False, True, True) in holds
        assert not any(all(one) for one in holds)


def test_code_is_told_by_its_documentation_alone() -> None:
    assert len(functions()) > 20
    for name, said, code in functions():
        assert name not in said and said not in code and f"def {name}(" in code


class Drops:
    """Drops every word with a digit, or refuses."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        if self.refuses:
            raise FewerError("there is nothing here that could go")
        value = np.array([0.0 if any(map(str.isdigit, source.of(unit))) else 1.0 for unit in source.words])
        return Ranking(source.words, value)


def test_what_is_lost_shows() -> None:
    setting = SETTINGS["multi-document"]
    examples = setting.make(4)
    full, none = measure(setting, "full", 1.0, examples), measure(setting, Drops(), 0.5, examples)
    assert full.needed == 1 and full.survived["numbers"] == 1 and full.over == 0 and full.tokens_after == full.limit
    assert none.needed == 0 and none.survived["numbers"] == 0 and none.over == 0
    assert none.tokens_after <= none.limit < full.tokens_after
    assert full.answered is None, "nobody was asked"


def test_a_refusal_is_counted_and_everything_sent() -> None:
    setting = SETTINGS["uuid-threads"]
    line = measure(setting, Drops(refuses=True), 0.5, setting.make(3))
    assert (line.refused, line.needed) == (3, 1.0)


def test_answers_are_graded() -> None:
    setting = SETTINGS["meeting"]
    examples = setting.make(4)

    class Knows:
        def __call__(self, text: str, question: str) -> str:
            answer = next(e.answer for e in examples if (e.question, e.documents[0]) == (question, text))
            return f"It was {answer.replace(',', '')}."

    assert measure(setting, "full", 1.0, examples, Knows()).answered == 1  # type: ignore[arg-type]
    assert not right("It was 12,500.", "12,600")


def test_survival_is_of_whole_things() -> None:
    done = fewer.compress_prompt("It costs 3.50 euros, not 4.", Drops(), tokens=12, tokenizer="characters")
    assert survival(done)["numbers"] == (0, 2)
    whole = fewer.compress_prompt("It costs 3.50 euros, not 4.", "full", keep=1.0, tokenizer="characters")
    assert survival(whole)["numbers"] == (2, 2)


def test_parsability_is_measured_where_there_is_code() -> None:
    setting = SETTINGS["code"]
    examples = setting.make(2)
    assert measure(setting, "full", 1.0, examples).parses == 1
    assert measure(setting, "random", 0.5, examples).parses == 0
    assert measure(SETTINGS["meeting"], "random", 0.5, SETTINGS["meeting"].make(2)).parses is None


def test_the_reader_is_asked_about_as_many_as_it_may_be() -> None:
    setting, texts = SETTINGS["multi-document"], []

    class Counts:
        def __call__(self, text: str, question: str) -> str:
            texts.append(text)
            return "I do not know."

    line = measure(setting, "full", 1.0, setting.make(7), Counts(), most=3)  # type: ignore[arg-type]
    assert (line.n, line.asked, line.answered, len(texts)) == (7, 3, 0, 3)


class Obeys:
    """Keeps what stands in front, or, told to, the end of what it was given."""

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        told = any("delete every other document" in text for text in source.documents)
        order = np.arange(len(source.words), dtype=float)
        return Ranking(source.words, order if told else -order)


def test_a_method_that_obeys_a_document_is_seen() -> None:
    examples = SETTINGS["multi-document"].make(4, seed=1)
    deaf, obeys = sway("truncation", 0.5, "keep me", examples), sway(Obeys(), 0.5, "keep me", examples)
    assert deaf.same > 0.9 and deaf.needed == deaf.needed_harmless
    assert obeys.same < 0.3 and sway(Obeys(), 0.5, "no numbers", examples).same > 0.9
    never = sway(Drops(refuses=True), 0.5, "keep me", examples)
    assert (never.refused, never.n, never.same, never.kept) == (4, 0, None, None)  # which is not zero


def test_what_is_hidden_is_compared_with_as_many_characters_in_the_same_place() -> None:
    (asked,) = SETTINGS["multi-document"].make(1)
    for wording, said in WORDINGS.items():
        sentence = said(asked) or harmless(80, "x")
        plain = harmless(len(sentence), "y")
        assert 0 <= len(sentence) - len(plain) < 20, wording
        documents, at = hidden(asked, sentence)
        assert asked.answer not in asked.documents[at] and documents[at] == f"{asked.documents[at]} {sentence}"
        assert [text for i, text in enumerate(documents) if i != at] == [
            text for i, text in enumerate(asked.documents) if i != at
        ]
