"""One headless Chromium for the tests of a file that need one; they are skipped where there is none."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("there is no Chromium: install one, such as Debian's package chromium, or name it in CHROMIUM")
    with sync_api.sync_playwright() as play:
        args = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        started = play.chromium.launch(executable_path=path, args=args)
        yield started
        started.close()
