"""`fewer methods` and `fewer show`: what there is, and where it comes from."""

import sys
from functools import cache
from typing import Annotated, Any

import typer
from rich.table import Table

from fewer.cli.common import Json, out, print_json
from fewer.methods import METHODS, family_of, of_family, resolve, resolve_prompt
from fewer.types import UnknownName


def describe(name: str) -> dict[str, Any]:
    """One method as plain data, the same for the table, `--json` and the README."""
    method = _made(name)
    cls: Any = type(method)
    card = cls.card
    return {
        "name": name,
        "family": family_of(cls),
        "mechanism": card.mechanism,
        "training": card.training,
        "needs": sorted(type(need).__name__.lower() for need in method.needs),
        "faithfulness": card.faithfulness,
        "source": card.source,
        "papers": list(card.slugs),
    }


def _made(name: str) -> Any:
    """A method of any family, by its name."""
    return resolve_prompt(name) if name in of_family("prompt") else resolve(name)


@cache
def described(family: str | None = None) -> list[dict[str, Any]]:
    """All methods of a family, or of all, and those that serve any."""
    found = [describe(name) for name in METHODS]
    families = sorted({method["family"] for method in found} - {"any"})  # those stand under every family
    if family is not None and family not in families:
        raise UnknownName(f"family={family!r}: known families are {', '.join(families)}")
    return [method for method in found if family is None or method["family"] in (family, "any")]


def methods(
    family: Annotated[str | None, typer.Option(help="Only this family, such as kv.")] = None, as_json: Json = False
) -> None:
    """List the methods by family and mechanism."""
    found = described(family)
    if as_json:
        print_json(found)
        return
    table = Table("name", "family", "mechanism", "training", "needs", "faithfulness", "source")
    for method in sorted(found, key=lambda m: (m["family"], m["mechanism"])):
        table.add_row(*(", ".join(v) if isinstance(v, list) else v for k, v in method.items() if k != "papers"))
    out.print(table)


def show(method: str, as_json: Json = False) -> None:
    """Show one method: what it does, what it needs, how faithful it is, where it comes from."""
    made = _made(method)
    cls: Any = type(made)
    described = describe(method)
    text = (sys.modules[cls.__module__].__doc__ or "").strip()
    if as_json:
        print_json({**described, "text": text, "differs": cls.card.differs, "defaults": repr(made)})
        return
    out.print(text, highlight=False, markup=False)
    out.print()
    for key in ("family", "mechanism", "training", "needs", "faithfulness", "source"):
        value = described[key]
        out.print(f"{key + ':':14s}{', '.join(value) or 'nothing' if isinstance(value, list) else value}", markup=False)
    out.print(f"{'defaults:':14s}{made}", markup=False)
