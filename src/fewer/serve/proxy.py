"""Forwarding chats: the messages shorter, everything else as it came, and the answer back byte for byte.

A plain answer is read whole before a byte of it goes on, so an upstream that dies half-way is an error with its own
status. A stream goes on as it comes; where it breaks off, it ends with an error event that says so. A client that goes
away takes its call with it: what an upstream writes is paid for.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx2
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fewer.errors import FewerError
from fewer.prompts.bulk import finite
from fewer.serve.guard import log, refusal
from fewer.serve.settings import Settings, is_loopback

BYPASS = "x-fewer-bypass"

_DONE = {b"data: [DONE]", b"data:[DONE]"}
"""The line that ends a stream of events."""

# What concerns one connection only, or is written anew.
_HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
}  # fmt: skip
_OURS = {*_HOP, "host", "content-length", "expect"}
_THEIRS = {*_HOP, "content-length", "date", "server"}

Pair = tuple[bytes, bytes]


class BadChat(FewerError):
    """The body is no chat."""


def read_chat(body: bytes) -> dict[str, Any]:
    """The fields of a chat; those that fewer does not know are the upstream's business.

    Raises:
        BadChat: it is no JSON object with messages.
    """
    try:
        chat = json.loads(body, parse_constant=_no_number, parse_float=finite, parse_int=_whole)
    except RecursionError:
        raise BadChat("the body is nested too deeply") from None
    except UnicodeDecodeError as why:
        raise BadChat(f"the body is not JSON: byte {why.start} is not UTF-8") from None
    except json.JSONDecodeError as why:
        raise BadChat(f"the body is not JSON: {why.msg.removesuffix(' at')} at character {why.pos}") from None
    except ValueError as why:
        raise BadChat(f"the body cannot be read: {why}") from None
    if not isinstance(chat, dict) or not isinstance(chat.get("messages"), list) or not chat["messages"]:
        raise BadChat("the body is no chat: it is to be an object with a list of messages")
    if not all(isinstance(message, dict) for message in chat["messages"]):
        raise BadChat("the body is no chat: each of its messages is to be an object")
    return chat


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number there")


def _whole(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python reads no more than some thousands of digits
        raise ValueError(f"it holds a whole number of {len(digits.lstrip('-')):,} digits, which is too long") from None


class Upstream:
    """The API that chats are forwarded to."""

    def __init__(self, settings: Settings) -> None:
        self.url = httpx2.URL(settings.base)
        self.silent = settings.upstream_timeout
        self.client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(settings.upstream_timeout, connect=min(10.0, settings.upstream_timeout)),
            limits=httpx2.Limits(max_connections=None),
            trust_env=not is_loopback(self.url.host),  # proxies of the environment are for other machines
        )

    async def forward(
        self, request: Request, path: bytes, body: bytes, stream: bool = False, extra: dict[str, str] | None = None
    ) -> Response:
        """What the upstream answers below its base URL to this body, with `extra` headers. Nothing is sent on but what
        came. If the client goes away before the answer begins, the call is cancelled and its connection closed."""
        answer = asyncio.create_task(self._answer(request, path, body, stream, extra or {}))
        gone = asyncio.create_task(_gone(request))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            return answer.result() if answer.done() else Response(status_code=499)  # which only the log sees
        finally:
            answer.cancel()
            gone.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)

    async def _answer(
        self, request: Request, path: bytes, body: bytes, stream: bool, extra: dict[str, str]
    ) -> Response:
        sent = _passed(request.headers.raw, _OURS)
        if stream:  # an event that says what went wrong cannot be put into a compressed stream
            sent = [pair for pair in sent if pair[0] != b"accept-encoding"] + [(b"accept-encoding", b"identity")]
        query = request.scope["query_string"]
        try:
            url = self.url.copy_with(raw_path=self.url.raw_path + path + (b"?" + query if query else b""))
        except httpx2.InvalidURL:
            return refusal(400, "bad_request", "the address holds characters that may stand in none")
        try:
            response = await self.client.send(
                httpx2.Request(request.method, url, headers=sent, content=body), stream=True
            )
        except httpx2.HTTPError as why:
            return self._failed(why, "before it answered")
        kind = response.headers.get("content-type", "")
        back = _passed(response.headers.raw, _THEIRS) + [(k.encode(), v.encode()) for k, v in extra.items()]
        if kind.startswith("text/event-stream") or (stream and not kind.startswith("application/json")):
            readable = kind.startswith("text/event-stream") and "content-encoding" not in response.headers
            answer: Response = _Stream(self._streamed(response, readable and response.is_success), response)
        else:
            try:
                whole = b"".join([part async for part in response.aiter_raw()])
            except httpx2.HTTPError as why:
                return self._failed(why, "in the middle of its answer")
            answer = Response(whole, response.status_code)
            back.append((b"content-length", str(len(whole)).encode()))
        answer.raw_headers = back
        return answer

    async def _streamed(self, response: httpx2.Response, events: bool) -> AsyncIterator[bytes]:
        """The upstream's stream; of `events`, one that broke off ends with one that says so."""
        line, done, said = b"", False, "the upstream ended its stream without [DONE]"
        try:
            async for part in response.aiter_raw():
                *lines, line = (line + part).replace(b"\r", b"\n").split(b"\n")
                done = done or not _DONE.isdisjoint(lines)
                line = line[:64]  # of a long line no more than tells that it is none of these
                yield part
        except httpx2.HTTPError as why:
            said = f"{self._why(why)} in the middle of its stream"
            log.warning("%s", said)
            if not events:
                raise  # the connection breaks off, which is all that can be said there
        if events and not done and line not in _DONE:
            error = json.dumps({"error": {"type": "upstream_error", "message": said, "code": 502}})
            yield f"\n\nevent: error\ndata: {error}\n\n".encode()  # blank lines end what was begun

    def _failed(self, why: httpx2.HTTPError, when: str) -> Response:
        late = isinstance(why, httpx2.TimeoutException) and not isinstance(why, httpx2.ConnectTimeout)
        said = f"{self._why(why)} {when}"
        log.warning("%s", said)
        return refusal(504 if late else 502, "upstream_timeout" if late else "upstream_error", said)

    def _why(self, why: httpx2.HTTPError) -> str:
        """What went wrong, in words of ours: those of the exception may hold more than is to be logged."""
        if isinstance(why, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.UnsupportedProtocol):
            return f"the upstream {self.url.host} cannot be reached ({type(why).__name__})"
        if isinstance(why, httpx2.TimeoutException):
            return f"the upstream was silent for {self.silent:g} s"
        return f"the upstream broke off ({type(why).__name__})"

    async def close(self) -> None:
        """Let its connections go."""
        await self.client.aclose()


class _Stream(StreamingResponse):
    """The upstream's stream, which is let go of even where its client went away before the first of its parts."""

    def __init__(self, parts: AsyncIterator[bytes], response: httpx2.Response) -> None:
        super().__init__(parts, response.status_code)
        self.response = response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.response.aclose()


async def _gone(request: Request) -> None:
    """Wait until the client went away; its body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _passed(headers: Iterable[Pair], kept_back: set[str]) -> list[Pair]:
    """Headers that go on to the other side."""
    pairs = [(name.decode("latin-1").lower(), value) for name, value in headers]
    named = {
        part.strip().lower()
        for name, value in pairs
        if name == "connection"
        for part in value.decode("latin-1").split(",")
    }
    return [
        (name.encode("latin-1"), value)
        for name, value in pairs
        if name not in kept_back | named and not name.startswith("x-fewer-")
    ]
