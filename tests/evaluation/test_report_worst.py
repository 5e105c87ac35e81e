"""The examples on which a method lost most: kept by the comparison, in its file, and side by side on its page."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fewer_eval.report import read_jsonl, write_html, write_jsonl
from fewer_eval.runner import compare
from fewer_eval.schema import RunInfo
from fewer_eval.sides import CHARACTERS, WORST, cut, sides, worst_of
from fewer_eval.tasks import Example, Task
from tests.evaluation.searched import SCRIPT, make_worst
from tests.evaluation.test_report import Page, make_info, make_rows
from tests.evaluation.test_report_tuned import apart
from tests.front.tiny_files import save
from tests.tiny import tiny


def render(tmp_path: Path, info: RunInfo) -> Page:
    write_html(tmp_path / "report.html", make_rows(), info)
    return apart(tmp_path / "report.html")


def test_what_differs_is_marked_and_the_rest_is_whole() -> None:
    full, said = sides("It is 8413, <b>surely</b>.", "It was 8413, surely")
    assert full == "It <del>is</del> 8413, <del>&lt;b&gt;</del>surely<del>&lt;/b&gt;.</del>"
    assert said == "It <mark>was</mark> 8413, surely"
    assert sides("same", "same") == ("same", "same")
    assert sides("", "new") == ("", "<mark>new</mark>")


@pytest.mark.parametrize(("full", "said"), [("a b  c\n<d>", "a x c & <d> d"), ("", ""), ("né 👩‍👩‍👧", "e\u0301 &amp;")])
def test_both_texts_can_be_read_back_from_their_sides(full: str, said: str) -> None:
    assert tuple(Page(str(side)).text for side in sides(full, said)) == (full, said)


def test_the_worst_are_few_come_first_and_lost_something() -> None:
    (one, *_), *_ = make_worst().values()
    kept = []
    for lost in (0.1, 0.0, 0.5, -0.5, 0.2, 0.5, 0.05):
        kept = worst_of(kept, replace(one, lost=lost, said=str(lost)))
    assert [example.lost for example in kept] == [0.5, 0.5, 0.2]
    assert len(kept) == WORST


def test_long_texts_are_cut() -> None:
    assert cut("x" * CHARACTERS) == "x" * CHARACTERS
    assert cut(" " + "x" * (CHARACTERS + 1)) == "x" * (CHARACTERS - 1) + "…"


def test_a_comparison_keeps_the_examples_on_which_something_was_lost(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save(tmp_path))
    model = tiny("llama", vocab_size=257, eos_token_id=256, pad_token_id=256)
    examples = [Example("abcdefg " * 20 + str(i), f"Which {i}?" + "?" * 400, ("a", "b")) for i in range(5)]
    told: list[tuple[str, str]] = []

    class Graded(Task):
        """Whatever is graded first on an example, the full model's answer, is right; the third is half right."""

        def grade(self, prediction: str, example: Example) -> float:
            told.append((example.question, prediction))
            return {1: 1.0, 3: 0.5}.get(sum(question == example.question for question, _ in told), 0.0)

    task = Graded("graded", "by turns", 6, lambda tokenizer, tokens, n, seed: examples[:n])
    done = compare(
        model, tokenizer, [task], ["knorm"], [0.5], tokens=100, samples=5, questions=("unseen",), timed=False
    )
    assert list(done.worst) == ["knorm @ 0.5", "random @ 0.5", "uniform @ 0.5"]
    assert [[one.lost for one in examples] for examples in done.worst.values()] == [[1.0] * 3, [0.5] * 3, [1.0] * 3]
    one = done.worst["knorm @ 0.5"][0]
    assert (one.task, one.asked, one.expected, one.quality) == ("graded", "unseen", "a, b", 0.0)
    assert one.question == cut(told[0][0])
    assert (one.full, one.said) == (cut(told[0][1]), cut(told[1][1]))


def test_they_are_in_the_file_and_a_file_without_them_is_read(tmp_path: Path) -> None:
    path, info = tmp_path / "run.jsonl", replace(make_info(), worst=make_worst())
    write_jsonl(path, make_rows(), info)
    assert read_jsonl(path) == (make_rows(), info)
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    older = {name: value for name, value in json.loads(first).items() if name != "worst"}
    path.write_text("\n".join([json.dumps(older), *rest]), encoding="utf-8")
    assert read_jsonl(path)[1] == make_info()
    path.write_text("\n".join([json.dumps({**older, "worst": {"a": [{"task": "t"}]}}), *rest]), encoding="utf-8")
    with pytest.raises(ValueError, match="line 1"):
        read_jsonl(path)


def test_the_page_shows_them_side_by_side_as_text(tmp_path: Path) -> None:
    page = render(tmp_path, replace(make_info(), worst=make_worst()))
    text = " ".join(page.text.split())
    assert "Where most was lost" in text
    assert "needle · question unseen · expected: 8413 · quality 0.00, the full model 1.00" in text
    assert page.text.count(SCRIPT) == 3
    assert "script" not in page.tags
    assert page.outside() == []
    assert page.tags.count("article") == 3
    assert "No example with a worse answer: adakv @ 0.5." in text
    assert "Where most was lost" not in render(tmp_path, make_info()).text


def test_the_page_has_a_map_of_the_heads_where_they_differ(tmp_path: Path) -> None:
    page = render(tmp_path, make_info())
    assert page.tags.count("image") == 3  # two maps and their scale
    assert "adakv @ 0.25, 2 760 749 738" in " ".join(page.text.split())
    assert "so not drawn: random @ 0.5, random @ 0.25, snapkv @ 0.5" in " ".join(page.text.split())
    flat = render(tmp_path, replace(make_info(), kept={"knorm @ 0.5": [[5, 5]]}))
    assert "image" not in flat.tags
    assert "No method here gives one layer or head more than another." in flat.text
