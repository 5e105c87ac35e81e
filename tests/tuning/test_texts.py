"""One prefill for many settings gives what each gives by itself, and levels of their own are searched at one total."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fewer
from fewer.fit import wants
from fewer.methods import of_family
from fewer.tuning.candidates import candidates, joined
from fewer.tuning.examples import Example
from fewer.tuning.journal import Journal
from fewer.tuning.profile import Divergence, search
from fewer.tuning.setting import Held, Setting, Text
from fewer.tuning.texts import Texts
from fewer.types import FewerError, UnknownName
from tests.tuning.talking import examples, talker

SETTINGS = [
    Setting(),
    Setting(held=Held("knorm", 0.5)),
    Setting(held=Held("adakv", (0.5, 0.25, (0.3, 0.7)))),
    Setting(held=Held("fastkv", 0.5)),
    Setting(held=Held("tova", 0.3, when="both", every=2)),
    Setting(text=Text("truncation", 0.6)),
    Setting(Text("truncation", 0.6), Held("knorm", 0.5)),
    Setting(Text("bm25", 0.5, ("numbers",)), Held("random", 0.4)),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return talker(tmp_path_factory.mktemp("model"))


def by_itself(host: Texts, example: Example, setting: Setting) -> tuple[str, int | None]:
    """The answer as a user gets it: the text shortened, then `generate` inside `fewer.compress`."""
    text = setting.shorten(example.context, example.question, host.tokenizer)
    ids = torch.cat(host.asker.prompt(text, example.question), 1)
    with torch.inference_mode(), setting.under(host.model) as run:
        out = host.model.generate(ids, max_new_tokens=host.most, do_sample=False, attention_mask=torch.ones_like(ids))
    said = host.asker.answers(out[:, ids.shape[1] :])[0]
    return host.asker.text(said), None if run is None else run.report.bytes_kept


def test_many_settings_at_once_are_each_by_itself(host: Texts) -> None:
    for example in examples(3):
        for setting, answer in zip(SETTINGS, host.ask(example, SETTINGS), strict=True):
            assert answer.text == by_itself(host, example, setting)[0], setting
            assert answer.bytes > 0 and answer.tokens > 0 and not answer.refused


def test_every_method_for_caches_answers_as_it_does_by_itself(tmp_path: Path) -> None:
    """Those too that read the prompt again, that look at the latest forward, or that go on while decoding."""
    host = talker(tmp_path, most=80, layers=4)  # tidaldecode chooses in the third
    settings = []
    for name, known in of_family("kv").items():
        made = known()
        if not wants(known) and "group" not in vars(made):  # groups do not divide heads of 16 features
            settings.append(Setting(held=Held(name, 1.0 if getattr(made, "whole", False) else 0.6)))
    assert len(settings) > 22
    (example,) = examples(1, length=150)
    for setting, answer in zip(settings, host.ask(example, settings), strict=True):
        assert (answer.text, answer.refused) == (by_itself(host, example, setting)[0], ""), setting


def test_what_an_answer_took(host: Texts) -> None:
    full, half, budgets, _, _, short, both, _ = host.ask(examples(1)[0], SETTINGS)
    assert half.held == pytest.approx(full.held / 2, abs=1) and full.held == full.tokens
    assert short.tokens < full.tokens and both.bytes < short.bytes < full.bytes
    assert [round(sum(layer) / 2, 2) for layer in budgets.shares] == pytest.approx([0.5, 0.25, 0.5], abs=0.02)
    assert full.choosing <= half.choosing


def test_a_question_that_was_not_seen_changes_what_stays(tmp_path: Path) -> None:
    unseen = talker(tmp_path, unseen=True)
    (one,) = examples(1, length=300)
    setting = Setting(held=Held("tova", 0.1))
    (answer,) = unseen.ask(one, [setting])
    before, after = unseen.asker.prompt(one.context, one.question)
    with torch.inference_mode(), fewer.Cache(unseen.model, "tova", 0.1) as cache:
        unseen.model(before, past_key_values=cache)
        cache.freeze()
        held = cache.report.bytes_kept
        logits = unseen.model(after, past_key_values=cache).logits[:, -1]
        said = unseen.asker.answers(unseen.asker.greedy(cache, logits.argmax(-1), unseen.most))[0]
    assert (answer.text, answer.bytes) == (unseen.asker.text(said), held)


def test_a_text_is_shortened_without_a_question_that_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []
    short = Setting.shorten

    def shorten(self: Setting, prompt: str, question: str | None = None, tokenizer: Any = None) -> str:
        asked.append(question)
        return short(self, prompt, question, tokenizer)

    monkeypatch.setattr(Setting, "shorten", shorten)
    (one,) = examples(1)
    settings = [Setting(Text("statistical", 0.5)), Setting(Text("bm25", 0.5))]
    for unseen, wanted in ((True, {None}), (False, {one.question})):
        asked.clear()
        _, blind = talker(tmp_path / str(unseen), unseen=unseen).ask(one, settings)
        assert set(asked) == wanted and ("question" in blind.refused) == unseen


def test_seconds_of_shortening_a_text_are_counted(host: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Setting, "shorten", lambda self, prompt, *rest: time.sleep(0.2 * (self.text is not None)) or prompt
    )
    (one,) = examples(1)
    plain, short = host.ask(one, [Setting(), Setting(Text("truncation", 0.5))])
    assert plain.choosing < 0.2 <= short.choosing


def test_a_budget_that_cannot_be_met_is_said_and_the_others_go_on(host: Texts) -> None:
    small = Setting(held=Held("streaming-llm", "1KB"))
    kept, refused = host.ask(examples(1)[0], [SETTINGS[1], small])
    assert kept.text and "keep='1KB'" in refused.refused


def test_keeping_everything_diverges_by_nothing(host: Texts) -> None:
    held = Held("knorm", 0.5)
    with Divergence(host, held, examples(2)) as judge:
        assert judge(Held("knorm", 1.0), 2) == pytest.approx(0, abs=1e-5)
        worse = [judge(Held("knorm", keep), 2) for keep in (0.9, 0.05)]
    assert 0 <= worse[0] < worse[1]


def test_levels_keep_the_total_and_are_never_worse_than_even_ones(host: Texts, tmp_path: Path) -> None:
    held, few = Held("knorm", 0.4), examples(3)
    journal = Journal(tmp_path / "answers.jsonl", {})
    found = search(host, held, few, journal)
    flat = [share for level in found.held.keep for share in level]  # type: ignore[union-attr]
    assert len(flat) == 6 and sum(flat) / 6 == pytest.approx(0.4, abs=1e-5)
    assert found.history[-1] <= found.history[0] and list(found.history) == sorted(found.history, reverse=True)
    with Divergence(host, held, few) as judge:
        assert judge(found.held, 3) == pytest.approx(found.history[-1], rel=1e-3)
        assert judge(held, 3) == pytest.approx(found.history[0], rel=1e-3)
    again = search(host, held, few, Journal(tmp_path / "answers.jsonl", {}))  # all is known already
    assert again == found
    assert found.scaled(0.5).keep[0][0] == pytest.approx(flat[0] / 2, abs=1e-6)  # type: ignore[index]


def test_candidates_are_settings_that_can_be() -> None:
    memory = candidates("texts", "memory")
    assert Setting(held=Held("kivi-4bit")) in memory and Setting(held=Held("kvzip", 0.25, store="kivi-4bit")) in memory
    assert {one.held for one in candidates("texts", "tokens")} == {None}
    assert all(one.text is None for one in candidates("pictures", "memory"))
    assert Setting(held=Held(("divprune", "fastv"), 0.25)) in candidates("pictures", "memory", ["divprune>fastv"])
    assert candidates("pictures", "memory", ["snapkv"])[0].held.only == "visual"  # type: ignore[union-attr]
    assert joined(candidates("texts", "tokens", ["bm25"])[:1], memory[:1])[0].held == memory[0].held
    for setting in memory:
        setting.check()


@pytest.mark.parametrize(
    ("reads", "aim", "name", "said"),
    [
        ("texts", "memory", "snapk", "did you mean snapkv"),
        ("texts", "bytes", "snapkv", "memory, latency, tokens"),
        ("texts", "tokens", "snapkv", "leaves the prompt as long as it is"),
        ("texts", "memory", "divprune", "means nothing for a model that reads texts"),
        ("texts", "memory", "kvzap", "has to be fitted first"),
        ("texts", "memory", "llmlingua2+kivi-4bit", "no store and no stages"),
        ("pictures", "memory", "llmlingua2", "this model is asked about pictures"),
        ("texts", "memory", "snapkv+h2o", "names no form of storage"),
    ],
)
def test_candidates_that_cannot_be(reads: str, aim: str, name: str, said: str) -> None:
    with pytest.raises((UnknownName, FewerError), match=said):
        candidates(reads, aim, [name])


def test_what_a_model_cannot_do_is_refused_and_the_others_go_on(host: Texts) -> None:
    packed = Setting(held=Held("knorm", 0.5, store="kivi-4bit"))  # its heads have 16 features
    whole, refused, kept = host.ask(examples(1)[0], [Setting(), packed, SETTINGS[1]])
    assert whole.text and kept.text and "groups of 32" in refused.refused
