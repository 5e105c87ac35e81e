"""The command line: thin functions that read options and call the library."""

import re
import sys

import typer
from rich.console import Console

from fewer.cli import caches, doctor, fitting, methods, pictures, prompts, serve, tune
from fewer.cli.caches import fitted as _fitted
from fewer.cli.common import err, out
from fewer.cli.fitting import needles as _needles
from fewer.cli.methods import describe
from fewer.types import FewerError

__all__ = ["Console", "_fitted", "_needles", "app", "describe", "err", "main", "out"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__)
app.command()(methods.methods)
app.command()(methods.show)
app.command()(caches.compare)
app.command()(caches.generate)
app.command()(pictures.image)
app.command("fit")(fitting.fit_method)
app.command()(prompts.prompt)
app.command()(prompts.restore)
app.command()(serve.serve)
app.command()(doctor.doctor)
app.command()(tune.tune)


def main() -> None:
    """Run the command line; what a user can mend is one line on stderr and exit code 2."""
    try:
        app()
    except FewerError as error:
        err.print(f"fewer: {_as_typed(str(error))}", style="red", highlight=False, markup=False)
        raise SystemExit(2) from None


def _as_typed(message: str) -> str:
    """A message of the library, which says keep=0.5, with this command's options as they are typed, --keep 0.5.

    What stands in a call's parentheses, or begins a quote, stays as it is.
    """
    commands = getattr(typer.main.get_command(app), "commands", {})
    names = {
        option.removeprefix("--").replace("-", "_"): option
        for parameter in getattr(commands.get(sys.argv[1]), "params", ())
        for option in parameter.opts
        if option.startswith("--")
    }

    def typed(found: re.Match[str]) -> str:
        option = names.get(found["name"] or "")
        return found[0] if option is None else option + (" " if found["value"] is not None else "")

    return re.sub(r"\w\([^()]*\)|(?<![\w'\"-])(?P<name>[a-z_]+)=(?P<value>(?=[^\s,;)]))?", typed, message)
