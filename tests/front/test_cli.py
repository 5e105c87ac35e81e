"""The command line on a tiny model from a folder: what it prints, what it writes, and what it refuses."""

import json
from pathlib import Path

import pytest

from fewer import METHODS, cli
from fewer import fit as fits
from fewer.methods import name_of, of_family
from fewer_eval import report
from tests.front.tiny_files import save

COLUMNS = {
    "method", "task", "keep_asked", "keep_got", "bytes_full", "bytes_kept", "quality", "loyalty", "n", "prefill_s",
    "compress_s", "decode_ms", "seed",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tmp_path_factory.mktemp("model")))


def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `fewer WORDS`."""
    monkeypatch.setattr("sys.argv", ["fewer", *words])
    monkeypatch.setattr(cli, "out", cli.Console(width=140))
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capfd.readouterr()
    return int(left.value.code or 0), out, err


@pytest.fixture
def fewer(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    return lambda *words: run(capfd, monkeypatch, *words)


def test_methods_lists_them_all(fewer) -> None:
    code, out, _ = fewer("methods", "--family", "kv")
    assert code == 0
    for name in of_family("kv"):
        assert name in out


def test_methods_json_is_one_line_of_objects(fewer) -> None:
    _, out, _ = fewer("methods", "--json")
    (line,) = out.splitlines()
    found = json.loads(line)
    assert [m["name"] for m in found] == list(METHODS)
    for method in found:
        assert set(method) == {
            "name", "family", "mechanism", "training", "needs", "faithfulness", "source", "papers",
        }  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_show_tells_what_a_method_is(fewer, name: str) -> None:
    code, out, _ = fewer("show", name)
    assert code == 0
    assert "Differs from the paper" in out
    assert METHODS[name].card.source in out
    _, out, _ = fewer("show", name, "--json")
    assert json.loads(out.splitlines()[-1])["name"] == name


def test_generate_prints_the_text_and_then_the_report(fewer, model: str) -> None:
    words = ("generate", "a" * 200, "--model", model, "--method", "knorm", "--keep", "0.5", "--max-new-tokens", "5")
    code, _, err = fewer(*words)
    assert code == 0
    assert "knorm keep=0.5" in err
    code, out, _ = fewer(*words, "--json")
    answer = json.loads(out.splitlines()[-1])
    assert answer["report"]["layers"][0]["kept"] == [[104, 104]]  # 100 of 200, and 4 generated tokens that were read
    assert isinstance(answer["text"], str)


def test_generate_reads_a_file(fewer, model: str, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("some words " * 20)
    code, out, _ = fewer(
        "generate",
        "--file",
        str(tmp_path / "in.txt"),
        "--model",
        model,
        "--keep",
        "64",
        "--max-new-tokens",
        "2",
        "--json",
    )
    assert code == 0
    assert json.loads(out)["report"]["layers"][0]["kept"] == [[65, 65]]


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "mine.jsonl"
    lines = [{"context": f"{i} fish swim. " * 20, "question": "How many?", "answer": str(i)} for i in (3, 4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(("flag", "question"), [((), "seen"), (("--unseen",), "unseen")])
def test_compare_on_a_users_own_file(
    fewer, model: str, own: str, tmp_path: Path, flag: tuple[str, ...], question: str
) -> None:
    code, out, _ = fewer(
        "compare", "--model", model, "--data", own, "--methods", "random,knorm,adakv", "--keep", "0.5,64", *flag,
        "--samples", "2", "--out", str(tmp_path / "out"), "--json",
    )  # fmt: skip
    assert code == 0
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert {(r["method"], r["keep_asked"]) for r in rows} == {
        ("full", 1.0), *((m, k) for m in ("random", "uniform", "knorm", "adakv") for k in (0.5, 64)),
    }  # fmt: skip
    for row in rows:
        assert set(row) >= COLUMNS
        assert (row["question"], row["n"]) == (question, 2)
        assert row["bytes_kept"] <= row["bytes_full"]
    written, info = report.read_jsonl(tmp_path / "out/results.jsonl")
    assert [row.to_dict() for row in written] == rows
    assert info.command.startswith("fewer compare")
    assert "<svg" in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize(("flag", "n"), [((), 21), (("--samples", "3"), 3)])
def test_all_lines_of_a_users_file_count(fewer, model: str, tmp_path: Path, flag: tuple[str, ...], n: int) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"context": "Some fish swim.", "question": "What?", "answer": "fish"}\n' * 21)
    words = ("--methods", "random", "--keep", "0.5", "--out", str(tmp_path / "out"), "--json")
    code, out, _ = fewer("compare", "--model", model, "--data", str(path), *words, *flag)
    assert code == 0 and {row["n"] for row in json.loads(out.splitlines()[-1])["rows"]} == {n}


REFUSED = {
    "keep zero": (("compare", "--keep", "0"), "--keep 0 would leave nothing"),
    "keep above one": (("generate", "x", "--keep", "1.5"), "--keep 1.5 is not a fraction"),
    "keep negative": (("compare", "--keep", "-1"), "--keep -1"),
    "keep nan": (("generate", "x", "--keep", "nan"), "--keep nan"),
    "keep word": (("generate", "x", "--keep", "half"), "--keep 'half' cannot be read"),
    "method": (("generate", "x", "--method", "snapvk"), "did you mean snapkv"),
    "method of compare": (("compare", "--methods", "adakb"), "did you mean adakv"),
    "show": (("show", "h20"), "did you mean h2o"),
    "family": (("methods", "--family", "kw"), "known families are kv, prompt, vit"),
    "task": (("compare", "--tasks", "needle-singel"), "did you mean needle-single"),
    "no prompt": (("generate",), "give a prompt, or --file"),
    "two prompts": (("generate", "x", "--file", "y"), "not both"),
    "empty prompt": (("generate", "  "), "the prompt is empty"),
    "no such file": (("generate", "--file", "nowhere.txt"), "nowhere.txt"),
    "no such model": (("generate", "x", "--model", "no/such/folder"), "no/such/folder"),
    "unseen alone": (("compare", "--unseen"), "--unseen goes with --data"),
    "no such data": (("compare", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
    "when": (("generate", "x", "--when", "often"), "--when 'often'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(fewer, model: str, case: str) -> None:
    words, message = REFUSED[case]
    code, out, err = fewer(*(model if word == "MODEL" else word for word in words))
    assert code == 2
    assert message in " ".join(err.split())
    assert out == ""
    assert "Traceback" not in err


def test_a_file_that_is_not_text_is_refused(fewer, tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff\xfe")
    code, _, err = fewer("generate", "--file", str(tmp_path / "picture"))
    assert code == 2
    assert "is not UTF-8 text (byte 0)" in " ".join(err.split())


# --- fits ---


@pytest.fixture(scope="module")
def fitted(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("fits") / "kvzap.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        (path.parent / "text").write_text("Some words to fit on. " * 40)
        patch.setattr(
            "sys.argv",
            [
                "fewer", "fit", "kvzap", "--model", model, "--out", str(path),
                "--data", str(path.parent / "text"), "--tokens", "400", "--length", "100",
            ],
        )  # fmt: skip
        with pytest.raises(SystemExit) as left:
            cli.main()
    assert not left.value.code
    return str(path)


def test_fit_writes_a_file_and_says_how_good_it_is(fewer, model: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Some words to fit on. " * 40)
    words = ("fit", "kvzap", "--model", model, "--data", str(tmp_path / "text"), "--tokens", "300", "--length", "100")
    code, out, _ = fewer(*words, "--out", str(tmp_path / "a.safetensors"))
    assert code == 0
    assert "R2 on held-out tokens" in out and "3 contexts" in out
    code, out, _ = fewer(*words, "--out", str(tmp_path / "b.safetensors"), "--json")
    said = json.loads(out.splitlines()[-1])
    assert code == 0 and set(said) == {"out", "method", "model", "notes"} and said["method"] == "kvzap"
    assert fits.load(tmp_path / "a.safetensors") == fits.load(tmp_path / "b.safetensors", "kvzap")


def test_generate_and_compare_take_a_fit(fewer, model: str, fitted: str, own: str, tmp_path: Path) -> None:
    code, out, _ = fewer(
        "generate", "a" * 100, "--model", model, "--method", "kvzap", "--fit", fitted, "--keep", "0.5",
        "--max-new-tokens", "2", "--json",
    )  # fmt: skip
    assert code == 0
    assert sum(sum(layer["kept"][0]) for layer in json.loads(out)["report"]["layers"]) == 6 * 51
    code, out, _ = fewer(
        "compare", "--model", model, "--data", own, "--methods", "kvzap,kvzip,knorm", "--keep", "0.5", "--fit", fitted,
        "--samples", "1", "--out", str(tmp_path / "out"), "--json",
    )  # fmt: skip
    assert code == 0
    assert {row["method"] for row in json.loads(out.splitlines()[-1])["rows"]} == {
        "full",
        "random",
        "uniform",
        "kvzap",
        "kvzip",
        "knorm",
    }


def test_a_fit_is_asked_for_in_one_line(fewer, model: str, fitted: str, tmp_path: Path) -> None:
    for words, message in (
        (("generate", "x", "--model", model, "--method", "kvzap"), "has to be fitted to the model first"),
        (("generate", "x", "--method", "knorm", "--fit", fitted), "--fit was given for kvzap"),
        (("generate", "x", "--method", "kvzap", "--fit", "nowhere"), "the fit cannot be read"),
        (("fit", "knorm", "--out", str(tmp_path / "f")), "knorm needs no fit; methods that want one are"),
        (("fit", "kvzap", "--out", str(tmp_path / "no/f")), "there is no folder"),
        (("fit", "kvzap", "--out", str(tmp_path / "f"), "--data", "nowhere"), "--data nowhere"),
    ):
        code, out, err = fewer(*words)
        assert (code, out) == (2, "") and message in " ".join(err.split())


def test_all_methods_are_those_that_can_run(monkeypatch: pytest.MonkeyPatch, fitted: str) -> None:
    without = cli._fitted(["all"], None)
    assert "kvzap" not in map(name_of, without) and len(without) == sum(
        not fits.wants(m) for m in of_family("kv").values()
    )
    assert "kvzap" in map(name_of, cli._fitted(["all"], [Path(fitted)]))
