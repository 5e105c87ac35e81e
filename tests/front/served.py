"""Servers for tests: fewer's own on a free port, and an upstream that does what a test wants of it."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fewer.serve.app import create_app
from fewer.serve.settings import Settings


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The address of an application that listens on a free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(app, log_level="critical", access_log=False, ws="none", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                threading.Event().wait(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def serving(**settings: Any) -> Iterator[httpx2.Client]:
    """A client of fewer's server, which counts characters and shortens by truncation unless told otherwise."""
    told = {"method": "truncation", "tokenizer": "characters", **settings}
    with running(create_app(Settings(**told))) as address, httpx2.Client(base_url=address, timeout=30) as client:
        yield client


_LAST = b": " + b"still here " * 20 + b"\n\n"
STREAMS = {
    "done-comment": (b'data: {"n": 1}\n\ndata: [DONE]\n\n', _LAST),
    "done-parts": (b'data: {"n": 1}\r\n\r\nda', b"ta: [DON", b"E]\r", b"\n\r\n", _LAST),
    "done-bare": (b'data: {"n": 1}\n\n', b"data:[DONE]"),
    "refused": (b'data: {"error": {"message": "overloaded"}}\n\n',),
    "done-in-text": (b'data: {"n": 1}\n\n', b'data: {"n": "ends [DONE]'),
    "done-in-a-long-line": (b'data: {"n": 1}\n\ndata: ' + b"x" * 100, b"data: [DONE]\n\n"),
}
"""Streams of events, part by part. To the last two, which never say that they are done, an error is added."""


@dataclass
class Upstream:
    """An API that answers chats by what their `model` says: echo, events, cut-events, no-done, cut, 500, 429, hang,
    hang-half, or a name of `STREAMS`; and lists models."""

    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    @property
    def chat(self) -> dict[str, Any]:
        """The last chat that came."""
        found: dict[str, Any] = json.loads(self.bodies[-1])
        return found

    async def answer(self, request: Request) -> Response:
        body = await request.body()
        self.headers.append(dict(request.headers))
        self.bodies.append(body)
        self.queries.append(request.url.query)
        wanted = json.loads(body).get("model", "echo")
        if wanted in STREAMS:
            status = 529 if wanted == "refused" else 200
            return StreamingResponse(self.parts(wanted), status, media_type="text/event-stream")
        if wanted == "hang":
            await self.hang(request)
        if wanted == "hang-half":
            return StreamingResponse(self.half(), media_type="application/json")
        if wanted.isdigit():
            refused = {"error": {"message": "no such thing"}}
            return JSONResponse(refused, int(wanted), {"retry-after": "7", "set-cookie": "a=1"})
        if "events" in wanted or wanted == "no-done":
            return StreamingResponse(self.events(wanted), media_type="text/event-stream")
        if wanted == "cut":
            return StreamingResponse(self.cut(), media_type="application/json", headers={"content-length": "100"})
        if wanted == "cut-lines":
            return StreamingResponse(self.cut(), media_type="application/x-ndjson")
        return JSONResponse({"choices": [{"message": {"role": "assistant", "content": "yes"}}]})

    async def events(self, wanted: str) -> AsyncIterator[bytes]:
        yield b'data: {"n": 1}\n\n'
        while wanted == "events" and not self.go_on.is_set():
            await asyncio.sleep(0.01)
        if wanted == "silent-events":
            await asyncio.sleep(30)
        yield b'data: {"n": "\xc3'  # half a character, and then the rest
        if wanted == "cut-events":
            raise RuntimeError("this upstream dies here")
        yield b'\xa9"}\n\n'
        if wanted != "no-done":
            yield b"data: [DONE]\n\n"

    async def parts(self, wanted: str) -> AsyncIterator[bytes]:
        for part in STREAMS[wanted]:
            yield part
            await asyncio.sleep(0.02)  # so that each arrives alone

    async def hang(self, request: Request) -> None:
        for _ in range(300):
            if await request.is_disconnected():
                self.left.set()
                return
            await asyncio.sleep(0.1)

    async def half(self) -> AsyncIterator[bytes]:
        yield b'{"choices": '
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            self.left.set()
            raise

    async def models(self, request: Request) -> Response:
        self.headers.append(dict(request.headers))
        where = request.scope["raw_path"].decode()
        self.queries.append(request.url.query)
        return JSONResponse({"path": where}, 404 if where.endswith("/none") else 200, {"x-other": "1"})

    async def cut(self) -> AsyncIterator[bytes]:
        yield b'{"choices": '
        await asyncio.sleep(0.05)
        raise RuntimeError("this upstream dies here")

    @contextmanager
    def listening(self) -> Iterator[str]:
        """Its base URL."""
        chats = Route("/v1/chat/completions", self.answer, methods=["POST"])
        with running(Starlette(routes=[chats, Route("/{rest:path}", self.models)])) as address:
            yield f"{address}/v1"
