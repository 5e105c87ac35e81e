"""A report as one HTML page that asks nothing of the network: a template filled in, written whole or not at all."""

import math
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fewer_eval.lines import DASH, MB
from fewer_eval.sides import sides


def write_page(path: str | Path, template: str, **what: Any) -> None:
    """Fill in a template that lies beside this file and write it; every text is escaped, only `Markup` is not."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(dash=DASH, number=number, megabytes=megabytes, sides=sides)
    write(path, environment.get_template(template).render(**what))


def number(value: float | None, digits: int = 3) -> str:
    """With so many digits; a dash for what was not measured."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def megabytes(value: float | None) -> str:
    """Bytes as megabytes; four digits where there is less than one."""
    return DASH if value is None else number(value / MB, 1 if value >= MB else 4)


def write(path: str | Path, text: str) -> None:
    """Write beside the target, then move: a reader finds the old file or the new one, never a half."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text, encoding="utf-8", newline="\n")
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
