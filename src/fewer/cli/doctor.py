"""`fewer doctor`: what this machine has, and what can gain on it."""

from rich.markup import escape
from rich.table import Table

from fewer.cli.common import Json, err, out, print_json

STYLES = {"ok": "green", "yes": "green", "in part": "yellow", "missing": "yellow", "broken": "red"}


def doctor(as_json: Json = False) -> None:
    """Say what is installed and works on this machine, and what can gain on it and what cannot. Downloads nothing."""
    from fewer.doctor import examine

    with err.status("looking"):
        found = examine()
    if as_json:
        print_json(found.to_dict())
        return
    for title in ("versions", "extras", "devices", "attention", "compiling", "models"):
        table = Table(title, "", "", "to mend it", title_justify="left")
        for one in getattr(found, title):
            table.add_row(one.name, _styled(one.state), escape(one.detail), escape(one.fix))
        out.print(table)
    table = Table("what can gain here", "", "why")
    for gain in found.gains:
        table.add_row(gain.way, _styled(gain.pays), gain.why)
    out.print(table)


def _styled(word: str) -> str:
    return f"[{STYLES[word]}]{word}[/]" if word in STYLES else word
