"""A page in a browser, for the tests that click through the server's page and the reports."""

from typing import Any


class Visit:
    """A page at a URL, with what it asked for, and what it complained of."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1000, "height": 900}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.asked: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda why: self.said.append(str(why)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.goto(url)

    def outside(self, *own: str) -> list[str]:
        """What it asked for that does not start with one of these."""
        return [url for url in self.asked if not url.startswith((*own, "data:"))]

    def leave(self) -> None:
        """Close it, and check that it did not complain."""
        self.context.close()
        assert self.said == []
