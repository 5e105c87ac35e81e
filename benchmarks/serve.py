"""Many clients at once of `fewer serve`, on this machine alone: answers a second, how long they take, memory.

Each client asks again as soon as it has an answer, over a connection of its own, for a time that is set. Every answer
is checked: a compressed text must be met with its own patch and give its source back, a chat must come back with what
the upstream said and say what it saved. Anything else, a refusal too, counts as an error.

Memory is the server's resident set, read at even steps after a warm-up. `growth` is the median of the last third of
those readings against that of the first: memory that leaks grows with every answer, whatever the moment.

    python benchmarks/serve.py [--route compress|chat] [--clients 50] [--seconds 60] [--words 1000] [--json F]
"""

import argparse
import asyncio
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from rich.console import Console
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from fewer_eval import environment

STEPS = 24
WORDS = ("the", "model", "reads", "a", "long", "prompt", "and", "answers", "42", "questions", "about", "it", ",", ".")
SAID = {"choices": [{"message": {"role": "assistant", "content": "yes"}}]}


@contextmanager
def upstream() -> Iterator[str]:
    """An API that reads chats and always says the same."""

    async def answer(request: Request) -> JSONResponse:
        await request.json()
        return JSONResponse(SAID)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def served(method: str, tokenizer: str, forward: str) -> Iterator[tuple[str, int]]:
    """The address of a server in a process of its own, and the process's number."""
    command = [sys.executable, "-c", "from fewer.cli import main; main()", "serve", "--port", "0", "--method", method]
    command += ["--tokenizer", tokenizer, "--upstream", forward]
    # rich would break the line that says the address
    environ = {**os.environ, "COLUMNS": "200"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ) as started:
        assert started.stderr is not None
        try:
            for line in started.stderr:
                if found := re.search(r"chats sent to (http://\S+)/v1", line):
                    break
            else:
                raise SystemExit("the server did not start")
            threading.Thread(target=started.stderr.read, daemon=True).start()  # its log
            yield found[1], started.pid
        finally:
            started.terminate()


def resident(pid: int) -> float:
    """MB that a process has in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000  # type: ignore[index]


def text_of(words: int, seed: int) -> str:
    """Words that a tokenizer splits as it does English."""
    draw = random.Random(seed)
    return f"{seed}: " + " ".join(draw.choices(WORDS, k=words))


async def compressed(client: httpx2.AsyncClient, text: str) -> None:
    """Shorten a text and restore it."""
    done = (await client.post("/v1/compress", json={"text": text, "keep": 0.5})).raise_for_status().json()
    if done["tokens_after"] > done["limit"]:
        raise ValueError("the budget is not met")
    body = {"text": done["text"], "patch": done["patch"]}
    back = (await client.post("/v1/restore", json=body)).raise_for_status().json()
    if back != {"text": text}:
        raise ValueError("the source did not come back")


async def chatted(client: httpx2.AsyncClient, text: str) -> None:
    """Send a chat through."""
    messages = [{"role": "user", "content": f"{text}\n\nWhat does it read?"}]
    answer = (await client.post("/v1/chat/completions", json={"messages": messages})).raise_for_status()
    if answer.json() != SAID or int(answer.headers["x-fewer-tokens-saved"]) <= 0:
        raise ValueError("the answer is another")


async def load(address: str, pid: int, asked: argparse.Namespace) -> tuple[list[float], list[str], list[float]]:
    """How long each answer took in seconds, what went wrong, and the memory at each step."""
    took: list[float] = []
    wrong: list[str] = []
    memory: list[float] = []
    ask = compressed if asked.route == "compress" else chatted
    end = time.monotonic() + asked.warm + asked.seconds

    async def client(number: int) -> None:
        turn = 0
        async with httpx2.AsyncClient(base_url=address, timeout=120, trust_env=False) as one:
            while (start := time.monotonic()) < end:
                turn += 1
                try:
                    await ask(one, text_of(asked.words, 10_000 * number + turn))
                except (httpx2.HTTPError, ValueError, KeyError) as why:
                    wrong.append(f"{type(why).__name__}: {why}")
                if start > end - asked.seconds:
                    took.append(time.monotonic() - start)

    async def watch() -> None:
        await asyncio.sleep(asked.warm)
        for _ in range(STEPS):
            await asyncio.sleep(asked.seconds / STEPS)
            memory.append(resident(pid))

    await asyncio.gather(watch(), *(client(i) for i in range(asked.clients)))
    return took, wrong, memory


def main() -> None:
    """Run it, print what came out, and end with code 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--route", choices=["compress", "chat"], default="compress")
    parser.add_argument("--method", default="statistical")
    parser.add_argument("--tokenizer", default="characters")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--warm", type=float, default=10.0, help="seconds before anything is measured")
    parser.add_argument("--words", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with upstream() as forward, served(asked.method, asked.tokenizer, forward) as (address, pid):
        took, wrong, memory = asyncio.run(load(address, pid, asked))
    third = len(memory) // 3
    first, last = statistics.median(memory[:third]), statistics.median(memory[-third:])
    cuts = statistics.quantiles(took, n=20)
    row: dict[str, Any] = {
        "route": asked.route, "method": asked.method, "tokenizer": asked.tokenizer, "clients": asked.clients,
        "seconds": asked.seconds, "words": asked.words, "answers": len(took), "errors": len(wrong),
        "answers_a_second": round(len(took) / asked.seconds, 1), "p50_ms": round(1000 * cuts[9]),
        "p95_ms": round(1000 * cuts[18]), "memory_mb": [round(mb, 1) for mb in memory],
        "growth_mb": round(last - first, 1),
    }  # fmt: skip
    out = Console(width=140)
    out.print(row)
    for why in sorted(set(wrong))[:5]:
        out.print(f"{wrong.count(why)} times {why}", markup=False)
    if asked.json is not None:
        info = {"date": date.today().isoformat(), "hardware": environment.hardware(), **environment.versions()}
        rows = json.loads(asked.json.read_text())["rows"] if asked.json.exists() else []
        rows = [old for old in rows if (old["route"], old["method"]) != (asked.route, asked.method)]
        asked.json.write_text(json.dumps({"info": info, "rows": [*rows, row]}, indent=1) + "\n")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
