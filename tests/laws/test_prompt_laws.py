"""Every law of prompts on every method for them, and on a twin that breaks just that law and must be caught."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fewer
from fewer.methods import of_family
from fewer.prompts.compression import Compression
from fewer.prompts.settle import text_of
from fewer.prompts.source import Ranking, Source, Span
from fewer.types import Budget, FewerError
from tests.laws.prompt_battery import DOCUMENTS, LAWS, MADE, Shortening, made, needs_a_model, plain


@pytest.mark.parametrize("name", of_family("prompt"))
@pytest.mark.parametrize("law", LAWS)
def test_methods_obey(law: str, name: str) -> None:
    LAWS[law](Shortening(made(name)))


def test_every_method_has_an_entry() -> None:
    """A method that is registered and not named in `MADE` is not tested: it must not pass unseen."""
    assert of_family("prompt").keys() <= MADE.keys()
    for name, known in of_family("prompt").items():
        assert needs_a_model(known) == (MADE[name] is not plain), f"{name}: small models for those with a model"


class Broken(Shortening):
    """The result with one part replaced."""

    def __init__(self) -> None:
        super().__init__(made("random"))

    def __call__(self, documents: Any = DOCUMENTS, **options: Any) -> Compression:
        return self.changed(super().__call__(documents, **options))

    def changed(self, done: Compression) -> Compression:
        return done


class OneMore(Broken):
    """Keeps a little more than was asked for, and counts as if it did not."""

    def __call__(self, documents: Any = DOCUMENTS, **options: Any) -> Compression:
        asked = super().__call__(documents, **options)
        longer = super().__call__(documents, tokens=(asked.limit or 0) + 9)
        return replace(longer, limit=asked.limit, tokens_after=asked.tokens_after)


class Detokenised(Broken):
    """White space is made even, as by a tokenizer's way back to text."""

    def changed(self, done: Compression) -> Compression:
        return replace(done, text=" ".join(done.text.split()))


class Forgetful(Compression):
    """A patch without the white space at the ends of what was dropped."""

    def patch(self) -> str:
        body = json.loads(super().patch())
        for part in body["layout"]:
            for step in part["steps"]:
                if len(step) > 1:
                    step[1] = step[1].strip()
        return json.dumps(body)


class Loses(Broken):
    def changed(self, done: Compression) -> Compression:
        return Forgetful(**vars(done) | {"kept_units": done.kept_units})


def moved(done: Compression, by: int) -> Compression:
    """Runs that end some characters earlier or later."""
    runs = tuple(run._replace(end=min(run.end + by, len(DOCUMENTS[run.document]))) for run in done.runs)
    return replace(done, runs=runs, text=text_of(DOCUMENTS, runs, done.glue))


class Cuts(Broken):
    def __call__(self, documents: Any = DOCUMENTS, **options: Any) -> Compression:
        return moved(super().__call__(documents, keep=0.9), -1)


class Unprotected(Broken):
    def __call__(self, documents: Any = DOCUMENTS, **options: Any) -> Compression:
        return super().__call__(documents, **{**options, "protect": []})


class Impatient(Broken):
    """Tidies up even where nothing was to be dropped."""

    def changed(self, done: Compression) -> Compression:
        return moved(done, -1)


class Drawn(Broken):
    """Another seed for each call."""

    def __call__(self, documents: Any = DOCUMENTS, **options: Any) -> Compression:
        self.method = replace(self.method, seed=self.method.seed + 1)
        return super().__call__(documents, **options)


class Writes(Broken):
    def rank(self, source: Source, budget: Budget) -> Ranking:
        source.words.start[1:] -= 1
        return super().rank(source, budget)


class Overlaps(Broken):
    def changed(self, done: Compression) -> Compression:
        made = replace(done)
        vars(made)["kept"] = (*done.kept, Span(0, 0, 5))
        return made


class Shuffles(Broken):
    def changed(self, done: Compression) -> Compression:
        return replace(done, runs=done.runs[::-1])


class Miscounts(Broken):
    """Counts the documents one by one, without what is between them."""

    def changed(self, done: Compression) -> Compression:
        one = sum(done.source.counter.count(text) for text in done.source.documents)
        return replace(done, tokens_before=one)


class Listens(Broken):
    """Values are ranks among all documents."""

    def __init__(self) -> None:
        self.method = made("recomp-extractive")

    def rank(self, source: Source, budget: Budget) -> Ranking:
        ranking = super().rank(source, budget)
        return replace(ranking, value=np.argsort(np.argsort(ranking.value)).astype(np.float64))


TWINS: dict[str, type[Broken]] = {
    "the_budget_is_a_ceiling": OneMore,
    "the_text_stands_in_the_source": Detokenised,
    "restoring_gives_the_source": Loses,
    "no_grapheme_is_cut": Cuts,
    "what_is_protected_stays": Unprotected,
    "keeping_all_is_the_identity": Impatient,
    "same_call_same_result": Drawn,
    "the_source_is_not_changed": Writes,
    "kept_and_dropped_make_up_each_document": Overlaps,
    "pieces_keep_their_order": Shuffles,
    "tokens_before_are_the_sources": Miscounts,
    "no_document_speaks_for_another": Listens,
}


def test_every_law_has_a_twin() -> None:
    assert TWINS.keys() == LAWS.keys()


@pytest.mark.parametrize("law", LAWS)
def test_the_twin_is_caught(law: str) -> None:
    with pytest.raises((AssertionError, FewerError)):
        LAWS[law](TWINS[law]())


def test_nothing_is_caught_where_nothing_is_broken() -> None:
    for law in LAWS.values():
        law(Broken())


def test_a_method_without_an_entry_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fewer.METHODS, "unheard-of", fewer.METHODS["random"])
    with pytest.raises(AssertionError):
        test_every_method_has_an_entry()
