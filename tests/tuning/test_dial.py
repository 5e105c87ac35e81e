"""The whole search on a tiny model: what it finds holds together, it goes on where it stopped, and says why not."""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fewer
from fewer.tuning import dial, losses, risk
from fewer.tuning.dial import tune
from fewer.tuning.examples import Example
from fewer.tuning.hosts import Answer
from fewer.tuning.planfile import Promise, TunedPlan
from fewer.tuning.result import Tuned
from fewer.tuning.setting import Setting
from fewer.tuning.texts import Texts
from fewer.types import FewerError, UnknownName
from tests.tuning.talking import examples, half, talker
from tests.unit.test_types import unchecked

ASKED: dict[str, Any] = {
    "loss": 0.7, "confidence": 0.8, "measure": half, "methods": ["knorm", "truncation"], "max_new_tokens": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return talker(tmp_path_factory.mktemp("model"), most=4)


@pytest.fixture(scope="module")
def found(host: Texts) -> Tuned:
    return tune(host.model, examples(28), processor=host.tokenizer, **ASKED)


def timeless(found: Tuned) -> dict[str, Any]:
    return replace(found, seconds=0.0).to_dict()


def test_what_was_found_holds_together(host: Texts, found: Tuned, tmp_path: Path) -> None:
    assert found.parts == {"search": 7, "calibration": 19, "held out": 2}
    assert found.full.loss == 0 and found.full.tokens > 100
    passed = [one for one in found.sequence if one.p is not None and one.p <= 0.2]
    assert found.chosen is not None and passed and found.chosen in [one.setting for one in passed]
    chosen = next(one for one in found.sequence if one.setting == found.chosen)
    assert chosen.n == 19 and chosen.bytes < found.full.bytes
    costs = [one.bytes for one in found.sequence]
    assert costs == sorted(costs, reverse=True) or len(passed) < len(costs)
    assert found.held is not None and found.held.n == 2
    assert "With confidence 0.8" in found.promise and str(found.chosen) in found.promise
    assert len(found.budgets) == 3 and all(len(layer) == 2 and 0 < min(layer) <= 1 for layer in found.budgets)
    assert all(one.loss > 0 and one.full != one.said for one in found.worst)
    json.dumps(found.to_dict())
    found.plan().save(tmp_path / "plan.toml")
    plan = TunedPlan.load(tmp_path / "plan.toml")
    assert plan.setting == found.chosen and plan.promise is not None and plan.promise.lost == chosen.loss


def test_the_plan_gives_the_answers_that_were_measured(host: Texts, found: Tuned) -> None:
    plan = found.plan()
    assert plan.setting.held is not None
    for example in examples(28)[:5]:
        (said,) = host.ask(example, [plan.setting])
        text = plan.setting.shorten(example.context, example.question, host.tokenizer)
        ids = torch.cat(host.asker.prompt(text, example.question), 1)
        with torch.inference_mode(), plan.setting.under(host.model):
            out = host.model.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))
        assert host.asker.text(host.asker.answers(out[:, ids.shape[1] :])[0]) == said.text


class Counting(Texts):
    """Counts what it is asked, and stops after so many."""

    left = 10**9
    asked = 0

    def ask(self, example: Example, settings: Sequence[Setting]) -> list[Answer]:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked += len(settings)
        return super().ask(example, settings)


@pytest.mark.parametrize("stop", [3, 30])
def test_a_search_that_was_broken_off_goes_on(host: Texts, found: Tuned, tmp_path: Path, stop: int) -> None:
    record = tmp_path / "record" / "answers.jsonl"
    one = Counting(host.model, host.tokenizer, most=4)
    one.left = stop
    with pytest.raises(KeyboardInterrupt):
        tune(host.model, examples(28), host=one, record=record, **ASKED)
    with record.open("ab") as file:
        file.write(b'{"example": "cut sh')  # the power went while a line was written
    two = Counting(host.model, host.tokenizer, most=4)
    again = tune(host.model, examples(28), host=two, record=record, **ASKED)
    three = Counting(host.model, host.tokenizer, most=4)
    once_more = tune(host.model, examples(28), host=three, record=record, **ASKED)
    assert three.asked == 0 and two.asked > 0
    # costs in seconds of deciding differ from run to run; what was answered does not
    assert timeless(again) == timeless(once_more)
    assert timeless(again)["searched"] == timeless(found)["searched"] and again.chosen == found.chosen


def test_a_record_of_something_else_is_refused(host: Texts, tmp_path: Path) -> None:
    record = tmp_path / "answers.jsonl"
    tune(host.model, examples(16), host=host, record=record, levels=False, **ASKED)
    before = record.read_bytes()
    with pytest.raises(FewerError, match=r"another run \(max_new_tokens, seed differ\)"):
        tune(host.model, examples(16), host=host, record=record, **{**ASKED, "seed": 1, "max_new_tokens": 5})
    assert record.read_bytes() == before
    record.write_text("once upon a time\n")
    with pytest.raises(FewerError, match="no record of `fewer tune`"):
        tune(host.model, examples(16), host=host, record=record, **ASKED)
    with pytest.raises(FewerError, match=r"cannot be (read|written)"):
        tune(host.model, examples(16), host=host, record=record / "below.jsonl", **ASKED)


def test_a_record_is_of_one_way_of_reading(host: Texts, tmp_path: Path) -> None:
    record, asked = tmp_path / "answers.jsonl", {**ASKED, "levels": False}
    tune(host.model, examples(16), processor=host.tokenizer, record=record, **asked)
    templated = copy.deepcopy(host.tokenizer)
    templated.chat_template = "{{ messages[0]['content'] }} !"
    small = copy.deepcopy(host.model).to(torch.bfloat16)
    counting = Counting(host.model, host.tokenizer, most=4)
    for model, given, said in (
        (host.model, {"processor": templated}, "reads"),
        (small, {"processor": host.tokenizer}, "dtype"),
        (host.model, {"processor": host.tokenizer, "host": counting}, "host"),
    ):
        with pytest.raises(FewerError, match=rf"another run \({said} differ\)"):
            tune(model, examples(16), record=record, **given, **asked)


def test_a_model_in_training_is_refused(host: Texts) -> None:
    with pytest.raises(FewerError, match=r"in training mode and answers at random: call .eval\(\)"):
        tune(copy.deepcopy(host.model).train(), examples(16), processor=host.tokenizer, **ASKED)


def test_a_record_whose_first_line_was_cut_begins_anew(host: Texts, tmp_path: Path) -> None:
    asked = {**ASKED, "levels": False}
    for content in (b"", b'{"kind": "tune", "mod'):
        record = tmp_path / f"{len(content)}.jsonl"
        record.write_bytes(content)
        tune(host.model, examples(16), host=host, record=record, **asked)
        assert json.loads(record.read_text().split("\n")[0])["kind"] == "tune"


def test_a_second_test_on_the_same_examples_says_so(host: Texts, tmp_path: Path) -> None:
    record, asked = tmp_path / "answers.jsonl", {**ASKED, "levels": False}
    one = tune(host.model, examples(16), host=host, record=record, **asked)
    same = tune(host.model, examples(16), host=host, record=record, **asked)
    other = tune(host.model, examples(16), host=host, record=record, **{**asked, "loss": 0.75})
    assert not any("test number" in note for note in (*one.notes, *same.notes))
    assert any("test number 2 on the same calibration examples" in note for note in other.notes)
    assert one.test == same.test == 1 and other.test == 2
    right = [replace(example, answers=("now right",)) for example in examples(16)]
    corrected = tune(host.model, right, host=host, record=record, **asked)
    named = tune(host.model, examples(16), host=host, record=record, **{**asked, "measure": "changed"})
    assert corrected.test == 3 and (named.test == 4 or not named.sequence), "they too look at these examples again"
    if other.chosen is not None:
        other.plan().save(tmp_path / "plan.toml")
        said = f"{TunedPlan.load(tmp_path / 'plan.toml')}"
        assert "test number 2" in said and "test number 2" in other.promise
    nothing = tune(host.model, examples(16), host=host, record=tmp_path / "new.jsonl", **{**asked, "measure": never})
    assert nothing.test == 1
    assert tune(host.model, examples(16), host=host, record=tmp_path / "new.jsonl", **asked).test == 1


def never(full: str, said: str, example: Example) -> float:
    """Nothing is ever lost, so that nothing is tested."""
    return 0.0


def test_where_there_is_nothing_to_lose_nothing_is_promised(host: Texts) -> None:
    never = [replace(one, answers=("never said",)) for one in examples(16)]
    none = tune(host.model, never, host=host, **{**ASKED, "measure": "wrong", "levels": False})
    assert none.chosen is None and none.stake == 0 and "nothing at all would lose 0.0000 (wrong)" in none.why


def test_a_full_disk_keeps_what_is_there(host: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "answers.jsonl"
    one = Counting(host.model, host.tokenizer, most=4)
    one.left = 5
    with pytest.raises(KeyboardInterrupt):
        tune(host.model, examples(16), host=one, record=record, **ASKED)
    before, opened = record.read_bytes(), Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "a":
            raise OSError(28, "No space left on device")
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    two = Counting(host.model, host.tokenizer, most=4)
    with pytest.raises(FewerError, match=r"cannot be written \(No space left on device\); what is in it stays"):
        tune(host.model, examples(16), host=two, record=record, **ASKED)
    assert record.read_bytes() == before


def test_no_setting_that_passes(host: Texts) -> None:
    asked = {**ASKED, "methods": ["random"], "loss": 0.06, "levels": False}
    none = tune(host.model, examples(60), processor=host.tokenizer, **asked)
    assert none.chosen is None and none.promise.startswith("Do not compress: ")
    with pytest.raises(FewerError, match="there is no plan to write"):
        none.plan()


def test_the_best_of_both_are_tried_together(host: Texts) -> None:
    asked = {**ASKED, "loss": 0.9, "levels": False}
    both = tune(host.model, examples(16), processor=host.tokenizer, **asked)
    names = [one.setting for one in both.searched]
    assert any(one.text is not None and one.held is not None for one in names)


def test_for_latency_seconds_are_counted(host: Texts) -> None:
    fast = tune(
        host.model, examples(16), processor=host.tokenizer, aim="latency", **{**ASKED, "loss": 0.9, "levels": False}
    )
    assert all(one.seconds is not None and one.seconds > 0 for one in (fast.full, *fast.searched))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"loss": 1.5}, r"tune\(loss=1\.5\)"),
        ({"loss": -0.1}, r"tune\(loss=-0\.1\)"),
        ({"loss": 0.0}, "cannot be promised"),
        ({"loss": float("nan")}, r"tune\(loss=nan\)"),
        ({"confidence": 1.0}, r"tune\(confidence=1\.0\)"),
        ({"measure": "sound"}, "known are changed, wrong, numbers"),
        ({"aim": "money"}, "memory, latency, tokens"),
        ({"methods": "knorm"}, "give a list of names"),
        ({"methods": []}, r"methods=\[\]"),
        ({"methods": [3]}, r"methods=\[3\]"),
        ({"fit": "x.fit"}, "fit='x.fit'.: give a list of files"),
        ({"loss": "0.02"}, "loss='0.02'.: it is a number"),
        ({"confidence": None}, "confidence=None.: it is a number"),
        ({"max_new_tokens": 0}, "max_new_tokens=0.: give a whole number from 1 on"),
        ({"record": 3}, "record=3.: give the path"),
        ({"host": None}, "give the model's tokenizer"),
        ({"loss": 0.02, "confidence": 0.95}, "40 examples are too few"),
    ],
)
def test_what_cannot_be_asked(host: Texts, asked: dict[str, Any], said: str) -> None:
    with pytest.raises((FewerError, UnknownName), match=said):
        unchecked(dial).tune(host.model, examples(40), **{"host": host, **ASKED, **asked})


def test_a_list_is_no_loss() -> None:
    with pytest.raises(UnknownName, match=r"measure=\['wrong'\] is no loss; known are changed, wrong, numbers"):
        unchecked(losses).resolve_loss(["wrong"])


def test_examples_without_answers_are_named(host: Texts) -> None:
    bare = [replace(one, answers=()) if one.line in (3, 5) else one for one in examples(40)]
    with pytest.raises(FewerError, match=r"2 of 40 examples have no answer \(the first is in line 3\)"):
        tune(host.model, bare, host=host, **{**ASKED, "measure": "wrong"})
    tune(
        host.model, bare, host=host, **{**ASKED, "measure": "changed", "methods": ["knorm"], "levels": False}
    )  # changed needs none


def test_examples_that_cannot_be_asked_are_named_first(host: Texts) -> None:
    many = examples(40)
    for changed, said in (({"images": ("cat.png",)}, "has an image"), ({"question": " "}, "has an empty question")):
        counting = Counting(host.model, host.tokenizer, most=4)
        with pytest.raises(FewerError, match=f"example 7 {said}"):
            tune(host.model, [*many[:6], replace(many[6], **changed), *many[7:]], host=counting, **ASKED)  # type: ignore[arg-type]
        assert counting.asked == 0


def test_a_loss_of_your_own(host: Texts) -> None:
    def longer(full: str, said: str, example: Example) -> float:
        return float(len(said) > len(full))

    mine = tune(host.model, examples(16), host=host, **{**ASKED, "measure": longer, "levels": False})
    assert mine.measure == "own: longer"

    def wrong(full: str, said: str, example: Example) -> float:
        return longer(full, said, example)

    bare = [replace(one, answers=()) for one in examples(16)]  # ours would need answers, this one has its own mind
    asked = {**ASKED, "levels": False, "methods": ["knorm"]}
    assert tune(host.model, bare, host=host, **{**asked, "measure": wrong}).measure == "own: wrong"
    for odd in (lambda full, said: 0.0, lambda full, said, example: None):
        with pytest.raises(FewerError, match="a loss takes the full model's answer, the other one, and the example"):
            tune(host.model, bare, host=host, **{**asked, "measure": odd})
    promise = Promise(0.1, 0.9, "own: wrong", 20, 0.0, 0.05, 4, 0.0)
    with pytest.raises(FewerError, match="a loss of your own, 'wrong'"):
        fewer.Monitor.of(TunedPlan(Setting(), promise=promise))
    assert fewer.Monitor.of(TunedPlan(Setting(), promise=promise), measure="changed").loss == 0.1


def test_questions_about_one_context_are_promised_as_one(host: Texts, tmp_path: Path) -> None:
    twice = [replace(one, question=f"{one.question} {again}") for one in examples(24) for again in "ab"]
    found = tune(host.model, twice, host=host, **{**ASKED, "methods": ["knorm"], "levels": False, "loss": 0.9})
    assert found.grouped and found.chosen is not None and found.held is not None
    tested = next(one for one in found.sequence if one.setting == found.chosen)
    assert tested.n == found.contexts == found.parts["calibration"] / 2
    assert f"on {tested.n} calibration contexts" in found.promise and "counts once" in found.promise
    found.plan().save(tmp_path / "plan.toml")
    plan = TunedPlan.load(tmp_path / "plan.toml")
    assert "counts once" in str(plan) and "here every request counts" in fewer.Monitor.of(plan, measure="changed").note


def test_unseen_is_said_by_who_is_asked(host: Texts) -> None:
    with pytest.raises(FewerError, match=r"tune\(unseen=True\): Texts compresses with the question"):
        tune(host.model, examples(40), host=host, unseen=True, **ASKED)
    host = Texts(host.model, host.tokenizer, most=4, unseen=True)
    with pytest.raises(FewerError, match=r"before the question is read; say unseen=True"):
        tune(host.model, examples(40), host=host, **ASKED)


def test_the_least_examples_that_can_do() -> None:
    assert risk.needed(0.02, 0.05) == 149 and 0.98**149 <= 0.05 < 0.98**148
    assert fewer.tune is tune
