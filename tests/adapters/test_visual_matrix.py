"""docs/vlm.md says what runs on what, and it is so."""

import warnings

from fewer.types import FewerWarning
from tests import visual_matrix


def test_the_page_says_what_runs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewerWarning)
        found = visual_matrix.table()
    page = visual_matrix.PAGE.read_text(encoding="utf-8")
    assert found in page, "write it anew: python -m tests.visual_matrix"
