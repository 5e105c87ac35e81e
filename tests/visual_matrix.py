"""Which method for visual tokens runs on which family of models: tried out on tiny models, written into docs/vlm.md.

python -m tests.visual_matrix     write the table anew; a test holds the page to it
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewer
from fewer.methods import METHODS, of_family
from fewer.types import FewerError
from tests import vlms

PAGE = Path(__file__).parents[1] / "docs" / "vlm.md"
KEEP = 0.5
TOWER = ("tome", "turbo", "topk")
"""Of the methods for encoders, some that run inside the vision tower; the others run where these do."""


@torch.no_grad()
def runs(case: vlms.Case, method: Any, inputs: dict[str, Tensor]) -> bool:
    """Whether the method leaves fewer tokens, and the model still gives numbers; a refusal is a `FewerError`."""
    try:
        with fewer.compress(case.model, method, keep=KEEP) as run:
            logits = case.model(**inputs).logits
    except FewerError:
        return False
    read = run.report.read
    assert read[-1] < run.report.had, f"{method} kept everything and said nothing"
    assert bool(logits[:, -1].isfinite().all()), f"{method} gives no numbers"
    return True


def mark(name: str, case: vlms.Case, video: bool) -> str:
    """What the table says of one method and one model."""
    made = METHODS[name]()
    kinds = [("image", case.inputs([1]))] + ([("video", case.inputs([1], frames=4))] if video else [])
    found = []
    for kind, inputs in kinds:
        if runs(case, made, inputs):
            found.append(kind)
        elif "by" in {one.name for one in fields(made)} and runs(case, replace(made, by="received"), inputs):
            found.append(f"{kind} (received)")
    return ", ".join(found) or "–"


def table() -> str:
    """The whole table, in Markdown."""
    cases = {family: make() for family, make in vlms.FAMILIES.items()}
    head = ["method", *(family.replace("_", "-") for family in cases)]
    rows = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for name in [*(name for name in of_family("vlm") if name != "full"), *TOWER]:
        marks = [mark(name, case, family in vlms.WITH_VIDEO) for family, case in cases.items()]
        rows.append(f"| {name} | {' | '.join(marks)} |")
    return "\n".join(rows)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition("<!-- matrix -->")
    _, _, after = rest.partition("<!-- /matrix -->")
    PAGE.write_text(f"{before}<!-- matrix -->\n{table()}\n<!-- /matrix -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
