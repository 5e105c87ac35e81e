"""`fewer serve`: the server."""

import socket
from pathlib import Path
from typing import Annotated

import typer

from fewer.cli.common import check_share, err
from fewer.types import FewerError


def serve(
    host: Annotated[str, typer.Option(help="The address to listen on; others than this one open it to a network.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="The port; 0 for any that is free.", min=0, max=65535)] = 8020,
    upstream: Annotated[
        str | None, typer.Option(help="Forward /v1/chat/completions to this base URL, such as http://127.0.0.1:8000/v1")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Shorten chats by this, and texts that name no method; default llmlingua2.")
    ] = None,
    keep: Annotated[str | None, typer.Option(help="The share of tokens that may stay in chats; default 0.5.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan that `fewer tune` wrote, in their place.")] = None,
    frozen: Annotated[int, typer.Option(help="Leading messages of chats that stay as they are.", min=0)] = 0,
    protect: Annotated[
        list[str] | None, typer.Option(help="A class of things that stay in chats, such as numbers.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="What counts tokens; default the default model's.")] = None,
    limit_mb: Annotated[float, typer.Option(help="The largest body, in MB.")] = 5.0,
    timeout: Annotated[float, typer.Option(help="Seconds that compressing may take, waiting included.")] = 60.0,
    upstream_timeout: Annotated[float, typer.Option(help="Seconds that the upstream may be silent.")] = 300.0,
    workers: Annotated[int, typer.Option(help="Texts that methods without a model shorten at once.")] = 4,
    queue: Annotated[int, typer.Option(help="Calls that may wait or run; more are told to come again.")] = 100,
) -> None:
    """Serve a page to try it, /v1/compress, /v1/restore, and chats that are forwarded shorter."""
    try:
        import uvicorn

        from fewer.serve.app import create_app, warm
    except ModuleNotFoundError as missing:
        raise FewerError(f"fewer serve needs {missing.name}: pip install 'fewer[serve]'") from None
    from fewer.serve.settings import Settings

    share = 0.5
    if plan is not None:
        if method is not None or keep is not None or protect:
            raise FewerError(f"--plan {plan} says what to do with texts; leave out --method, --keep and --protect")
        method, share, protect, counts = _planned(plan)
        tokenizer = tokenizer or counts
    elif keep is not None:
        check_share(keep)
        share = float(keep)
    method = "llmlingua2" if method is None else method
    settings = Settings(
        host=host, upstream=upstream, method=method, keep=share, frozen=frozen, protect=tuple(protect or ()),
        tokenizer=tokenizer, limit_mb=limit_mb, timeout=timeout, upstream_timeout=upstream_timeout, workers=workers,
        queue=queue,
    )  # fmt: skip
    listening = _listening(host, port)
    with listening:
        err.print(f"loading what {method} needs", highlight=False, markup=False)
        warm(settings)
        name = f"[{host}]" if ":" in host else host
        address = f"http://{name}:{listening.getsockname()[1]}"
        err.print(f"the page is at {address}/ and stops with Ctrl+C", highlight=False, markup=False)
        if upstream is not None:
            err.print(f"chats sent to {address}/v1 go to {settings.chats}", highlight=False, markup=False)
        if not settings.local:
            err.print(f"{host} can be reached from outside, and nobody is asked for a password", style="red")
        quiet = {"version": 1, "disable_existing_loggers": False, **_LOG}
        config = uvicorn.Config(
            create_app(settings), log_config=quiet, access_log=False, server_header=False, ws="none"
        )
        uvicorn.Server(config).run(sockets=[listening])


def _planned(plan: Path) -> tuple[str, float, list[str], str | None]:
    """What a plan does with texts; what it does with a model is for whoever runs the model."""
    from fewer.tuning.planfile import TunedPlan

    tuned = TunedPlan.load(plan)
    text = tuned.setting.text
    if text is None:
        raise FewerError(
            f"--plan {plan}: {tuned.setting} has no part for texts, which is all that a server can do; tune with --for "
            f"tokens, or use it where the model runs: fewer.compress(model, {str(plan)!r})"
        )
    err.print(str(tuned), highlight=False, markup=False)
    said = [
        "that was measured on contexts with a question each; here chats are shortened message by message, by whatever "
        "model is behind, so that nothing is promised of them: fewer.Monitor can watch"
    ]
    if tuned.setting.held is not None:
        said.append(f"its other part, {tuned.setting.held.method}, is for where the model runs, and is not done here")
    for line in said:
        err.print(line, style="red", highlight=False, markup=False)
    return text.method, text.keep, list(text.protect), tuned.model or None


_LINE = {"class": "logging.StreamHandler", "formatter": "line"}
_LOG = {
    "formatters": {"line": {"format": "%(asctime)s %(message)s"}},
    "handlers": {"line": _LINE},
    "loggers": {
        "fewer.serve": {"handlers": ["line"], "level": "INFO", "propagate": False},
        "uvicorn": {"handlers": ["line"], "level": "WARNING", "propagate": False},
        # these write whole addresses, and what is in them
        "httpx2": {"level": "WARNING"},
        "httpcore2": {"level": "WARNING"},
    },
}


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family)
    except OSError as why:
        raise FewerError(f"--host {host} --port {port}: cannot listen there ({why.strerror or why})") from None
