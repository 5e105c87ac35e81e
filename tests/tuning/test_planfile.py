"""plan.toml: what it holds comes back, and what was edited, is another's, or cannot be written is said."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import fewer
from fewer.adapters import encoder_state, vlm_run, vlm_stages
from fewer.adapters.hf_policy import When
from fewer.fit import fingerprint
from fewer.tuning import planfile
from fewer.tuning.planfile import Promise, TunedPlan
from fewer.tuning.setting import WORDS, Held, Setting, Text
from fewer.types import FewerError, FewerWarning
from tests.tiny import prompt, tiny
from tests.unit.test_types import unchecked

PROMISE = Promise(0.02, 0.95, "wrong", 180, 0.0, 0.026, 30, 0.0)


def made(model: object, setting: Setting = Setting(held=Held("knorm", 0.5))) -> TunedPlan:  # noqa: B008 - frozen
    name = fingerprint(model, "answers")  # type: ignore[arg-type]
    return TunedPlan(setting, "default", name, PROMISE, planfile.versions())


@pytest.fixture(scope="module")
def model() -> object:
    return tiny("llama")


SETTINGS = [
    Setting(held=Held("knorm", 0.5)),
    Setting(Text("llmlingua2", 0.5, ("numbers",)), Held("snapkv", (0.5, (0.25, 0.75), 0.1), store="kivi-4bit")),
    Setting(text=Text("bm25", 0.25)),
    Setting(held=Held(("divprune", "fastv"), 64, counted="mean")),
    Setting(held=Held("kivi-4bit")),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_what_is_saved_comes_back(tmp_path: Path, model: object, setting: Setting) -> None:
    plan = made(model, setting)
    plan.save(tmp_path / "plan.toml")
    assert TunedPlan.load(tmp_path / "plan.toml") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]


def test_compress_does_what_the_plan_says(tmp_path: Path, model: object) -> None:
    setting = Setting(held=Held("knorm", (0.5, (0.25, 0.75), 0.1)))
    made(model, setting).save(tmp_path / "plan.toml")
    for plan in (str(tmp_path / "plan.toml"), tmp_path / "plan.toml", TunedPlan.load(tmp_path / "plan.toml")):
        with torch.inference_mode(), fewer.compress(model, plan) as run:
            model(prompt(100))  # type: ignore[operator]
        assert [layer.kept for layer in run.report.layers] == [((50, 50),), ((25, 75),), ((10, 10),)]


def test_a_plan_says_all_of_it(tmp_path: Path, model: object) -> None:
    made(model).save(tmp_path / "plan.toml")
    for other in ({"keep": 0.5}, {"when": "both"}, {"store": "kivi-4bit"}, {"per": "prompt"}):
        with (
            pytest.raises(FewerError, match=rf"compress\({next(iter(other))}=\.\.\.\) means nothing for a plan"),
            fewer.compress(model, str(tmp_path / "plan.toml"), **other),  # type: ignore[arg-type]
        ):
            pass


def test_a_plan_for_prompts_does_not_pretend(tmp_path: Path, model: object) -> None:
    both = made(model, SETTINGS[1])
    with (
        pytest.warns(FewerWarning, match="prompts shortened by llmlingua2"),
        pytest.raises(FewerError, match="groups of 32"),  # its heads have 16 features
        both.under(model),
    ):
        pass
    with pytest.raises(FewerError, match="the plan shortens prompts"), made(model, SETTINGS[2]).under(model):
        pass


def test_another_model_is_refused(tmp_path: Path, model: object) -> None:
    made(model).save(tmp_path / "plan.toml")
    other = tiny("llama", num_hidden_layers=2)
    with pytest.raises(FewerError, match="is another one"), fewer.compress(other, str(tmp_path / "plan.toml")):
        pass
    headed, turned = tiny("llama", tie_word_embeddings=False), tiny("llama", rope_theta=500.0)
    plan = made(headed)
    plan.check(headed)
    torch.nn.init.normal_(headed.lm_head.weight)
    for mine, other in ((plan, headed), (made(model), turned), (made(model), tiny("llama", rms_norm_eps=0.5))):
        with pytest.raises(FewerError, match="is another one"):
            mine.check(other)  # the same weights inside, and other answers
    assert fingerprint(model) == fingerprint(turned) == fingerprint(turned.base_model), "a fit is for the weights"  # type: ignore[arg-type]


def test_another_version_is_refused(tmp_path: Path, model: object) -> None:
    old = replace(made(model), made={**planfile.versions(), "fewer": "0.0.1"})
    old.save(tmp_path / "plan.toml")
    with pytest.raises(FewerError, match=r"measured with fewer 0\.0\.1"):
        TunedPlan.load(tmp_path / "plan.toml")


def test_a_date_may_lose_its_quotes(tmp_path: Path, model: object) -> None:
    path = tmp_path / "plan.toml"
    replace(made(model), made={**planfile.versions(), "date": "2026-01-01"}).save(path)
    path.write_text(path.read_text().replace('"2026-01-01"', "2026-01-01"))
    assert TunedPlan.load(path).promise == PROMISE, "it says the same"


def test_what_is_no_text_cannot_be_written(tmp_path: Path, model: object) -> None:
    with pytest.raises(FewerError, match=r"cannot be written \(surrogates not allowed\)"):
        replace(made(model), model="odd\udcff").save(tmp_path / "plan.toml")
    assert not list(tmp_path.iterdir())


def test_an_edited_plan_has_no_promise(tmp_path: Path, model: object) -> None:
    path = tmp_path / "plan.toml"
    made(model).save(path)
    text = path.read_text()
    path.write_text(text.replace("keep = 0.5", "keep = 0.25"))
    with pytest.raises(FewerError, match="was changed since it was written, so its promise holds no more"):
        TunedPlan.load(path)
    head, _, rest = text.replace("keep = 0.5", "keep = 0.25").partition("\n[promise]")
    rest = "\n[made]" + rest.partition("[made]")[2]
    bare = "\n".join(line for line in (head + rest).split("\n") if not line.startswith("sha256"))
    path.write_text(bare)
    plan = TunedPlan.load(path)  # a setting, and nothing more
    assert plan.promise is None and plan.setting.held == Held("knorm", 0.25) and "nothing is promised" in str(plan)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = ", "is no TOML"),
        ("a = 1", "format is None"),
        ('format = "fewer-plan 2"', "format is 'fewer-plan 2'"),
        ('format = "fewer-plan 1"', "says nothing to do"),
        ('format = "fewer-plan 1"\nsettings = 3', "'settings' means nothing"),
        ('format = "fewer-plan 1"\nsetting = 3', "are tables"),
        ('format = "fewer-plan 1"\nmade = 3\n[setting.held]\nmethod = "knorm"', "are tables"),
        ('format = "fewer-plan 1"\n[setting.hold]\nmethod = "knorm"', "no part 'hold'"),
        ('format = "fewer-plan 1"\n[setting.held]\nkeep = 0.5', "lacks method"),
        ('format = "fewer-plan 1"\n[setting.held]\nmethod = "knrm"', "did you mean knorm"),
        ('format = "fewer-plan 1"\n[setting.held]\nmethod = "knorm"\nkeep = -1', "keep=-1 would leave nothing"),
        ('format = "fewer-plan 1"\n[setting.held]\nmethod = "knorm"\nkeep = [0.5, [2.5]]', "keep=2.5"),
        ('format = "fewer-plan 1"\n[setting.held]\nmethod = "knorm"\nkeeps = 0.5', "did you mean keep"),
        ('format = "fewer-plan 1"\n[setting.text]\nmethod = "bm25"\nkeep = true', "cannot be read: it is bool"),
        ('format = "fewer-plan 1"\n[setting.text]\nmethod = "bm25"\nkeep = 0.5\nprotect = [3]', "it lists names"),
        ('format = "fewer-plan 1"\n[setting.text]\nmethod = "bm25"\nkeep = 0.5\nprotect = ["nums"]', "nums"),
        ('format = "fewer-plan 1"\nmodel = 5\n[setting.held]\nmethod = "knorm"', "model = 5 cannot be read"),
        (
            'format = "fewer-plan 1"\nfingerprint = 5\n[setting.held]\nmethod = "knorm"',
            "fingerprint = 5 cannot be",
        ),
        ('format = "fewer-plan 1"\n[promise]\nloss = 0.5\n[setting.held]\nmethod = "knorm"', "was changed since"),
    ],
)
def test_nonsense_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(FewerError, match=said) as why:
        TunedPlan.load(path)
    assert str(path) in str(why.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('store = "kivi-4bit-x"', "store='kivi-4bit-x' names no form of storage"),
        ('store = "knorm"', "store='knorm' names no form of storage"),
        ('when = "never"', "when='never': it is 'prefill' or 'decode' or 'both'"),
        ("every = 0", "every=0: a number of decoding steps"),
        ('schedule = "cubic"', "schedule='cubic': it is 'constant'"),
        ('per = "page"', "per='page'"),
        ('counted = "first"', "counted='first'"),
        ('positions = "none"', "positions='none'"),
        ('only = "text"', "only='text': it is 'visual'"),
        ("keep = []", r"keep=\[\]: a list of budgets"),
        ("keep = [0.5, []]", r"keep=\[0.5, \[\]\]: a list of budgets"),
        ('keep = "many flops"', "keep='many flops' cannot be read"),
    ],
)
def test_options_that_no_model_takes_are_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(f'format = "fewer-plan 1"\n[setting.held]\nmethod = "knorm"\n{line}')
    with pytest.raises(FewerError, match=said) as why:
        TunedPlan.load(path)
    assert str(path) in str(why.value)


def test_stages_are_at_least_one_and_keep_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('format = "fewer-plan 1"\n[setting.held]\nmethod = []')
    with pytest.raises(FewerError, match="name at least one stage"):
        TunedPlan.load(path)
    path.write_text('format = "fewer-plan 1"\n[setting.held]\nmethod = "knorm"')
    assert TunedPlan.load(path).setting.held == Held("knorm", 1.0)


def test_words_are_those_that_hosts_take() -> None:
    assert set(get_args(When)) == set(WORDS["when"])
    assert (WORDS["per"], WORDS["counted"]) == (vlm_stages.PER, vlm_stages.COUNTED)
    assert {*encoder_state.POSITIONS, *vlm_run.POSITIONS} == set(WORDS["positions"])


@pytest.mark.parametrize("path", [None, 5, b"plan.toml", ["plan.toml"], ""])
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(FewerError, match=r"TunedPlan\.load\(.*\): give the path of a plan's file"):
        unchecked(planfile).TunedPlan.load(path)


def test_files_that_cannot_be_read_or_written(tmp_path: Path, model: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FewerError, match="cannot be read"):
        TunedPlan.load(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(FewerError, match="is no TOML"):
        TunedPlan.load(tmp_path / "latin.toml")
    path = tmp_path / "plan.toml"
    made(model).save(path)
    before = path.read_bytes()

    def full(*args: object, **kwargs: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(FewerError, match=r"cannot be written \(No space left on device\); nothing was changed"):
        made(model, SETTINGS[2]).save(path)
    assert path.read_bytes() == before


def test_a_fit_is_looked_for_beside_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('format = "fewer-plan 1"\n[setting.held]\nmethod = "kvzap"\nfit = "mine.fit"')
    held = TunedPlan.load(path).setting.held
    assert held is not None and held.fit == str(tmp_path / "mine.fit")
    with pytest.raises(FewerError, match="the fit cannot be read"):
        held.made()


def test_no_warning_where_there_is_no_text(model: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with made(model).under(model) as run:
            model(prompt(20))  # type: ignore[operator]
    assert run.report.method == "knorm"
