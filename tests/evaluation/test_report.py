"""The report: what it says must follow from the rows, and the page must not ask the network for anything."""

import io
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import pytest
from matplotlib import rcParams
from rich.console import Console

from fewer_eval.report import (
    kept_picture,
    picture,
    read_jsonl,
    summary,
    svg_file,
    table,
    write_html,
    write_jsonl,
)
from fewer_eval.schema import Question, Row, RunInfo

FULL_BYTES = 46.1e6
# method: loyalty to the full model, quality at keep 0.5, quality at keep 0.25
METHODS = {
    "random": (0.30, 0.42, 0.18),
    "snapkv": (0.55, 0.61, 0.08),
    "adakv": (0.60, 0.70, 0.46),
    "knorm": (0.50, 0.83, 0.39),
}


def row(method: str, task: str, question: Question, keep: float | int | str, quality: float) -> Row:
    share = keep if isinstance(keep, float) else 0.5
    text = question == "none"
    return Row(
        method=method, task=task, question=question, keep_asked=keep, keep_got=share,
        bytes_full=FULL_BYTES, bytes_kept=FULL_BYTES * share * (1.03 if method == "adakv" else 1.0),
        quality=quality, loyalty=0.99 if method == "full" else METHODS.get(method, (0.4, 0, 0))[0],
        n=20, prefill_s=1.913, compress_s=0.0 if method == "full" else 0.214, decode_ms=41.7 - 9 * (1 - share),
        seed=7, tokens=2000, model="SmolLM2-135M-Instruct",
        kl_bits=(1 - quality) * 1.4 if text else None, bpb_diff=(1 - quality) * 0.21 if text else None,
    )  # fmt: skip


def line(method: str, keep: float | int | str, quality: float) -> list[Row]:
    """One method at one budget: two tasks, each with the question unseen and seen, and running text."""
    hard = max(quality - 0.06, 0.0)
    seen = min(quality + 0.5 * (1 - quality), 1.0)
    return [
        row(method, "needle", "unseen", keep, quality),
        row(method, "needle", "seen", keep, seen),
        row(method, "variables", "unseen", keep, hard),
        row(method, "variables", "seen", keep, max(seen - 0.04, 0.0)),
        row(method, "running text", "none", keep, 1.0 if method == "full" else 0.3 + 0.6 * quality),
    ]


def make_rows(methods: dict[str, tuple[float, float, float]] = METHODS) -> list[Row]:
    rows = line("full", 1.0, 0.98)
    for name, (_, half, quarter) in methods.items():
        rows += line(name, 0.5, half) + line(name, 0.25, quarter)
    return rows


def make_info() -> RunInfo:
    def heads(method: str, keep: float, layer: int) -> list[int]:
        even = round(2000 * keep)
        return [even - 260 + 11 * layer, even, even + 260 - 11 * layer] if method == "adakv" else [even] * 3

    kept = {
        f"{method} @ {keep}": [heads(method, keep, layer) for layer in range(30)]
        for method in METHODS
        for keep in (0.5, 0.25)
    }
    return RunInfo(
        model="SmolLM2-135M-Instruct",
        command="fewer eval --methods random,snapkv,adakv,knorm --keep 0.5 --keep 0.25 --seed 7",
        date="2026-11-21",
        seed=7,
        tokens=2000,
        samples=20,
        hardware={"cpu": "Example CPU 9000", "cores": "2", "memory": "8.0 GiB", "accelerator": "none"},
        versions={"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "fewer": "0.1.0"},
        kept=kept,
        notes=("snapkv @ 0.25: layer 0 was left alone",),
    )


def terminal(rows: list[Row]) -> str:
    console = Console(width=300, file=io.StringIO())
    with console.capture() as capture:
        console.print(table(rows))
    return capture.get()


def every_line(rows: list[Row]) -> list[list[str]]:
    """The table's cells as they are printed, without the header."""
    lines = [text for text in terminal(rows).splitlines() if text.startswith("│")]
    return [[cell.strip() for cell in text.strip("│").split("│")] for text in lines]


def cells(rows: list[Row], method: str) -> list[str]:
    return next(shown for shown in every_line(rows) if shown[0] == method)


class Page(HTMLParser):
    """Collects the tags, the visible text and every place where a page can name another one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.links = re.findall(r"url\(\s*['\"]?([^'\")]*)", text) + re.findall(r"@import\s+(\S+)", text)
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data", "action")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data

    def outside(self) -> list[str]:
        return [link for link in self.links if not link.startswith(("#", "data:"))]


def render(tmp_path: Path, rows: list[Row], info: RunInfo) -> Page:
    write_html(tmp_path / "report.html", rows, info)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_jsonl_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.jsonl"
    rows, info = make_rows() + line("knorm", 256, 0.5) + line("knorm", "64MB", 0.5), make_info()
    write_jsonl(path, rows, info)
    assert read_jsonl(path) == (rows, info)
    assert [file.name for file in path.parent.iterdir()] == ["run.jsonl"]


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (lambda lines: [*lines[:-1], lines[-1][:40]], "line 46:"),
        (lambda lines: lines[:-1], "line 45: the file ends after 44 rows, 45 were due"),
        (lambda lines: lines[1:], "line 1:"),
        (lambda lines: [*lines, lines[0]], "line 47:"),
        (lambda lines: [lines[0], '{"kind": "row", "method": "knorm"}'], "line 2:"),
        (lambda lines: [lines[0], lines[1].replace('"quality": 0.98', '"quality": 1.98')], "line 2:"),
        (lambda lines: ["name,value", "knorm,1"], "line 1:"),
        (lambda lines: ["[1, 2]"], "line 1:"),
        (lambda lines: [], "line 0:"),
    ],
    ids=["cut in a line", "cut between lines", "no run", "two runs", "bare row", "bad value", "csv", "array", "empty"],
)
def test_a_truncated_or_foreign_file_names_the_file_and_the_line(
    tmp_path: Path, spoil: Callable[[list[str]], list[str]], where: str
) -> None:
    path = tmp_path / "run.jsonl"
    write_jsonl(path, make_rows(), make_info())
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(spoil(lines)), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{path}, {where}")):
        read_jsonl(path)


def test_an_empty_evaluation_is_an_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report"
    path.write_text("old", encoding="utf-8")
    for write in (write_html, write_jsonl):
        with pytest.raises(ValueError, match="empty evaluation"):
            write(path, [], make_info())
    for read in (table, picture, summary):
        with pytest.raises(ValueError, match="empty evaluation"):
            read([])
    assert path.read_text(encoding="utf-8") == "old"


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.svg"
    path.write_text("old", encoding="utf-8")

    def full_disk(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        svg_file(path, make_rows())
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_not_a_number_is_refused_in_json_and_a_dash_in_the_table(tmp_path: Path) -> None:
    rows = [replace(make_rows()[0], decode_ms=float("nan"))]
    with pytest.raises(ValueError, match=r"line 2: .*'full'.*nan"):
        write_jsonl(tmp_path / "run.jsonl", rows, make_info())
    assert "nan" not in terminal(rows)


def test_two_models_do_not_share_a_report() -> None:
    with pytest.raises(ValueError, match="one model"):
        table([*make_rows(), replace(make_rows()[0], model="another")])


def test_the_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    page = render(tmp_path, make_rows(), make_info())
    assert page.links
    assert page.outside() == []
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(page.tags)


def test_the_check_for_outside_references_finds_planted_ones() -> None:
    planted = [
        '<img src="http://a.example/x.png">',
        '<a href="https://a.example">x</a>',
        "<style>@import 'x.css';</style>",
        "<p style=\"background: url('//a.example/x')\">",
        '<svg><use xlink:href="other.svg#a"/></svg>',
    ]
    assert all(Page(text).outside() for text in planted)
    assert not Page(
        '<svg xmlns="http://www.w3.org/2000/svg"><use xlink:href="#a" clip-path="url(#b)"/></svg>'
    ).outside()


def test_the_page_names_methods_hardware_and_command(tmp_path: Path) -> None:
    info = make_info()
    text = render(tmp_path, make_rows(), info).text
    for expected in ("full", *METHODS, *info.hardware.values(), *info.versions.values(), info.command, *info.notes):
        assert expected in text
    assert summary(make_rows()) in text


def test_no_id_is_used_twice(tmp_path: Path) -> None:
    ids = [value for name, value in render(tmp_path, make_rows(), make_info()).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_tables_have_a_caption_and_scoped_headers(tmp_path: Path) -> None:
    page = render(tmp_path, make_rows(), make_info())
    assert page.tags.count("table") == page.tags.count("caption") == 5
    assert page.tags.count("th") == sum(name == "scope" for name, _ in page.attributes)


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><b onclick="x">', "a$b$^{", "_hidden", "[bold]x"])
def test_a_hostile_name_is_shown_as_it_is(tmp_path: Path, name: str) -> None:
    rows = make_rows() + line(name, 0.5, 0.3)
    info = replace(make_info(), command=name, kept={f"{name} @ 0.5": [[1, 2]]})
    page = render(tmp_path, rows, info)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert name in page.text
    assert name in Page(picture(rows)).text
    assert name in Page(kept_picture(info.kept)).text
    assert name in terminal(rows)


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    rows = [row("full", "needle", "unseen", 1.0, 0.9), row("knorm", "needle", "unseen", 0.5, 0.8)]
    assert cells(rows, "knorm")[5] == "–"
    assert cells(rows, "knorm")[7:9] == ["–", "–"]
    assert cells(rows, "full")[4] == "0.900"
    page = render(tmp_path, rows, replace(make_info(), kept={}))
    assert "0.800" in page.text
    assert "Quality, question seen" not in page.text


def test_a_mean_that_misses_a_task_is_a_dash_and_does_not_win() -> None:
    rows = [*make_rows(), row("easy", "needle", "unseen", 0.5, 1.0)]
    assert cells(rows, "easy")[4] == "–"
    assert "easy" not in summary(rows)


def test_means_are_over_tasks_and_show_kept_bytes() -> None:
    shown = cells(make_rows(), "knorm")
    assert shown[:5] == ["knorm", "0.5", "0.500", "23.1 / 46.1", "0.800"]
    assert shown[-1] == "20"


def test_full_comes_first_then_each_budget_by_unseen_quality() -> None:
    rows = make_rows() + line("knorm", 64, 0.02)
    order = [tuple(shown[:2]) for shown in every_line(list(reversed(rows)))]
    assert order == [
        ("full", "1.0"),
        *((name, "0.5") for name in ("knorm", "adakv", "snapkv", "random")),
        ("knorm", "64 tokens"),
        *((name, "0.25") for name in ("adakv", "knorm", "random", "snapkv")),
    ]


def test_the_summary_names_the_best_and_who_loses_to_random() -> None:
    assert summary(make_rows()) == (
        "With the question unseen, the best mean quality is 0.800 at keep 0.5 (knorm), 0.430 at keep 0.25 (adakv); "
        "the full cache scores 0.950. Worse than random selection: snapkv 0.050 at keep 0.25 (random 0.150)."
    )


def test_the_summary_names_nobody_when_nobody_loses() -> None:
    rows = make_rows(METHODS | {"snapkv": (0.5, 0.61, 0.18)})
    assert summary(rows).endswith("No method falls below random selection.")


def test_as_good_as_random_is_not_worse_by_the_last_digit() -> None:
    def two(method: str, needle: float, variables: float) -> list[Row]:
        return [row(method, "needle", "unseen", 0.5, needle), row(method, "variables", "unseen", 0.5, variables)]

    rows = [*two("random", 0.2, 0.4), *two("snapkv", 0.1, 0.5), *two("adakv", 0.4, 0.2)]
    assert fmean([0.1, 0.5]) < fmean([0.2, 0.4])
    assert summary(rows).endswith("0.300 at keep 0.5 (adakv, snapkv). No method falls below random selection.")
    assert "Worse than random" in summary([*two("random", 0.2, 0.4), *two("snapkv", 0.1, 0.49)])


def test_the_summary_says_what_it_cannot_know() -> None:
    rows = make_rows()
    without = [r for r in rows if r.method != "random"]
    assert "Random selection was not measured" in summary(without)
    half = [r for r in rows if r.method != "random" or r.keep_asked == 0.5]
    assert "random selection was not measured at keep 0.25" in summary(half)
    text = [r for r in rows if r.question == "none"]
    assert "question unseen was not measured" in summary(text)


def test_the_page_marks_losers(tmp_path: Path) -> None:
    marked = render(tmp_path, make_rows(), make_info())
    assert [value for name, value in marked.attributes if name == "class"].count("flag") == 1
    assert "snapkv below random" in marked.text
    fair = make_rows(METHODS | {"snapkv": (0.5, 0.61, 0.2)})
    assert ("class", "flag") not in render(tmp_path, fair, make_info()).attributes


def test_pictures_are_the_same_every_time_and_in_any_row_order() -> None:
    rows, kept = make_rows(), make_info().kept
    assert picture(rows) == picture(rows) == picture(list(reversed(rows)))
    assert kept_picture(kept) == kept_picture(kept)


def test_the_picture_has_a_panel_for_each_thing_measured() -> None:
    rows = make_rows()
    everything = Page(picture(rows)).text
    assert all(title in everything for title in ("question unseen", "question seen", "KL on running text"))
    unseen = Page(picture([r for r in rows if r.question == "unseen"])).text
    assert "question seen" not in unseen
    assert "KL" not in unseen
    with pytest.raises(ValueError, match="nothing to draw"):
        picture([replace(r, kl_bits=None) for r in rows if r.question == "none"])


def test_the_picture_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    before = dict(rcParams)
    svg_file(tmp_path / "docs" / "picture.svg", make_rows())
    assert dict(rcParams) == before
    assert (tmp_path / "docs" / "picture.svg").read_text(encoding="utf-8") == picture(make_rows())


def test_the_kept_picture_takes_odd_names_and_many_entries() -> None:
    kept = {f"m{i} @ {keep}": [[i, i + 3]] * (i + 1) for i in range(6) for keep in (1, 2, 3, 4, 5, 6)}
    assert "m5" in Page(kept_picture(kept | {"plain": [[1]]})).text
    with pytest.raises(ValueError, match="nothing to draw"):
        kept_picture({})
