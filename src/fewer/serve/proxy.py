"""Forwarding chats: the messages shorter, everything else as it came, and the answer back byte for byte.

A plain answer is read whole before a byte of it goes on, so an upstream that dies half-way is an error with its own
status. A stream goes on as it comes; where it breaks off, it ends with an error event that says so.
"""

import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx2
from starlette.responses import Response, StreamingResponse

from fewer.errors import FewerError
from fewer.prompts.bulk import finite
from fewer.serve.guard import log, refusal
from fewer.serve.settings import Settings, is_loopback

BYPASS = "x-fewer-bypass"

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
        chat = json.loads(body, parse_constant=_no_number, parse_float=finite)
    except RecursionError:
        raise BadChat("the body is nested too deeply") from None
    except UnicodeDecodeError as why:
        raise BadChat(f"the body is not JSON: byte {why.start} is not UTF-8") from None
    except json.JSONDecodeError as why:
        raise BadChat(f"the body is not JSON: {why.msg.removesuffix(' at')} at character {why.pos}") from None
    except ValueError as why:
        raise BadChat(f"the body is not JSON: {why}") from None
    if not isinstance(chat, dict) or not isinstance(chat.get("messages"), list) or not chat["messages"]:
        raise BadChat("the body is no chat: it is to be an object with a list of messages")
    if not all(isinstance(message, dict) for message in chat["messages"]):
        raise BadChat("the body is no chat: each of its messages is to be an object")
    return chat


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number there")


class Upstream:
    """The API that chats are forwarded to."""

    def __init__(self, settings: Settings) -> None:
        self.url = httpx2.URL(settings.chats)
        self.silent = settings.upstream_timeout
        self.client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(settings.upstream_timeout, connect=min(10.0, settings.upstream_timeout)),
            limits=httpx2.Limits(max_connections=None),
            trust_env=not is_loopback(self.url.host),  # proxies of the environment are for other machines
        )

    async def forward(
        self, body: bytes, headers: Iterable[Pair], query: bytes, stream: bool, extra: dict[str, str]
    ) -> Response:
        """What the upstream answers to this body, with `extra` headers. Nothing is sent on but what came."""
        sent = _passed(headers, _OURS)
        if stream:  # an event that says what went wrong cannot be put into a compressed stream
            sent = [pair for pair in sent if pair[0] != b"accept-encoding"] + [(b"accept-encoding", b"identity")]
        url = self.url.copy_with(query=query or None)
        request = httpx2.Request("POST", url, headers=sent, content=body)
        try:
            response = await self.client.send(request, stream=True)
        except httpx2.HTTPError as why:
            return self._failed(why, "before it answered")
        kind = response.headers.get("content-type", "")
        back = _passed(response.headers.raw, _THEIRS) + [(k.encode(), v.encode()) for k, v in extra.items()]
        if kind.startswith("text/event-stream") or (stream and not kind.startswith("application/json")):
            events = kind.startswith("text/event-stream") and "content-encoding" not in response.headers
            answer: Response = StreamingResponse(self._streamed(response, events), response.status_code)
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
        tail = b""
        try:
            async for part in response.aiter_raw():
                tail = (tail + part)[-64:]
                yield part
            said = "" if b"[DONE]" in tail else "the upstream ended its stream without [DONE]"
        except httpx2.HTTPError as why:
            said = f"{self._why(why)} in the middle of its stream"
            log.warning("%s", said)
            if not events:
                raise  # the connection breaks off, which is all that can be said there
        finally:
            await response.aclose()
        if said and events:
            error = json.dumps({"error": {"type": "upstream_error", "message": said, "code": 502}})
            gap = b"" if tail.endswith((b"\n\n", b"\r\n\r\n")) or not tail else b"\n\n"  # ends what was begun
            yield gap + f"event: error\ndata: {error}\n\n".encode()

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
