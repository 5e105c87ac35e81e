"""The tables in the documents are those that the kept results make: no figure among them was written by hand."""

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kv() -> dict[str, str]:
    own = script("evidence")
    return {"evidence": own.tables([own.Row(**row) for row in held(own.RESULTS)["rows"]])}


def vit() -> dict[str, str]:
    own = script("vit_evidence")
    return {"evidence": own.tables([own.Score(**row) for row in held(own.RESULTS)["rows"]])}


def vlm() -> dict[str, str]:
    own = script("vlm_evidence")
    lines = own.read(own.RESULTS)
    parts = {"model": own.grades(), "evidence": own.tables(lines), "moved": own.moved(lines)}
    return {**parts, "batches": own.batched(own.read_batched())}


def prompt() -> dict[str, str]:
    own = script("prompt_evidence")
    record = held(own.RESULTS)
    lines, swayed = [own.Line(**row) for row in record["rows"]], [own.Swayed(**row) for row in record["injected"]]
    return {"bill": own.bills(), "evidence": own.tables(lines), "injected": own.injected(swayed)}


def tune() -> dict[str, str]:
    own = script("tune_evidence")
    return {"evidence": own.page(held(own.RESULTS))}


def held(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def part_of(page: str, name: str) -> str:
    _, opened, rest = page.partition(f"<!-- {name} -->\n")
    part, closed, _ = rest.partition(f"\n<!-- /{name} -->")
    assert opened and closed, name
    return part


@pytest.mark.parametrize("made", [kv, vit, vlm, prompt, tune], ids=lambda made: made.__name__)
def test_the_tables_are_those_of_the_results(made: Callable[[], dict[str, str]]) -> None:
    page = (ROOT / "docs" / f"{made.__name__}.md").read_text()
    for name, table in made().items():
        assert part_of(page, name) == table, f"docs/{made.__name__}.md, {name}"


def test_a_figure_changed_by_hand_is_seen() -> None:
    page = (ROOT / "docs" / "kv.md").read_text()
    assert part_of(page.replace("| full |", "| FULL |"), "evidence") != kv()["evidence"]


def test_the_units_that_are_done_are_those_of_the_plan_and_their_samples_are_counted() -> None:
    own = script("evidence")
    record, plan = held(own.RESULTS), {unit.name: unit for unit in own.plan()}
    assert set(record["units"]) <= plan.keys() and len(set(record["units"])) == len(record["units"])
    done = [plan[name] for name in record["units"]]
    for row in record["rows"]:
        units = [unit for unit in done if (unit.task, unit.tokens) == (row["task"], row["tokens"])]
        n = sum(unit.samples for unit in units) // (3 if row["task"] == "text" else 1)  # see `plan`
        assert row["n"] == n, (row["task"], row["tokens"], row["method"])


def test_evidence_that_was_interrupted_goes_on_and_keeps_the_machine_of_its_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = script("evidence")
    (tmp_path / "docs").mkdir()
    (page := tmp_path / "docs" / "kv.md").write_text("before\n<!-- evidence -->\n<!-- /evidence -->\nafter\n")
    row = own.Row(
        method="full", task="needle-single", question="unseen", keep_asked=1.0, keep_got=1.0, bytes_full=8.0,
        bytes_kept=8.0, quality=1.0, loyalty=1.0, n=1, prefill_s=2.0, compress_s=0.5, decode_ms=1.0, seed=0,
        tokens=2000, model="default",
    )  # fmt: skip
    found = {0: row, 1: replace(row, quality=0.5, n=3, prefill_s=9.0, seed=1)}
    asked: list[int] = []

    def compare(*args: Any, seed: int, timed: bool, **settings: Any) -> SimpleNamespace:
        asked.append(seed)
        assert timed is (seed == 0)
        if asked == [0, 1]:
            raise KeyboardInterrupt
        return SimpleNamespace(rows=[found[seed]])

    monkeypatch.setattr(own, "ROOT", tmp_path)
    monkeypatch.setattr(own, "RESULTS", tmp_path / "results" / "kv.json")
    monkeypatch.setattr(own, "plan", lambda: [own.Unit("needle-single", 2000, 2 * seed + 1, seed) for seed in (0, 1)])
    monkeypatch.setattr(own, "compare", compare)
    monkeypatch.setattr(own.models, "load", lambda name, say: (None, None))
    monkeypatch.setattr(own.environment, "hardware", lambda: {"cpu": f"the one of call {len(asked)}"})
    monkeypatch.setattr(sys, "argv", ["evidence.py"])
    with pytest.raises(KeyboardInterrupt):
        own.main()
    assert held(own.RESULTS)["units"] == ["needle-single 2000 1 0"]
    own.main()
    record = held(own.RESULTS)
    assert asked == [0, 1, 1] and record["units"] == ["needle-single 2000 1 0", "needle-single 2000 3 1"]
    assert record["hardware"] == {"cpu": "the one of call 1"}
    assert record["rows"] == [replace(row, n=4, quality=(1 + 3 * 0.5) / 4).to_dict()]
    assert "n = 4" in part_of(page.read_text(), "evidence") and page.read_text().endswith("after\n")


def test_as_many_found_as_by_random_tokens_is_not_worse_by_the_last_digit() -> None:
    own = script("evidence")
    rows = [own.Row(**row) for row in held(own.RESULTS)["rows"]]
    rows = [row for row in rows if (row.task, row.tokens, row.question) == ("needle-single", 1000, "unseen")]
    random = next(row for row in rows if (row.method, row.keep_asked) == ("random", 0.5))
    same = replace(random, method="knorm", quality=0.26 - 5e-17)
    assert own.losers([replace(random, quality=0.26), same]).endswith("same keep: none.")
    assert "knorm at 0.5 unseen (random)" in own.losers([replace(random, quality=0.26), replace(same, quality=0.24)])
