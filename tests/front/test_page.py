"""The server's page in a headless Chromium, by keys alone. Skipped where there is no Chromium or no playwright."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.front.served import serving
from tests.front.visit import Visit

WORDS = "one two three four five six seven eight nine ten"
TEXT = f"Ünïcode 👩‍👩‍👧 first.\n{WORDS}\n<b>last</b> & done"


class Served(Visit):
    """The server's page, once its methods are there."""

    def __init__(self, browser: Any, origin: str, **options: Any) -> None:
        super().__init__(browser, origin + "/", **options)
        self.page.wait_for_selector("#method option", state="attached")

    def text(self, selector: str) -> str:
        return str(self.page.text_content(selector))

    def focused(self) -> str:
        return str(self.page.evaluate("document.activeElement.id"))

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def shown(self, what: str) -> str:
        """The error or the result, once it is there."""
        self.page.wait_for_selector(what, state="visible")
        return self.text(what)


@pytest.fixture
def visit(browser: Any) -> Iterator[Served]:
    with serving() as client:
        made = Served(browser, str(client.base_url))
        yield made
        assert made.outside(str(client.base_url)) == []
        made.leave()


def test_by_keys_alone_a_text_is_shortened_and_given_back(visit: Served) -> None:
    assert visit.focused() == "text"
    visit.page.keyboard.insert_text(TEXT)  # as a paste does
    visit.press("Tab")
    assert visit.focused() == "method"
    visit.page.keyboard.type("trunc")
    visit.press("Tab")
    assert visit.focused() == "amount"
    visit.press("Control+a")
    visit.page.keyboard.type("50")
    visit.press("Tab")
    assert visit.focused() == "unit"
    visit.press("Tab")
    assert visit.focused() == "question"
    visit.page.keyboard.type("what?")
    visit.press("Tab")
    assert visit.focused() == "go"
    visit.press("Enter")
    visit.shown("#result")

    before, after = (int(visit.text(name)) for name in ("#before", "#after"))
    assert before == len(TEXT)
    assert 0 < after <= before // 2
    assert visit.text("#short") == TEXT[:after]
    assert visit.text("#marked") == TEXT
    assert "".join(visit.page.locator("#marked .kept").all_text_contents()) == TEXT[:after]
    assert "".join(visit.page.locator("#marked .dropped").all_text_contents()) == TEXT[after:]
    assert visit.page.locator("#marked b").count() == 0  # what is pasted is text, whatever it looks like
    assert visit.text("#restored") == TEXT
    assert visit.text("#tick").startswith("✓")
    assert "equals the source" in visit.text("#status")
    assert visit.focused() == "go"
    visit.press("Tab")
    assert visit.focused() == "marked"  # what scrolls can be reached


def test_dropped_words_are_paler(visit: Served) -> None:
    visit.page.fill("#text", WORDS)
    visit.press("Control+Enter")
    visit.shown("#result")
    ink = "selector => getComputedStyle(document.querySelector(selector)).color.match(/\\d+/g).slice(0, 3).map(Number)"
    kept, dropped = visit.page.evaluate(ink, ".kept"), visit.page.evaluate(ink, ".dropped")
    assert max(kept) + 60 < min(dropped)


def test_tokens_and_errors(visit: Served) -> None:
    visit.press("Control+Enter")
    assert visit.shown("#error") == "Paste a text first."
    assert visit.focused() == "text"
    visit.page.keyboard.insert_text(WORDS)
    visit.page.select_option("#unit", "tokens")
    visit.page.fill("#amount", "7")
    visit.press("Control+Enter")
    visit.shown("#result")
    assert visit.text("#short") == "one two"
    assert visit.page.is_hidden("#error")
    visit.page.select_option("#unit", "own")
    assert visit.page.is_hidden("#amount")
    visit.press("Control+Enter")
    assert "has no threshold of its own" in visit.shown("#error")
    assert visit.page.is_hidden("#result")
    visit.said.clear()  # the browser reports the refusal, too


def test_the_server_is_gone(browser: Any) -> None:
    with serving() as client:
        visit = Served(browser, str(client.base_url))
    visit.page.fill("#text", WORDS)
    visit.press("Control+Enter")
    assert "does not answer" in visit.shown("#error")
    visit.context.close()


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_on_a_narrow_screen_nothing_is_cut_off(browser: Any, colors: str) -> None:
    with serving() as client:
        size = {"width": 320, "height": 700}
        visit = Served(browser, str(client.base_url), viewport=size, color_scheme=colors)
        visit.page.fill("#text", f"{TEXT} {'x' * 500}")
        visit.press("Control+Enter")
        visit.shown("#result")
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 320
        light = visit.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (sum(light[:3]) > 600) == (colors == "light")
        visit.context.close()


def test_everything_has_a_name(visit: Served) -> None:
    for role, name in [
        ("textbox", "Text"),
        ("combobox", "Method"),
        ("group", "Budget"),
        ("spinbutton", "Amount"),
        ("combobox", "Unit of the budget"),
        ("button", "Shorten"),
    ]:
        assert visit.page.get_by_role(role, name=name, exact=True).count() == 1, (role, name)
    assert visit.page.get_by_role("textbox", name="Question").count() == 1
    visit.page.fill("#text", WORDS)
    visit.press("Control+Enter")
    visit.shown("#result")
    for name in ("Kept (dark) and dropped (pale)", "Shortened text", "Restored text"):
        assert visit.page.get_by_role("region", name=name).count() == 1, name
