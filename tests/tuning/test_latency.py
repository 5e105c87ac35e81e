"""The table of latencies: a fake clock says what it must hold; nothing here depends on how fast a machine is."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewer import cost, latency
from fewer.cost import Decoder
from fewer.latency import Staircase
from fewer.types import FewerError, FewerWarning, UnsupportedModel
from tests import vlms
from tests.tiny import tiny
from tests.unit.test_types import unchecked

SIZES = Decoder(layers=2, heads=2, kv_heads=1, head_dim=4, parameters=1000, itemsize=4)
TABLE = Staircase((10, 20, 40, 80), (1.0, 1.0, 3.0, 7.0), (0.1, 0.3, 0.2, 0.5), SIZES)


def ticking(*took: float) -> Callable[[], float]:
    """A clock by which one call after the other takes so long."""
    now, steps = [0.0], iter([x for one in took for x in (0.0, one)])

    def clock() -> float:
        now[0] += next(steps)
        return now[0]

    return clock


def test_the_median_counts_and_the_first_run_does_not() -> None:
    told: list[tuple[str, float]] = []
    clock = ticking(99, 1, 5, 2, 88, 0.1, 0.3, 0.2, 99, 4, 4, 9, 77, 0.5, 0.4, 0.6)
    table = Staircase.measure(
        tiny("llama"), (8, 16), 3, clock=clock, tick=lambda what, share: told.append((what, share))
    )
    assert table.lengths == (8, 16)
    assert table.prefills == pytest.approx((2, 4)) and table.decodes == pytest.approx((0.2, 0.5))
    assert told == [("8 tokens", 0.0), ("16 tokens", 0.5), ("done", 1.0)]


def test_what_is_timed_is_a_prompt_and_a_step_on_its_cache() -> None:
    model, seen = tiny("llama"), []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        past = kwargs.get("past_key_values")
        seen.append((kwargs["input_ids"].shape[1], 0 if past is None else past.get_seq_length()))

    with_hook = model.register_forward_pre_hook(note, with_kwargs=True)
    Staircase.measure(model, (8, 16), 1)
    with_hook.remove()
    assert seen == [(8, 0), (8, 0), (1, 8), (1, 9), (16, 0), (16, 0), (1, 16), (1, 17)]


def test_flat_below_straight_between_and_never_falling() -> None:
    assert TABLE.prefill(0) == TABLE.prefill(10) == TABLE.prefill(15) == 1.0, "one step"
    assert TABLE.prefill(30) == 2.0 and TABLE.prefill(40) == 3.0 and TABLE.prefill(60) == 5.0
    assert TABLE.decode(30) == TABLE.decode(40) == 0.3, "40 tokens were measured as faster than 20, which is noise"
    for of in (TABLE.prefill, TABLE.decode):
        times = [of(n / 2) for n in range(160)]
        assert times == sorted(times)


def test_beyond_the_longest_by_flops_and_bytes_and_with_a_warning() -> None:
    with pytest.warns(FewerWarning, match="beyond the 80"):
        assert TABLE.prefill(160) == pytest.approx(7.0 * SIZES.prefill_flops(160) / SIZES.prefill_flops(80))
    with pytest.warns(FewerWarning, match="beyond the 80"):
        longer = TABLE.decode(800)
    assert longer == pytest.approx(0.5 * (4000 + 800 * 64) / (4000 + 80 * 64)), "64 bytes a token, 4000 of weights"


def test_a_cost_is_the_prompt_of_its_flops_and_the_cache_of_its_bytes() -> None:
    model = tiny("llama")
    sizes = Decoder.of(model)
    table = Staircase((10, 1000), (1.0, 100.0), (0.01, 1.0), sizes)
    full = cost.of(model, "full", tokens=500)
    assert table.seconds(full) == table.prefill(500)
    assert table.seconds(full, 7) == pytest.approx(table.prefill(500) + 7 * table.decode(500))
    short = cost.of(model, "truncation", 0.2, tokens=500)
    assert table.seconds(short, 7) == pytest.approx(table.prefill(100) + 7 * table.decode(100))
    half = cost.of(model, "knorm", 0.5, tokens=500)
    assert table.seconds(half) == table.prefill(500), "a cache that is cut after it was read"
    held = 250 * (32 * 4 + 4) / (32 * 4)  # positions are read as well
    assert table.seconds(half, 7) == pytest.approx(table.prefill(500) + 7 * table.decode(held))
    twice = cost.of(model, "full", tokens=200, rows=2)
    assert table.seconds(twice, 1) == pytest.approx(2 * table.prefill(200) + table.decode(400))
    more = table.seconds(cost.of(model, "h2o", 0.5, tokens=500))
    assert more > table.prefill(500), "what choosing takes is in it"


def test_a_prompt_with_fewer_visual_tokens_takes_less() -> None:
    model = vlms.llava().model
    table = Staircase((1, 1000), (1.0, 1000.0), (1.0, 2.0), Decoder.of(model))
    full, some = (cost.of(model, ["random"], keep, tokens=45, visual=(36,)) for keep in (1.0, 9))
    assert table.seconds(full) == table.prefill(45) == 45.0
    assert 17 <= table.seconds(some) <= 19, "18 tokens are left before the first layer"


def test_a_cost_of_something_else_is_refused() -> None:
    other = cost.of(tiny("llama", num_hidden_layers=1), "full", tokens=50)
    for wrong in (other, replace(other, family="vit")):
        with pytest.raises(FewerError, match="not of the decoder that was timed"):
            Staircase((10,), (1.0,), (1.0,), Decoder.of(tiny("llama"))).seconds(wrong)
    with pytest.raises(FewerError, match="new_tokens=-1"):
        Staircase((10,), (1.0,), (1.0,), Decoder.of(tiny("llama", num_hidden_layers=1))).seconds(other, -1)


def test_numbers_of_a_real_model_are_positive() -> None:
    table = Staircase.measure(tiny("llama"), (8, 16), 1)
    assert min(*table.prefills, *table.decodes) > 0 and dict(table.hardware)["accelerator"] == "cpu"
    assert dict(table.versions)["torch"] == torch.__version__ and len(table.model) == 64


# --- files ---


def test_a_table_comes_back_as_it_was(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "table.json"
    table = Staircase.measure(model, (8, 16), 1)
    table.save(path)
    assert Staircase.load(path, model) == Staircase.load(path) == table
    table.save(path)  # what was there is replaced
    assert [one.name for one in tmp_path.iterdir()] == ["table.json"]


def test_a_table_of_another_model_or_machine_is_refused(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "table.json"
    table = Staircase.measure(model, (8,), 1)
    table.save(path)
    with pytest.raises(FewerError, match="another model"):
        Staircase.load(path, tiny("llama", num_hidden_layers=2))
    elsewhere = tuple((name, "other" if name == "processor" else value) for name, value in table.hardware)
    replace(table, hardware=elsewhere).save(path)
    with pytest.raises(FewerError, match=r"elsewhere.*processor: other"):
        Staircase.load(path, model)
    assert Staircase.load(path, model, anywhere=True).prefills == table.prefills


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text[: len(text) // 2], "no latency table"),
        (lambda text: "[]", "no latency table"),
        (lambda text: text.replace("fewer-latency", "other"), "no latency table"),
        (lambda text: text.replace('"version": 1,', '"version": 9,'), "format version 9"),
        (lambda text: text.replace("7.0", "0.7"), "damaged"),
        (lambda text: text.replace('"table"', '"tables"'), "damaged"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, change: Callable[[str], str], says: str) -> None:
    path = tmp_path / "table.json"
    TABLE.save(path)
    assert json.loads(path.read_text())["table"]["prefills"] == [1.0, 1.0, 3.0, 7.0]
    path.write_text(change(path.read_text()))
    with pytest.raises(FewerError, match=says):
        Staircase.load(path)


def test_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(FewerError, match="cannot be read"):
        Staircase.load(tmp_path / "none.json")
    with pytest.raises(FewerError, match="cannot be written"):
        TABLE.save(tmp_path / "none" / "table.json")


# --- bad input ---


@pytest.mark.parametrize("lengths", [(), (0, 5), (5, 5), (9, 5), (True, 5)])
def test_lengths_that_cannot_be(lengths: Any) -> None:
    with pytest.raises(FewerError, match="lengths="):
        Staircase.measure(tiny("llama"), lengths)


@pytest.mark.parametrize("change", [{"lengths": 5}, {"lengths": {8: 9}}, {"repeats": 1.5}])
def test_what_is_no_whole_number(change: dict[str, Any]) -> None:
    with pytest.raises(FewerError, match=f"{next(iter(change))}="):
        unchecked(latency).Staircase.measure(tiny("llama"), **{"lengths": (8,), **change})


def test_other_bad_input() -> None:
    model = tiny("llama")
    with pytest.raises(FewerError, match="repeats=0"):
        Staircase.measure(model, (8,), 0)
    with pytest.raises(FewerError, match="positions for 2048"):
        Staircase.measure(model, (2048,))
    with pytest.raises(FewerError, match=r"model\.eval"):
        Staircase.measure(tiny("llama").train(), (8,))
    with pytest.raises(UnsupportedModel):
        Staircase.measure(torch.nn.Linear(2, 2), (8,))
    for times in ((1.0,), (1.0, -1.0), (1.0, float("nan"))):
        with pytest.raises(FewerError, match="prefills="):
            Staircase((8, 16), times, (1.0, 1.0), SIZES)
    for tokens in (-1, float("nan"), float("inf")):
        with pytest.raises(FewerError, match="no number of tokens"):
            TABLE.prefill(tokens)
