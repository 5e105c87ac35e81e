"""`fewer tune` on a tiny model from a folder, and what its plan does in `fewer generate` and `fewer serve`."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from fewer.fit import fingerprint
from fewer.models import load
from fewer.tuning.losses import LOSSES
from fewer.tuning.planfile import Promise, TunedPlan, versions
from fewer.tuning.setting import Held, Setting, Text
from fewer.tuning.texts import Texts
from tests.front.test_cli import run
from tests.front.tiny_files import save
from tests.tuning.talking import examples, half


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def _half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "half", half)


@pytest.fixture
def fewer(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    return lambda *words: run(capfd, monkeypatch, *map(str, words))


def write(path: Path, n: int, **changes: object) -> Path:
    lines = []
    for one in examples(n):
        said = asdict(one)
        lines.append({"context": said["context"], "question": said["question"], "answer": said["answers"][0]})
        lines[-1].update(changes)
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


def words(model: str, folder: Path, data: Path, *more: object) -> list[object]:
    return [
        "tune", "--model", model, "--data", data, "--loss", 0.7, "--confidence", 0.8, "--measure", "half",
        "--methods", "knorm", "--max-new-tokens", 4, "--plan", folder / "plan.toml", "--out", folder / "tuned", *more,
    ]  # fmt: skip


def test_unseen_is_for_texts(fewer, model: str, tmp_path: Path) -> None:
    data = write(tmp_path / "mine.jsonl", 40, image="cat.png")
    code, _, err = fewer(*words(model, tmp_path, data, "--unseen"))
    assert code == 2 and "--unseen is for texts" in err


def test_three_commands(fewer, model: str, tmp_path: Path) -> None:
    data = write(tmp_path / "mine.jsonl", 40)
    code, out, err = fewer(*words(model, tmp_path, data))
    assert code == 0 and "With confidence 0.8" in out and "search, round 1" in err
    page = (tmp_path / "tuned" / "report.html").read_text()
    assert "With confidence 0.8" in page and "fewer tune --model" in page
    plan = TunedPlan.load(tmp_path / "plan.toml")
    assert plan.promise is not None and plan.promise.measure == "half" and plan.model == model
    assert json.loads((tmp_path / "tuned" / "tuned.json").read_text())["chosen"] == plan.setting.to_dict()

    code, out, err = fewer(
        "generate", "abcdef" * 20, "--question", "which?", "--plan", tmp_path / "plan.toml", "--json"
    )
    assert code == 0 and json.loads(out)["report"]["kept"] < 1

    code, again, _ = fewer(*words(model, tmp_path, data, "--json"))  # all is known by now
    assert code == 0 and json.loads(again)["chosen"] == plan.setting.to_dict()


def test_no_setting_is_an_answer_too(fewer, model: str, tmp_path: Path) -> None:
    data = write(tmp_path / "mine.jsonl", 60)
    asked = words(model, tmp_path, data, "--methods", "random", "--measure", "changed", "--loss", 0.06, "--no-levels")
    code, out, _ = fewer(*asked)
    assert code == 3 and "Do not compress" in out and not (tmp_path / "plan.toml").exists()
    assert "o not compress" in (tmp_path / "tuned" / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--loss", 2], "tune(loss=2.0)"),
        (["--confidence", 0], "tune(confidence=0.0)"),
        (["--loss", 0.02, "--confidence", 0.95], "40 examples are too few"),
        (["--methods", "knrm"], "did you mean knorm"),
        (["--measure", "sound"], "known are changed, wrong, numbers, half"),
        (["--data", "none.jsonl"], "none.jsonl cannot be read"),
        (["--fit", "none.fit"], "none.fit: the fit cannot be read"),
        (["--plan", "/dev/null/plan.toml"], "/dev/null/plan.toml cannot be written: /dev/null is in the way"),
        (["--out", "/dev/null"], "/dev/null/report.html cannot be written"),
    ],
)
def test_what_is_wrong_is_one_line(fewer, model: str, tmp_path: Path, more: list[object], said: str) -> None:
    code, out, err = fewer(*words(model, tmp_path, write(tmp_path / "mine.jsonl", 40), *more))
    assert code == 2 and out == "" and said in err
    assert not (tmp_path / "plan.toml").exists()


def test_ten_examples_and_examples_without_answers(fewer, model: str, tmp_path: Path) -> None:
    code, _, err = fewer(*words(model, tmp_path, write(tmp_path / "ten.jsonl", 10), "--loss", 0.02))
    assert code == 2 and "10 examples are too few" in err
    bare = tmp_path / "bare.jsonl"
    bare.write_text("\n".join(json.dumps({"context": one.context, "question": one.question}) for one in examples(40)))
    code, _, err = fewer(*words(model, tmp_path, bare, "--measure", "wrong"))
    assert code == 2 and "40 of 40 examples have no answer" in err


def plan(path: Path, setting: Setting) -> Path:
    TunedPlan(setting).save(path)
    return path


def test_a_plan_in_generate(fewer, model: str, tmp_path: Path) -> None:
    held = plan(tmp_path / "held.toml", Setting(held=Held("knorm", 0.5)))
    code, _, err = fewer("generate", "abc", "--plan", held, "--keep", "0.5")
    assert code == 2 and "says all of it; leave out --keep" in err
    text = plan(tmp_path / "text.toml", Setting(Text("truncation", 0.5), Held("knorm", 0.5)))
    code, _, err = fewer("generate", "abc def ghi jkl", "--plan", text, "--model", model)
    assert code == 2 and "give --question too" in err
    asked = ["generate", "abc def ghi jkl", "--plan", text, "--model", model, "--question", "which?", "--json"]
    code, out, _ = fewer(*asked, "--max-new-tokens", 2)
    report = json.loads(out)["report"]
    assert code == 0 and report["kept"] < 1 and report["layers"][0]["seen"][0] < len("abc def ghi jkl\n\nwhich?\n")
    short = plan(tmp_path / "short.toml", Setting(text=Text("truncation", 0.5)))
    code, out, _ = fewer(*asked[:3], short, *asked[4:], "--max-new-tokens", 2)
    assert code == 0 and json.loads(out)["report"]["kept"] == 1


def test_a_plan_is_used_as_it_was_measured(fewer, model: str, tmp_path: Path) -> None:
    """The same tokens in the same order, greedily, whatever the model's own settings for generation say."""
    loaded, tokenizer = load(model)
    for unseen in (False, True):
        host = Texts(loaded, tokenizer, most=7, unseen=unseen)
        setting = Setting(held=Held("tova", 0.2))
        promise = Promise(0.1, 0.9, "changed", 50, 0.0, 0.01, 5, 0.0, unseen, 7, 1.0)
        TunedPlan(setting, model, fingerprint(loaded, "answers"), promise, versions()).save(tmp_path / "plan.toml")
        config = Path(model) / "generation_config.json"
        said = json.loads(config.read_text())
        config.write_text(json.dumps({**said, "repetition_penalty": 1.9}))
        for one in examples(2, length=200):
            (answer,) = host.ask(one, [setting])
            asked = ["generate", one.context, "--plan", tmp_path / "plan.toml", "--question", one.question, "--json"]
            code, out, _ = fewer(*asked)
            assert code == 0 and json.loads(out)["text"] == answer.text
        config.write_text(json.dumps(said))


def test_a_plan_in_serve(fewer, tmp_path: Path) -> None:
    held = plan(tmp_path / "held.toml", Setting(held=Held("knorm", 0.5)))
    code, _, err = fewer("serve", "--plan", held)
    assert code == 2 and "has no part for texts" in err
    text = plan(tmp_path / "text.toml", Setting(text=Text("bm25", 0.5)))
    code, _, err = fewer("serve", "--plan", text, "--keep", 0.5)
    assert code == 2 and "leave out --method, --keep and --protect" in err
    code, _, err = fewer("serve", "--plan", text, "--host", "256.0.0.1")  # as far as listening
    assert code == 2 and "cannot listen" in err
