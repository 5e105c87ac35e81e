"""The report of a search: the promise first, every number from what was measured, and nothing asked of the network."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fewer.tuning.result import Measured, Tuned
from fewer.tuning.setting import Held, Setting
from fewer_eval.frontier import cost_of, frontier_picture, pareto, passed
from fewer_eval.heat import heat_picture
from fewer_eval.report import tuned_table, write_tuned
from tests.evaluation.searched import CHOSEN, SCRIPT, make_tuned, measured
from tests.evaluation.test_report import Page

WHY = "60 examples are too few: a loss of 0.02 at confidence 0.95 takes at least 149."
NOTHING = {"chosen": None, "why": WHY, "searched": (), "sequence": (), "held": None, "budgets": (), "worst": ()}


def apart(path: Path) -> Page:
    """The page, with a space after each cell, as its text is seen."""
    text = path.read_text(encoding="utf-8")
    return Page(text.replace("</td>", " </td>").replace("</th>", " </th>").replace("</dt>", " </dt>"))


def render(tmp_path: Path, tuned: Tuned) -> Page:
    write_tuned(tmp_path / "tuned.html", tuned)
    return apart(tmp_path / "tuned.html")


def words(page: Page) -> str:
    """The text, with one space between words and cells."""
    return " ".join(page.text.split())


def terminal(tuned: Tuned) -> list[list[str]]:
    console = Console(width=300, file=io.StringIO())
    with console.capture() as capture:
        console.print(tuned_table(tuned))
    lines = [text for text in capture.get().splitlines() if text.startswith("│")]
    return [[cell.strip() for cell in text.strip("│").split("│")] for text in lines]


def point(keep: float, loss: float, seconds: float | None = 1.0) -> Measured:
    return Measured(Setting(None, Held("knorm", keep)), 10, loss, keep * 1e6, 100.0, seconds)


def test_the_frontier_by_hand() -> None:
    cheap, better, beaten, same, best = (
        point(0.1, 0.5),
        point(0.2, 0.3),
        point(0.3, 0.4),
        point(0.4, 0.3),
        point(0.5, 0.0),
    )
    assert pareto([best, same, beaten, better, cheap], "memory") == [cheap, better, best]
    assert pareto([best, same, beaten, better, cheap], "tokens") == [best]  # all read the same


def test_the_frontier_is_what_nothing_dominates() -> None:
    found = make_tuned().searched

    def beaten(one: Measured) -> bool:
        return any(
            (o.bytes <= one.bytes and o.loss < one.loss) or (o.bytes < one.bytes and o.loss <= one.loss) for o in found
        )

    front = [(one.bytes, one.loss) for one in pareto(found, "memory")]
    assert front == sorted({(one.bytes, one.loss) for one in found if not beaten(one)})


def test_costs_have_units_and_what_was_not_timed_has_none() -> None:
    one = point(0.5, 0.1, seconds=0.25)
    assert [cost_of(one, aim) for aim in ("memory", "tokens", "latency")] == [0.5, 100, 250]
    untimed = point(0.5, 0.1, seconds=None)
    assert cost_of(untimed, "latency") is None
    assert pareto([untimed], "latency") == []
    with pytest.raises(ValueError, match="nothing to draw"):
        frontier_picture(make_tuned(aim="latency", searched=(untimed,), sequence=()))


def test_who_passed_is_counted_up_to_the_first_that_did_not() -> None:
    tuned = make_tuned()
    assert passed(tuned) == 3
    late = measured(Setting(None, Held("knorm", 0.9)), 0.9, 0.0, p=0.001)
    assert passed(replace(tuned, sequence=(*tuned.sequence, late))) == 3
    given_up = replace(tuned.sequence[1], p=None)
    assert passed(replace(tuned, sequence=(tuned.sequence[0], given_up))) == 1
    edge = replace(tuned.sequence[0], p=0.05)  # 1 - 0.95 is a little more than 0.05 in binary
    assert passed(replace(tuned, sequence=(edge,))) == 1


def test_the_page_says_the_promise_first_and_how_to_make_it_again(tmp_path: Path) -> None:
    tuned, page = make_tuned(), render(tmp_path, make_tuned())
    text = words(page)
    assert tuned.promise in text
    assert text.index(tuned.promise) < text.index("What was found")
    for expected in (tuned.command, *tuned.hardware.values(), *tuned.versions.values(), *tuned.notes, "812 s"):
        assert expected in text
    for part, count in tuned.parts.items():
        assert f"{part} examples {count}" in text
    assert 'held.method = "adakv" held.keep = 0.25' in text
    assert "cache, MB 46.10 11.53 4.00" in text


def test_the_page_shows_the_tests_in_their_order_with_their_results(tmp_path: Path) -> None:
    text = words(render(tmp_path, make_tuned()))
    assert "full model, on the search examples 0.0000 46.10 2000 2000.0 60 –" in text
    order = [
        "adakv @ 0.5 0.0000 23.05 2000 1550.0 400 0.0003 passed",
        "adakv @ 0.35 0.0020 16.13 2000 1415.0 400 0.0040 passed",
        "adakv @ 0.25 0.0061 11.53 2000 1325.0 400 0.0310 chosen",
        "adakv @ 0.15 0.0410 6.92 2000 1235.0 400 1.0000 failed",
        "adakv @ 0.25 0.0105 11.53 2000 1325.0 200 – held out",
    ]
    places = [text.index(line) for line in order]
    assert places == sorted(places)


def test_tasks_budgets_and_worst_examples(tmp_path: Path) -> None:
    tuned = make_tuned()
    page = render(tmp_path, tuned)
    text = words(page)
    assert "adakv @ 0.25 calibration, chosen 0.0031 0.0092 0.0061" in text
    assert "adakv @ 0.25 held out 0.0053 0.0158 0.0105" in text
    assert " ".join(f"{heads[1]:.2f}" for heads in tuned.budgets) in text
    assert page.tags.count("image") == 2  # the map and its scale
    assert page.tags.count("del") == page.tags.count("mark") + 1 == 3  # with those that explain; one answer is empty
    assert "(nothing)" in text
    assert "from 0.310 to 0.125 bits a token" in text


def test_nothing_passed_is_said_and_the_page_stands(tmp_path: Path) -> None:
    page = render(tmp_path, make_tuned(**NOTHING))
    text = words(page)
    assert f"Do not compress: {WHY}" in text
    assert "No setting was tested." in text
    assert "svg" not in page.tags
    assert ("class", "summary refused") in page.attributes
    searched = {**NOTHING, "searched": make_tuned().searched, "sequence": make_tuned().sequence[-1:]}
    page = render(tmp_path, make_tuned(**searched))
    assert "svg" in page.tags
    assert "What is saved" not in words(page)
    assert terminal(make_tuned(**NOTHING)) == [
        ["search", "do not compress", "0.0000", "46.10", "2000", "2000.0", "60", "–", "full model"]
    ]


@pytest.mark.parametrize("aim", ["memory", "tokens", "latency"])
def test_the_table_has_the_frontier_then_the_tests(aim: str) -> None:
    tuned = make_tuned(aim=aim)
    lines = terminal(tuned)
    front = [str(one.setting) for one in pareto(tuned.searched, aim)]
    assert [line[1] for line in lines if line[-1] == "frontier"] == front
    assert [line[-1] for line in lines if line[0] == "calibration"] == ["passed", "passed", "chosen", "failed"]
    first = {"memory": "46.10", "tokens": "2000", "latency": "2000.0"}[aim]
    assert lines[0][3] == first  # what was aimed at stands first
    assert lines[-1][:3] == ["held out", str(CHOSEN), "0.0105"]


def test_what_was_not_timed_has_no_column(tmp_path: Path) -> None:
    tuned = make_tuned(
        full=replace(make_tuned().full, seconds=None), held=None,
        searched=tuple(replace(one, seconds=None) for one in make_tuned().searched),
        sequence=tuple(replace(one, seconds=None) for one in make_tuned().sequence),
    )  # fmt: skip
    assert "answer, ms" not in render(tmp_path, tuned).text
    assert len(terminal(tuned)[0]) == 8


def test_the_page_asks_nothing_of_the_network_and_shows_hostile_texts(tmp_path: Path) -> None:
    page = render(tmp_path, make_tuned(model=SCRIPT, command=SCRIPT, notes=(SCRIPT, "//evil.example/x.js")))
    assert page.links
    assert page.outside() == []
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(page.tags)
    assert page.text.count(SCRIPT) == 7  # title, head, two facts and notes, a question and its answer
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert page.tags.count("table") == page.tags.count("caption") == 5
    assert page.tags.count("th") == sum(name == "scope" for name, _ in page.attributes)


def test_pictures_are_the_same_every_time() -> None:
    tuned = make_tuned()
    assert frontier_picture(tuned) == frontier_picture(tuned)
    maps = {"chosen": tuned.budgets}
    assert heat_picture(maps, "share kept") == heat_picture(maps, "share kept")


def test_the_picture_names_what_it_draws() -> None:
    text = Page(frontier_picture(make_tuned())).text
    for expected in (
        "adakv",
        "other settings",
        "passed the test",
        "did not pass",
        "chosen",
        "full model",
        "asked: 0.02",
    ):
        assert expected in text
    bare = Page(frontier_picture(make_tuned(chosen=None, sequence=()))).text
    assert "chosen" not in bare
    assert "did not pass" not in bare
    hidden = measured(Setting(None, Held(("_odd$", "<b>"), 0.5)), 0.5, 0.0)
    assert "_odd$ + <b>" in Page(frontier_picture(make_tuned(searched=(hidden,)))).text


def test_a_heat_map_takes_layers_of_different_heads_and_no_others() -> None:
    text = Page(heat_picture({"a$b": [[1, 2], [3]], "<i>": [[0, 0]]}, "entries kept")).text
    assert "a$b" in text
    assert "<i>" in text
    assert "entries kept" in text
    for nothing in ({}, {"a": []}, {"a": [[]]}):
        with pytest.raises(ValueError, match="nothing to draw"):
            heat_picture(nothing, "entries kept")
