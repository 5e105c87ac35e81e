"""The routes: compress, restore, methods, health, chats, models, and the page."""

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

import fewer
from fewer.cli.methods import described
from fewer.errors import BudgetError, FewerError
from fewer.methods import resolve_prompt
from fewer.prompts import protect
from fewer.serve.forms import Compress, Protect, Restore
from fewer.serve.guard import Guard, refusal
from fewer.serve.lanes import Full, Lanes, Late, models_of
from fewer.serve.proxy import BYPASS, BadChat, Upstream, read_chat
from fewer.serve.settings import Settings

T = TypeVar("T")

_NONCE = "{{nonce}}"

_NO = ("", "0", "false", "no", "off")
"""What a bypass header may say for one that is not there."""


def create_app(settings: Settings) -> FastAPI:
    """The server as an ASGI application.

    Args:
        settings: what it is to do.
    """
    lanes = Lanes(settings.workers, settings.queue, settings.timeout)
    upstream = Upstream(settings) if settings.upstream else None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if upstream is not None:
            await upstream.close()
        await asyncio.to_thread(lanes.close)

    # its own pages for the documentation load scripts from elsewhere; /openapi.json stays
    app = FastAPI(title="fewer", version=fewer.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, settings=settings)
    _errors(app)

    async def run(method: str, work: Callable[[], T]) -> T:
        return await lanes.run(models_of(resolve_prompt(method)), work)

    @app.post("/v1/compress")
    async def compress(asked: Compress) -> Response:
        """Shorten a text, or documents."""
        return _json(await run(asked.method or settings.method, lambda: asked.answer(settings)))

    @app.post("/v1/restore")
    async def restore(asked: Restore) -> Response:
        """Give the source of a compressed text back, byte for byte."""
        return _json(await lanes.run((), asked.answer))

    @app.get("/methods")
    def methods(family: Annotated[str | None, Query()] = None) -> list[dict[str, Any]]:
        """The methods, as `fewer methods --json` lists them."""
        return described(family)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """That the server answers, how much it has to do, and what it does with chats."""
        said = {"method": settings.method, "keep": settings.keep, "upstream": upstream is not None}
        return {"status": "ok", "version": fewer.__version__, **said, **lanes.busy}

    @app.post("/v1/chat/completions")
    async def chats(request: Request) -> Response:
        """Shorten the messages of a chat, and forward it."""
        if upstream is None:
            return _no_upstream()
        body = whole = await request.body()
        chat = read_chat(body)
        extra: dict[str, str] = {}
        if request.headers.get(BYPASS, "").strip().lower() in _NO:
            body, extra = await run(settings.method, lambda: _shortened(chat, whole, settings))
        stream = chat.get("stream") is True
        return await upstream.forward(request, b"/chat/completions", body, stream, extra)

    @app.get("/v1/models")
    @app.get("/v1/models/{name:path}")
    async def models(request: Request) -> Response:
        """The upstream's models, as it lists them."""
        if upstream is None:
            return _no_upstream()
        if {".", ".."} & set(request.scope["path"].split("/")):  # they would lead to other places of the upstream
            raise HTTPException(404)
        path = request.scope["raw_path"].partition(b"/v1/models")[2]  # as it was sent, with its %2F
        return await upstream.forward(request, b"/models" + path, await request.body())

    @app.get("/")
    async def page() -> Response:
        """A page to try it."""
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
            f"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return HTMLResponse(_page().replace(_NONCE, nonce), headers={"Content-Security-Policy": policy})

    return app


def warm(settings: Settings) -> None:
    """Load what the server's own method and tokenizer need, so that no request waits for it, and none fails on it."""
    text = "The sky is blue and the sea is deep. A second sentence follows the first."
    fewer.compress_prompt(text, settings.method, keep=settings.keep, question="What?", tokenizer=settings.tokenizer)


def _shortened(chat: dict[str, Any], body: bytes, settings: Settings) -> tuple[bytes, dict[str, str]]:
    """The body of a chat with shorter messages, and headers that say what that saved. A budget that cannot be met, as
    where all of a chat is protected, is no fault of who sent it: the chat goes on as it came, and a header says why."""
    from fewer.prompts.chat import compress_messages

    try:
        done = compress_messages(
            chat["messages"], settings.method, keep=settings.keep, frozen=min(settings.frozen, len(chat["messages"])),
            protect=[protect.named(name) for name in settings.protect], tokenizer=settings.tokenizer,
        )  # fmt: skip
    except BudgetError as why:
        return body, {"x-fewer-tokens-saved": "0", "x-fewer-skipped": str(why).encode("ascii", "replace").decode()}
    before, after = done.tokens_before, done.tokens_after
    said = {"before": before, "after": after, "saved": before - after}
    body = json.dumps({**chat, "messages": done.messages}, allow_nan=False).encode()
    return body, {f"x-fewer-tokens-{name}": str(count) for name, count in said.items()}


def _no_upstream() -> Response:
    return refusal(501, "no_upstream", "this server forwards nothing; start it with --upstream URL")


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


@cache
def _page() -> str:
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _errors(app: FastAPI) -> None:
    """One clear line for each kind of error."""

    @app.exception_handler(FewerError)
    async def mendable(_: Request, why: FewerError) -> Response:
        return refusal(400 if isinstance(why, BadChat) else 422, type(why).__name__, str(why))

    @app.exception_handler(Full)
    async def full(_: Request, why: Full) -> Response:
        return refusal(503, "busy", f"{why}; come again", {"Retry-After": "1"})

    @app.exception_handler(Late)
    async def late(_: Request, why: Late) -> Response:
        return refusal(504, "timeout", str(why))

    @app.exception_handler(HTTPException)
    async def http(request: Request, why: HTTPException) -> Response:
        said = str(why.detail)
        if why.status_code == 404 and request.scope["path"].startswith("/v1/"):
            said += "; only chats, /v1/chat/completions, and the list of models, /v1/models, are forwarded"
        return refusal(why.status_code, "http_error", said, dict(why.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, why: RequestValidationError) -> Response:
        """Each field that is wrong and why; what stood in it is not repeated."""
        found = why.errors()
        broken = any(error["type"] == "json_invalid" for error in found)
        said = "; ".join(_said(error) for error in found[:5]) + ("; and more" if len(found) > 5 else "")
        return refusal(400 if broken else 422, "bad_request", said)


def _said(error: Any) -> str:
    """One error of pydantic's in words."""
    where = [str(part) for part in error["loc"] if part != "body"]
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error'].removesuffix(' at')} at character {where[-1]}"
    if error["type"] == "extra_forbidden":
        name = where[-1][:100]
        fields = [
            field.alias or name for form in (Compress, Restore, Protect) for name, field in form.model_fields.items()
        ]
        near = get_close_matches(name, fields, n=1)
        return f"unknown field {name!r}" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "string_unicode":
        return f"{'.'.join(where)}: it holds half of a surrogate pair, which is no text"
    message = re.sub(r"^Value error, ", "", error["msg"])
    return f"{'.'.join(where) or 'the body'}: {message[0].lower()}{message[1:]}"
