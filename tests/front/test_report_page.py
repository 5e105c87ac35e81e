"""Both reports in a headless Chromium without a network: clicked through, wide and narrow, light and dark."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fewer_eval.report import write_html, write_tuned
from tests.evaluation.searched import SCRIPT, make_tuned, make_worst
from tests.evaluation.test_report import make_info, make_rows
from tests.front.visit import Visit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reports")
    write_html(made / "compare.html", make_rows(), replace(make_info(), worst=make_worst()))
    write_tuned(made / "tune.html", make_tuned())
    return made


class Report(Visit):
    """A report in a browser that is offline."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        super().__init__(browser, path.as_uri(), offline=True, **options)

    def click_through(self) -> None:
        """Open what is closed, one after the other, each time checking that something comes to be seen."""
        for part in self.page.locator("details").all():
            inside = part.locator(":scope > :not(summary)").first
            assert not inside.is_visible()
            part.locator("summary").click()
            assert inside.is_visible()

    def seen(self) -> str:
        return " ".join(str(self.page.inner_text("body")).split())

    def leave(self) -> None:
        """Close it, and check that there were neither complaints nor requests but for the page itself."""
        super().leave()
        assert self.outside("file:") == []
        assert sum(url.startswith("file:") for url in self.asked) == 1


@pytest.fixture(params=[(1000, "light"), (390, "dark")], ids=["wide and light", "narrow and dark"])
def view(request: pytest.FixtureRequest) -> dict[str, Any]:
    width, scheme = request.param
    return {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}


@pytest.fixture
def compared(browser: Any, folder: Path, view: dict[str, Any]) -> Iterator[Report]:
    visit = Report(browser, folder / "compare.html", **view)
    yield visit
    visit.leave()


@pytest.fixture
def tuned(browser: Any, folder: Path, view: dict[str, Any]) -> Iterator[Report]:
    visit = Report(browser, folder / "tune.html", **view)
    yield visit
    visit.leave()


def whole(visit: Report) -> None:
    """The page is no wider than the window, and its pictures are there, every cell of the heat maps among them."""
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for picture in visit.page.locator("svg.fewer-picture").all():
        box = picture.bounding_box()
        assert min(box["width"], box["height"]) > 100
    loaded = "image => { const i = new Image(); i.src = image.href.baseVal; return i.decode().then(() => i.width) }"
    for image in visit.page.locator("svg.fewer-picture image").all():
        assert image.evaluate(loaded) > 0


def test_the_comparison_is_clicked_through(compared: Report) -> None:
    before = compared.seen()
    assert "Where most was lost" in before
    assert "The code is 8431." not in before
    compared.click_through()
    after = compared.seen()
    assert "The code is 8413." in after
    assert "The code is 8431." in after
    assert f"What is {SCRIPT}?" in after
    assert "adakv @ 0.5, 0" in after  # the heads as numbers
    assert compared.page.locator("mark", has_text="8431").count() == 2
    assert compared.page.locator("svg.fewer-picture image").count() == 3
    whole(compared)


def test_the_search_is_clicked_through(tuned: Report) -> None:
    before = tuned.seen()
    assert make_tuned().promise in before
    assert "held.keep" not in before
    assert "What does " + SCRIPT in before
    tuned.click_through()
    after = tuned.seen()
    assert 'held.method = "adakv" held.keep = 0.25' in after
    assert "expected @ 0.35" in after
    assert "failed" in after
    assert make_tuned().command in after
    assert tuned.page.locator("svg.fewer-picture image").count() == 2
    whole(tuned)


def test_the_two_answers_stand_side_by_side_and_on_a_phone_below_each_other(browser: Any, folder: Path) -> None:
    for width, beside in ((1000, True), (390, False)):
        visit = Report(browser, folder / "tune.html", viewport={"width": width, "height": 900})
        left, right = (one.bounding_box() for one in visit.page.locator(".pair").first.locator("> div").all())
        assert (left["y"] == right["y"]) is beside
        visit.leave()


def test_a_page_that_asks_for_something_or_complains_is_noticed(browser: Any, tmp_path: Path) -> None:
    for planted in ('<img src="https://a.example/x.png">', "<script>alert(1)</script>", "<script>nothing()</script>"):
        (tmp_path / "bad.html").write_text(f"<!doctype html><title>x</title>{planted}", encoding="utf-8")
        visit = Report(browser, tmp_path / "bad.html")
        visit.page.wait_for_load_state()
        with pytest.raises(AssertionError):
            visit.leave()
