"""What every request goes through: whose host it names, how long and of what type its body is; and the log.

The log has a line for each request: method, path, status, milliseconds. Queries, headers and bodies are never in it,
nor are the words of an unexpected error, since they may quote a prompt: its type and its place are.
"""

import logging
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from fewer.serve.settings import Settings, is_loopback

log = logging.getLogger("fewer.serve")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

RESTORE = 8
"""How many times as long the body of `/v1/restore` may be: it holds a patch, which is JSON inside JSON."""

SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def refusal(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    return JSONResponse({"error": {"type": kind, "message": message, "code": status}}, status, headers)


class Guard:
    """The outermost layer of the application."""

    def __init__(self, app: Any, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SAFE.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            refused = self.refused(scope)
            if refused is not None:
                await refused(scope, receive, answer)
            else:
                await self.app(scope, self.counted(scope, receive), answer)
        except Exception as why:  # noqa: BLE001  # whatever a method raises
            log.error("%s at %s", type(why).__name__, _place(why))  # its words may quote a prompt
            if status:  # part of the answer is out: what is missing shows when the connection breaks off
                raise _Broken from None
            body = refusal(500, "internal_error", f"fewer failed with {type(why).__name__}; its log says where")
            await body(scope, receive, answer)
        finally:
            path = scope.get("raw_path", b"").split(b"?")[0].decode("ascii", "replace")
            took = (time.perf_counter() - start) * 1000
            log.info("%s %s %s %.0f ms", scope["method"], path[:200], status or "cut off", took)

    def refused(self, scope: Any) -> JSONResponse | None:
        """Why this request goes no further."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.settings.local and not is_loopback(_without_port(host)):
            return refusal(403, "forbidden", f"this server answers to this machine's own names, not to {host[:100]!r}")
        if scope["method"] != "POST":
            return None
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":  # pages of other origins cannot send this type unasked
            return refusal(415, "wrong_type", f"content-type is {kind[:100] or 'missing'}; send application/json")
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self.limit(scope):
            return refusal(413, "too_large", self.too_large(scope))
        return None

    def counted(self, scope: Any, receive: Receive) -> Receive:
        """`receive`, with an end: lengths that clients announce may be missing."""
        had = 0

        async def counting() -> Message:
            nonlocal had
            message = await receive()
            had += len(message.get("body", b""))
            if had > self.limit(scope):
                raise HTTPException(413, self.too_large(scope))
            return message

        return counting

    def limit(self, scope: Any) -> int:
        """Bytes that this request's body may have."""
        return self.settings.limit * (RESTORE if scope["path"] == "/v1/restore" else 1)

    def too_large(self, scope: Any) -> str:
        """What is said to a body that has more."""
        return f"the body has more than {self.limit(scope) / 1e6:g} MB; send less, or start with a larger --limit-mb"


class _Broken(Exception):
    """The answer breaks off here."""


def _without_port(host: str) -> str:
    return host.split("]")[0].lstrip("[") if host.startswith("[") else host.split(":")[0]


def _place(why: BaseException) -> str:
    """The file and line that an error came from, with nothing of what it says."""
    frames = traceback.extract_tb(why.__traceback__)
    return " < ".join(f"{frame.filename}:{frame.lineno}" for frame in frames[:-4:-1]) or "nowhere"
