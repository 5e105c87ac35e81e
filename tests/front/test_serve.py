"""The server over real sockets: what it answers, what it refuses, and that nothing is lost or told on."""

import asyncio
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import httpx2
import numpy as np
import pytest
import torch
from starlette.requests import ClientDisconnect

import fewer
from fewer.cli.methods import describe
from fewer.errors import FewerError
from fewer.methods import METHODS, of_family
from fewer.prompts.source import Ranking, Source
from fewer.serve import proxy as forwarding
from fewer.serve.lanes import models_of
from fewer.serve.settings import Settings
from fewer.types import Budget, Card
from tests.front.served import STREAMS, Upstream, serving

TEXT = "one two three four"
LONG = "The quick brown fox jumps over the lazy dog. " * 40
SECRET = "sk-do-not-tell"  # noqa: S105  # it opens nothing


@pytest.fixture(scope="module")
def server() -> Iterator[httpx2.Client]:
    with serving() as client:
        yield client


def error(answer: httpx2.Response, status: int) -> str:
    """The message of an error, which is one line."""
    assert answer.status_code == status, answer.text
    said = answer.json()["error"]
    assert said["code"] == status
    assert "\n" not in said["message"]
    return str(said["message"])


# compress and restore


def test_compress_answers_what_the_library_does(server: httpx2.Client) -> None:
    said = server.post("/v1/compress", json={"text": TEXT, "keep": 0.5}).json()
    done = fewer.compress_prompt(TEXT, "truncation", keep=0.5, tokenizer="characters")
    assert said.pop("seconds") >= 0
    assert said.pop("patch") == done.patch()
    assert said.pop("prompt") == "one two"
    wanted = json.loads(json.dumps(done.to_dict()))
    wanted.pop("seconds")
    assert said == wanted


def test_restore_gives_the_source_back(server: httpx2.Client) -> None:
    for source in (
        {"text": "é\r\n one\u0301 two 👩‍👩‍👧 three \x00 four"},
        {"documents": ["one two three", "four five six"]},
    ):
        done = server.post("/v1/compress", json={**source, "keep": 0.6, "question": "what?"}).json()
        back = server.post("/v1/restore", json={"text": done["text"], "patch": done["patch"]})
        assert back.json() == source
        assert done["prompt"].endswith("\n\nwhat?")


def test_restore_refuses_another_text(server: httpx2.Client) -> None:
    done = server.post("/v1/compress", json={"text": TEXT, "keep": 0.5}).json()
    answer = server.post("/v1/restore", json={"text": done["text"] + "!", "patch": done["patch"]})
    assert "another text" in error(answer, 422)


@pytest.mark.parametrize(
    ("rule", "stays"),
    [
        ({"literal": "four"}, "four"),
        ({"regex": "f[a-z]+r"}, "four"),
        ({"class": "numbers"}, "42"),
        ({"range": [8, 13]}, "three"),
        ({"range": [0, 8, 13]}, "three"),
    ],
)
def test_protect(server: httpx2.Client, rule: dict[str, Any], stays: str) -> None:
    body = {"text": "one two three four 42 five six", "tokens": 9, "protect": [rule]}
    said = server.post("/v1/compress", json=body).json()
    assert stays in said["text"]
    assert said["tokens_after"] <= 9
    assert len(said["protected"]) == 1


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"text": TEXT, "kep": 0.5}, 422, "unknown field 'kep'; did you mean keep?"),
        ({"text": TEXT, "keep": 0.5, "protect": [{"litteral": "x"}]}, 422, "did you mean literal?"),
        ({"keep": 0.5}, 422, "give text, or documents"),
        ({"text": TEXT, "documents": [TEXT], "keep": 0.5}, 422, "give text, or documents"),
        ({"text": TEXT, "keep": 0.5, "tokens": 3}, 422, "give keep, or tokens"),
        ({"text": TEXT, "keep": 1.5}, 422, "keep: input should be less than or equal to 1"),
        ({"text": TEXT, "tokens": 0}, 422, "tokens: input should be greater than or equal to 1"),
        ({"text": TEXT, "tokens": True}, 422, "tokens: "),
        ({"text": TEXT, "keep": "0.5"}, 422, "keep: "),
        ({"text": TEXT}, 422, "has no threshold of its own"),
        ({"text": " ", "keep": 0.5}, 422, "the prompt is empty"),
        ({"text": 3, "keep": 0.5}, 422, "text: input should be a valid string"),
        ({"text": TEXT, "keep": 0.5, "method": "truncatoin"}, 422, "did you mean truncation?"),
        ({"text": TEXT, "keep": 0.5, "method": "snapkv"}, 422, "there is no prompt method 'snapkv'"),
        ({"text": TEXT, "keep": 0.5, "tokenizer": "/etc"}, 422, "known are default, minilm, characters"),
        ({"text": TEXT, "keep": 0.5, "protect": [{"literal": "a", "class": "numbers"}]}, 422, "give one of literal"),
        ({"text": TEXT, "keep": 0.5, "protect": [{}]}, 422, "give one of literal"),
        ({"text": TEXT, "keep": 0.5, "protect": [{"literal": None}]}, 422, "give one of literal"),
        ({"text": TEXT, "keep": 0.5, "protect": [{"class": "verbs"}]}, 422, "known are numbers"),
        ({"text": TEXT, "keep": 0.5, "protect": [{"regex": "("}]}, 422, "cannot be read as a regular expression"),
        ({"text": TEXT, "keep": 0.5, "protect": [{"range": [3, 99]}]}, 422, "there are no characters 3:99"),
        ({"text": TEXT, "tokens": 2, "protect": [{"literal": "three"}]}, 422, "what is protected takes 5 tokens"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    server: httpx2.Client, body: dict[str, Any], status: int, message: str
) -> None:
    assert message in error(server.post("/v1/compress", json=body), status)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b'{"text": "one', 400, "not JSON: Unterminated string starting at character 9"),
        (b"\xff\xfe\x00", 400, "body"),
        (b"", 422, "the body: field required"),
        (b"[1]", 422, "the body: "),
        (b'{"text": "a \\ud800 b", "keep": 0.5}', 422, "half of a surrogate pair"),
        (b"[" * 100_000, 400, "body"),
    ],
)
def test_bodies_that_are_none(server: httpx2.Client, body: bytes, status: int, message: str) -> None:
    answer = server.post("/v1/compress", content=body, headers={"content-type": "application/json"})
    assert message in error(answer, status)


def test_errors_do_not_repeat_the_text(server: httpx2.Client) -> None:
    answer = server.post("/v1/compress", json={"text": ["secret words"], "keep": "secret words"})
    assert "secret" not in answer.text


def test_other_types_and_methods_and_hosts_are_refused(server: httpx2.Client) -> None:
    body = json.dumps({"text": TEXT, "keep": 0.5}).encode()
    assert "text/plain" in error(server.post("/v1/compress", content=body, headers={"content-type": "text/plain"}), 415)
    error(server.get("/v1/compress"), 405)
    error(server.get("/nowhere"), 404)
    assert "evil.example" in error(server.get("/health", headers={"host": "evil.example"}), 403)
    assert server.get("/health", headers={"host": "localhost:1"}).status_code == 200
    port = server.base_url.port
    assert server.options("/v1/compress", headers={"origin": f"http://localhost:{port}"}).status_code == 405


@pytest.mark.parametrize("host", ["LOCALHOST:1", "localhost.:1", "LocalHost", "127.0.0.1", "127.1:80", "[::1]:80"])
def test_own_names_are_known_in_any_spelling(server: httpx2.Client, host: str) -> None:
    assert server.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["", "127.0.0.1.evil.example", "localhost.evil.example", "0", "a..b", "x" * 99])
def test_names_of_others_are_refused(server: httpx2.Client, host: str) -> None:
    assert "own names" in error(server.get("/health", headers={"host": host}), 403)


@pytest.mark.parametrize("host", ["LOCALHOST", "localhost.", "127.1", "2130706433", "::1", "[::1]", "::ffff:127.0.0.1"])
def test_the_guard_is_on_for_every_spelling_of_this_machine(host: str) -> None:
    assert Settings(method="truncation", host=host).local
    with serving(host=host) as client:
        assert client.get("/health").status_code == 200
        error(client.get("/health", headers={"host": "evil.example"}), 403)


@pytest.mark.parametrize("host", ["::", "0", "192.168.0.1", "example.com", "127.0.0.1.example.com", "a\0b"])
def test_addresses_that_others_reach(host: str) -> None:
    assert not Settings(method="truncation", host=host).local


# limits


def chunks(n: int) -> Iterator[bytes]:
    for _ in range(n):
        yield b"x" * 100_000


def test_bodies_that_are_too_large() -> None:
    with serving(limit_mb=0.1) as client:
        kind = {"content-type": "application/json"}
        body = json.dumps({"text": "word " * 2_000_000, "keep": 0.5}).encode()
        assert len(body) > 10_000_000
        assert "more than 0.1 MB" in error(client.post("/v1/compress", content=body, headers=kind), 413)
        assert "more than 0.1 MB" in error(client.post("/v1/compress", content=chunks(5), headers=kind), 413)
        assert "more than 0.8 MB" in error(client.post("/v1/restore", content=chunks(9), headers=kind), 413)
        text = "né " * 24_000  # just below the limit, and its patch, escaped twice, above it
        done = client.post(
            "/v1/compress", content=json.dumps({"text": text, "keep": 0.1}, ensure_ascii=False).encode(), headers=kind
        ).json()
        back = {"text": done["text"], "patch": done["patch"]}
        assert len(json.dumps(back)) > 100_000
        assert client.post("/v1/restore", json=back).json() == {"text": text}


@dataclass(frozen=True)
class Slow:
    """A method that waits until it is let go on."""

    model: str | None = "slow"

    card: ClassVar[Card] = Card(source="a test", faithfulness="own", mechanism="extract")
    needs: ClassVar[frozenset[object]] = frozenset()
    go_on: ClassVar[threading.Event] = threading.Event()
    together: ClassVar[list[int]] = [0, 0]  # how many run, and the most that ever did
    lock: ClassVar[threading.Lock] = threading.Lock()

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        with self.lock:
            self.together[0] += 1
            self.together[1] = max(self.together)
        self.go_on.wait(20)
        with self.lock:
            self.together[0] -= 1
        return Ranking(source.words, np.zeros(len(source.words)))


@dataclass(frozen=True)
class Endless:
    """A method whose model is run again and again."""

    card: ClassVar[Card] = Slow.card
    needs: ClassVar[frozenset[object]] = frozenset()
    ended: ClassVar[threading.Event] = threading.Event()

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        layer = torch.nn.Linear(2, 2)
        try:
            while True:
                layer(torch.zeros(1, 2))
        finally:
            self.ended.set()


@dataclass(frozen=True)
class Failing:
    """A method with a fault, which quotes the prompt."""

    card: ClassVar[Card] = Slow.card
    needs: ClassVar[frozenset[object]] = frozenset()

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        raise RuntimeError(source.documents[0])


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Slow]]:
    monkeypatch.setitem(METHODS, "slow", Slow)
    Slow.go_on.clear()
    Slow.together[:] = [0, 0]
    yield Slow
    Slow.go_on.set()


ASKED = {"text": TEXT, "keep": 0.5, "method": "slow"}


def test_what_takes_too_long_is_told_so(slow: type[Slow]) -> None:
    with serving(timeout=0.4) as client, ThreadPoolExecutor() as pool:
        start = time.monotonic()
        calls = [pool.submit(client.post, "/v1/compress", json=ASKED) for _ in range(2)]
        said = sorted(error(call.result(), 504) for call in calls)
        assert said[0].startswith("calls before it took more than 0 s")
        assert said[1].startswith("compressing took more than 0 s")
        assert time.monotonic() - start < 5
        assert client.get("/health").json()["running"] == 1  # a thread cannot be stopped, and is counted
        assert client.post("/v1/compress", json={**ASKED, "method": "truncation"}).status_code == 200
        slow.go_on.set()
        until(lambda: client.get("/health").json()["running"] == 0)


def test_a_model_stops_when_nobody_waits_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "endless", Endless)
    Endless.ended.clear()
    hooks = torch.nn.modules.module._global_forward_pre_hooks
    had = len(hooks)
    with serving(timeout=0.3) as client:
        assert "compressing took" in error(client.post("/v1/compress", json={**ASKED, "method": "endless"}), 504)
        assert Endless.ended.wait(5)
        until(lambda: client.get("/health").json()["running"] == 0)
        assert len(hooks) == had + 1
    assert len(hooks) == had  # the server's has gone with it


def test_methods_that_share_one_of_two_models_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """SCOPE ranks with one model and writes with the one that others read with."""
    together = [0, 0]

    @dataclass(frozen=True)
    class Two(Slow):
        model: str = "encoder"
        rewrite: str = "writer"

        def rank(self, source: Source, budget: Budget | None) -> Ranking:
            together[0] += 1
            together[1] = max(together)
            time.sleep(0.1)
            together[0] -= 1
            return Ranking(source.words, np.zeros(len(source.words)))

    @dataclass(frozen=True)
    class One(Two):
        model: str = "writer"
        rewrite: None = None  # type: ignore[assignment]

    assert models_of(Two()) == ("encoder", "writer") and models_of(One()) == ("writer",)
    monkeypatch.setitem(METHODS, "two", Two)
    monkeypatch.setitem(METHODS, "one", One)
    with serving() as client, ThreadPoolExecutor(6) as pool:
        asked = [{**ASKED, "method": name} for name in ("one", "two") * 3]
        said = list(pool.map(lambda body: client.post("/v1/compress", json=body).status_code, asked))
    assert said == [200] * 6 and together == [0, 1]


def test_no_more_wait_than_may(slow: type[Slow]) -> None:
    with serving(queue=3) as client, ThreadPoolExecutor() as pool:
        calls = [pool.submit(client.post, "/v1/compress", json=ASKED) for _ in range(3)]
        until(lambda: client.get("/health").json() | {"running": 1, "waiting": 2} == client.get("/health").json())
        refused = client.post("/v1/compress", json=ASKED)
        assert "3 calls wait or run" in error(refused, 503)
        assert refused.headers["retry-after"] == "1"
        slow.go_on.set()
        assert [call.result().status_code for call in calls] == [200] * 3
        assert slow.together[1] == 1  # a model runs one at a time
        assert client.post("/v1/compress", json=ASKED).status_code == 200


def test_a_pattern_that_backtracks_holds_nobody_up(server: httpx2.Client) -> None:
    body = {"text": "a" * 5000 + "!", "keep": 0.5, "protect": [{"regex": "(a|aa)+$"}]}
    with ThreadPoolExecutor() as pool:
        call = pool.submit(server.post, "/v1/compress", json=body)
        time.sleep(0.3)
        start = time.monotonic()
        assert server.get("/health").json()["running"] == 1
        assert time.monotonic() - start < 1
        assert "backtracks" in error(call.result(), 422)


def until(done: Any) -> None:
    end = time.monotonic() + 10
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_fifty_at_once(server: httpx2.Client) -> None:
    def ask(i: int) -> str:
        text = f"{i} " + LONG
        with httpx2.Client(base_url=server.base_url, timeout=30) as client:
            done = client.post("/v1/compress", json={"text": text, "keep": 0.3}).json()
            back = client.post("/v1/restore", json={"text": done["text"], "patch": done["patch"]}).json()
        assert back["text"] == text
        return str(done["text"])

    with ThreadPoolExecutor(50) as pool:
        texts = list(pool.map(ask, range(100)))
    assert [text.split()[0] for text in texts] == [str(i) for i in range(100)]


# what it says of itself


def test_methods_are_those_of_the_command_line(server: httpx2.Client) -> None:
    assert server.get("/methods").json() == [describe(name) for name in METHODS]
    assert [m["name"] for m in server.get("/methods?family=prompt").json()] == list(of_family("prompt"))


def test_a_family_that_is_none(server: httpx2.Client) -> None:
    assert "known families are kv, prompt, vit, vlm" in error(server.get("/methods?family=promt"), 422)


def test_health(server: httpx2.Client) -> None:
    said = server.get("/health").json()
    assert said == {
        "status": "ok", "version": fewer.__version__, "method": "truncation", "keep": 0.5, "upstream": False,
        "running": 0, "waiting": 0,
    }  # fmt: skip


def test_the_page_may_load_nothing_from_elsewhere(server: httpx2.Client) -> None:
    page, other = server.get("/"), server.get("/")
    policy = page.headers["content-security-policy"]
    (nonce,) = set(re.findall(r"nonce-([\w-]+)", policy))
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert page.text.count(f'nonce="{nonce}"') == 2 and "{{" not in page.text
    assert nonce not in other.text
    assert not re.search(r"https?://|innerHTML|insertAdjacent|document\.write|eval\(", page.text)
    assert page.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "none"}, "there is no prompt method 'none'"),
        ({"keep": 1.5}, "1.5"),
        ({"limit_mb": 0.0}, "limit_mb=0.0"),
        ({"frozen": -1}, "frozen=-1"),
        ({"host": ""}, "host='' would be every address"),
        ({"protect": ("verbs",)}, "no class 'verbs'"),
        ({"upstream": "api.example"}, "upstream='api.example'"),
        ({"upstream": "http://h:x/"}, "no URL"),
        ({"upstream": "ftp://h/"}, "give http"),
        ({"upstream": "http://h/v1?key=1"}, "no more"),
        ({"upstream": f"http://me:{SECRET}@h/v1"}, "clients send the key"),
        ({"limit_mb": float("inf")}, "limit_mb=inf must be a number, at most 1e+09"),
        ({"limit_mb": float("nan")}, "limit_mb=nan must be a number"),
        ({"limit_mb": 1e305}, "limit_mb=1e+305 must be a number"),
        ({"timeout": float("inf")}, "timeout=inf must be a number"),
        ({"workers": 0}, "workers=0 must be a whole number, at least 1"),
    ],
)
def test_settings_that_cannot_work(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(FewerError, match=re.escape(message)) as raised:
        Settings(**{"method": "truncation", **wrong})
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"upstream": 5}, "upstream=5 must be text"),
        ({"host": None}, "host=None must be text"),
        ({"tokenizer": 5}, "tokenizer=5 must be text"),
        ({"keep": "50%"}, "keep='50%' cannot be read"),
        ({"protect": "numbers"}, "protect='numbers' must be a tuple of names"),
        ({"protect": None}, "protect=None must be a tuple of names"),
        ({"protect": (["numbers"],)}, "protect=(['numbers'],) must be a tuple of names"),
        ({"limit_mb": "5"}, "limit_mb='5' must be a number"),
        ({"timeout": "5"}, "timeout='5' must be a number"),
        ({"upstream_timeout": None}, "upstream_timeout=None must be a number"),
        ({"upstream_timeout": True}, "upstream_timeout=True must be a number"),
        ({"workers": 2.5}, "workers=2.5 must be a whole number, at least 1"),
        ({"queue": float("inf")}, "queue=inf must be a whole number"),
        ({"frozen": "1"}, "frozen='1' must be a whole number, at least 0"),
    ],
)
def test_settings_of_the_wrong_type(wrong: dict[str, Any], message: str) -> None:
    made = object.__new__(Settings)  # tests check the types of calls, which users' programs do not
    vars(made).update({**vars(Settings(method="truncation")), **wrong})
    with pytest.raises(FewerError, match=re.escape(message)):
        made.__post_init__()


def test_where_chats_go() -> None:
    for base in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert Settings(method="truncation", upstream=base).chats == "http://h:1/v1/chat/completions"
    assert Settings(method="truncation", upstream="https://h/api/x").chats == "https://h/api/x/chat/completions"


# chats


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    made = Upstream()
    with made.listening() as url:
        made.url = url  # type: ignore[attr-defined]
        yield made


@pytest.fixture(scope="module")
def proxy(upstream: Upstream) -> Iterator[httpx2.Client]:
    url = upstream.url  # type: ignore[attr-defined]
    with serving(upstream=url, upstream_timeout=1.0, keep=0.5) as client:
        yield client


def chat(model: str = "echo", **more: Any) -> dict[str, Any]:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": LONG},
        {"role": "assistant", "content": LONG},
        {"role": "user", "content": LONG + "Where is the fox?"},
    ]
    return {"model": model, "messages": messages, **more}


PATH = "/v1/chat/completions"


def test_a_chat_is_forwarded_shorter(proxy: httpx2.Client, upstream: Upstream) -> None:
    asked = chat(temperature=0.1, tools=[{"type": "function", "function": {"name": "f"}}], seed=2**70, unknown=[1.5])
    headers = {"authorization": f"Bearer {SECRET}", "openai-organization": "o", "x-fewer-other": "1"}
    answer = proxy.post(f"{PATH}?api-version=3", json=asked, headers=headers)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "yes"
    came = upstream.chat
    assert list(came) == list(asked)
    assert {k: v for k, v in came.items() if k != "messages"} == {k: v for k, v in asked.items() if k != "messages"}
    assert [m["role"] for m in came["messages"]] == [m["role"] for m in asked["messages"]]
    assert came["messages"][2] == asked["messages"][2]  # assistant turns stay
    assert sum(len(m["content"]) for m in came["messages"]) < sum(len(m["content"]) for m in asked["messages"])
    before, after, saved = (int(answer.headers[f"x-fewer-tokens-{name}"]) for name in ("before", "after", "saved"))
    assert before - after == saved > 0
    sent = upstream.headers[-1]
    assert sent["authorization"] == f"Bearer {SECRET}"
    assert sent["openai-organization"] == "o"
    assert "x-fewer-other" not in sent
    assert sent["host"] in str(upstream.url)  # type: ignore[attr-defined]
    assert upstream.queries[-1] == "api-version=3"


def test_a_budget_that_cannot_be_met_is_said_and_the_chat_goes_on_whole(upstream: Upstream) -> None:
    body = json.dumps(chat()).replace("fox", "4711").encode()
    with serving(upstream=upstream.url, keep=0.01, protect=("numbers",)) as client:  # type: ignore[attr-defined]
        answer = client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    assert "what is protected takes" in answer.headers["x-fewer-skipped"]
    assert answer.headers["x-fewer-tokens-saved"] == "0"
    assert upstream.bodies[-1] == body


def test_small_chats_go_through(proxy: httpx2.Client, upstream: Upstream) -> None:
    said = [("user", "a"), ("assistant", ""), ("user", "b c"), ("tool", "x"), ("user", "one two\n\nthree?\n\n4")]
    for n in range(1, len(said) + 1):
        messages = [{"role": role, "content": content} for role, content in said[:n]]
        messages += [{"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "function": {"name": "f"}}]}]
        assert proxy.post(PATH, json={"messages": messages}).status_code == 200
        came = upstream.chat["messages"]
        assert len(came) == n + 1 and came[-1] == messages[-1]
        assert all(now["content"] or not was["content"] for now, was in zip(came, messages, strict=True))


def test_bypass_forwards_the_bytes_as_they_came(proxy: httpx2.Client, upstream: Upstream) -> None:
    body = b'{ "model" : "echo", "messages": [ {"role": "user", "content": "' + LONG.encode() + b'"} ], "x": 1.0e3 }'
    kind = {"content-type": "application/json"}
    answer = proxy.post(PATH, content=body, headers={**kind, "x-fewer-bypass": "1"})
    assert upstream.bodies[-1] == body
    assert "x-fewer-bypass" not in upstream.headers[-1]
    assert "x-fewer-tokens-saved" not in answer.headers
    proxy.post(PATH, content=body, headers={**kind, "x-fewer-bypass": "0"})
    assert len(upstream.bodies[-1]) < len(body)


@pytest.mark.parametrize("said", ["1", "true", "Yes", "on", "", "0", "False", "no", "OFF"])
def test_words_for_a_bypass(proxy: httpx2.Client, said: str) -> None:
    answer = proxy.post(PATH, json=chat(), headers={"x-fewer-bypass": said})
    assert ("x-fewer-tokens-saved" in answer.headers) == (said not in ("1", "true", "Yes", "on"))


def test_nothing_is_added_to_what_a_client_sends(proxy: httpx2.Client, upstream: Upstream) -> None:
    request = httpx2.Request("POST", proxy.base_url.join(PATH), json=chat())
    proxy.send(request)
    assert set(upstream.headers[-1]) == {"host", "content-length", "content-type"}


def test_a_stream_comes_as_it_comes(proxy: httpx2.Client, upstream: Upstream) -> None:
    upstream.go_on.clear()
    with proxy.stream("POST", PATH, json=chat("events", stream=True)) as answer:
        parts = answer.iter_raw()
        assert next(parts) == b'data: {"n": 1}\n\n'  # while the upstream still waits
        upstream.go_on.set()
        rest = b"".join(parts)
    assert rest == b'data: {"n": "\xc3\xa9"}\n\ndata: [DONE]\n\n'
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert int(answer.headers["x-fewer-tokens-saved"]) > 0


def events(body: str) -> list[tuple[str, str]]:
    """What a reader of server-sent events sees: kind and data of each."""
    found = []
    for block in re.split(r"\n\n+", body.strip()):
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((lines.get("event", "message"), lines["data"]))
    return found


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("cut-events", "broke off"),
        ("silent-events", "silent for 1 s"),
        ("no-done", "ended its stream without [DONE]"),
    ],
)
def test_a_stream_that_breaks_off_ends_with_an_error(proxy: httpx2.Client, model: str, message: str) -> None:
    answer = proxy.post(PATH, json=chat(model, stream=True))
    assert answer.content.startswith(b'data: {"n": 1}\n\n')
    if model == "cut-events":
        assert b'data: {"n": "\xc3' in answer.content  # what came is there, all of it
    first, *_, (kind, last) = events(answer.content.decode(errors="replace"))
    assert first == ("message", '{"n": 1}')
    assert kind == "error"
    assert message in json.loads(last)["error"]["message"]


@pytest.mark.parametrize("model", STREAMS)
def test_only_streams_that_never_said_done_end_with_an_error(proxy: httpx2.Client, model: str) -> None:
    answer = proxy.post(PATH, json=chat(model, stream=True))
    came = b"".join(STREAMS[model])
    assert answer.status_code == (529 if model == "refused" else 200)
    assert answer.content.startswith(came)
    added = answer.content.removeprefix(came).decode()
    if "-in-" not in model:
        assert added == ""
    else:
        ((kind, said),) = events(added)
        assert kind == "error" and "without [DONE]" in said


def test_done_is_seen_wherever_the_stream_is_cut_into_parts() -> None:
    whole = b'data: {"n": 1}\r\n\r\ndata: [DONE]\r\n\r\n' + b": " + b"still here " * 20
    forwards = forwarding.Upstream(Settings(method="truncation", upstream="http://h"))

    async def passed(*parts: bytes) -> bytes:
        async def stream() -> AsyncIterator[bytes]:
            for part in parts:
                yield part

        response = httpx2.Response(200, content=stream())
        return b"".join([part async for part in forwards._streamed(response, True)])

    for cut in range(len(whole)):
        assert asyncio.run(passed(whole[:cut], whole[cut:])) == whole
    assert asyncio.run(passed(*(whole[i : i + 1] for i in range(len(whole))))) == whole


def test_other_streams_break_off_as_the_upstream_did(proxy: httpx2.Client) -> None:
    with proxy.stream("POST", PATH, json=chat("cut-lines", stream=True)) as answer:
        parts = answer.iter_raw()
        assert next(parts) == b'{"choices": '
        with pytest.raises(httpx2.RemoteProtocolError):
            next(parts)


def test_an_answer_that_breaks_off_is_an_error(proxy: httpx2.Client) -> None:
    assert "broke off (RemoteProtocolError) in the middle" in error(proxy.post(PATH, json=chat("cut")), 502)


def test_an_upstream_that_hangs(proxy: httpx2.Client) -> None:
    assert "silent for 1 s before it answered" in error(proxy.post(PATH, json=chat("hang")), 504)
    assert "silent for 1 s" in error(proxy.post(PATH, json=chat("hang", stream=True)), 504)


@pytest.mark.parametrize("model", ["hang", "hang-half"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_takes_its_call_with_it(
    caplog: pytest.LogCaptureFixture, model: str, stream: bool
) -> None:
    caplog.set_level(logging.INFO, "fewer.serve")
    body = json.dumps(chat(model, stream=stream)).encode()
    own = Upstream()
    with own.listening() as url, serving(upstream=url, upstream_timeout=20.0) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port)) as leaving:
            head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            leaving.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: own.bodies)
            time.sleep(0.3)  # so that half an answer has come, where there is one
            assert not own.left.is_set()
        assert own.left.wait(5)
        until(lambda: f"POST {PATH} 499" in caplog.text)
        assert client.post(PATH, json=chat()).status_code == 200
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_a_stream_is_let_go_of_where_its_client_left_before_its_first_part() -> None:
    closed = []

    class Parts(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"never asked for"

        async def aclose(self) -> None:
            closed.append(True)

    async def left() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def answered(version: str) -> None:
        async def send(message: Any) -> None:
            if version == "2.4":
                raise OSError  # which is how servers say it from then on

        forwards = forwarding.Upstream(Settings(method="truncation", upstream="http://h"))
        response = httpx2.Response(200, stream=Parts())
        scope = {"type": "http", "asgi": {"spec_version": version}}
        await forwarding._Stream(forwards._streamed(response, True), response)(scope, left, send)

    asyncio.run(answered("2.3"))
    assert closed == [True]
    with pytest.raises(ClientDisconnect):
        asyncio.run(answered("2.4"))
    assert closed == [True, True]


@pytest.mark.parametrize("status", [500, 429, 302])
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_upstream_refuses_is_passed_on(proxy: httpx2.Client, status: int, stream: bool) -> None:
    answer = proxy.post(PATH, json=chat(str(status), stream=stream))
    assert answer.status_code == status
    assert answer.json() == {"error": {"message": "no such thing"}}
    assert answer.headers["retry-after"] == "7"
    assert answer.headers["set-cookie"] == "a=1"


def test_cookies_of_one_client_do_not_reach_the_upstream_for_another(proxy: httpx2.Client, upstream: Upstream) -> None:
    proxy.post(PATH, json=chat("429"))
    with httpx2.Client(base_url=proxy.base_url) as other:
        other.post(PATH, json=chat())
    assert "cookie" not in upstream.headers[-1]


def test_no_upstream() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with serving(upstream=f"http://127.0.0.1:{port}/v1") as client:
        answer = client.post(PATH, json=chat())
    assert "cannot be reached" in error(answer, 502)
    assert not [name for name in answer.headers if name.startswith("x-fewer")]  # nothing was saved


def test_without_an_upstream_nothing_is_forwarded(server: httpx2.Client) -> None:
    assert "--upstream URL" in error(server.post(PATH, json=chat()), 501)
    for path in ("/v1/models", "/v1/models/a/b"):
        assert "--upstream URL" in error(server.get(path), 501)


@pytest.mark.parametrize("path", ["", "/", "/tiny", "/org/tiny:free", "/org%2Ftiny%20x", "/none"])
def test_models_are_those_of_the_upstream(proxy: httpx2.Client, upstream: Upstream, path: str) -> None:
    headers = {"authorization": f"Bearer {SECRET}", "x-fewer-other": "1"}
    answer = proxy.get(f"/v1/models{path}?limit=2&after=%C3%A9", headers=headers)
    assert (answer.status_code, answer.json()) == (404 if path == "/none" else 200, {"path": f"/v1/models{path}"})
    assert answer.headers["x-other"] == "1" and not [name for name in answer.headers if name.startswith("x-fewer")]
    assert upstream.queries[-1] == "limit=2&after=%C3%A9"
    sent = upstream.headers[-1]
    assert sent["authorization"] == f"Bearer {SECRET}" and "x-fewer-other" not in sent
    assert sent["host"] in str(upstream.url)  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", ["%2e%2e/secret", "a/%2e%2e%2f..", "a%3F/%2e%2e/%2e%2e/secret"])
def test_no_other_place_of_the_upstream_is_reached(proxy: httpx2.Client, upstream: Upstream, path: str) -> None:
    had = len(upstream.headers)
    error(proxy.get(f"/v1/models/{path}"), 404)
    assert len(upstream.headers) == had


def test_addresses_that_cannot_be_forwarded(proxy: httpx2.Client) -> None:
    with socket.create_connection((proxy.base_url.host, proxy.base_url.port)) as client:
        client.sendall(b"GET /v1/models?a=#b HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
def test_what_else_openai_has_is_not_forwarded(proxy: httpx2.Client, path: str) -> None:
    said = error(proxy.post(path, json={}), 404)
    assert "only chats, /v1/chat/completions, and the list of models, /v1/models, are forwarded" in said


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not JSON: "),
        (b"\xff", "byte 0 is not UTF-8"),
        (b"[]", "is no chat"),
        (b'{"messages": "hi"}', "list of messages"),
        (b'{"messages": []}', "list of messages"),
        (b'{"messages": ["hi"]}', "each of its messages"),
        (b'{"messages": [{"role": "user", "content": "hi"}], "n": NaN}', "NaN is no number"),
        (b'{"messages": [{"role": "user", "content": "hi"}], "n": 1e999}', "1e999 is no number"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"seed": -' + b"9" * 5000 + b"}", "a whole number of 5,000 digits, which is too long"),
    ],
)
def test_chats_that_are_none(proxy: httpx2.Client, upstream: Upstream, body: bytes, message: str) -> None:
    had = len(upstream.bodies)
    answer = proxy.post(PATH, content=body, headers={"content-type": "application/json"})
    assert message in error(answer, 400)
    assert len(upstream.bodies) == had


# what it tells nobody


def test_an_unexpected_error_is_not_told_in_full(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(METHODS, "failing", Failing)
    caplog.set_level(logging.INFO, "fewer.serve")
    with serving() as client:
        answer = client.post("/v1/compress", json={"text": SECRET + LONG, "keep": 0.5, "method": "failing"})
    assert "RuntimeError" in error(answer, 500)
    assert SECRET not in answer.text + caplog.text
    assert "RuntimeError at " in caplog.text and "test_serve.py" in caplog.text


def test_the_log_holds_no_prompts_and_no_keys(upstream: Upstream) -> None:
    url = upstream.url  # type: ignore[attr-defined]
    command = [sys.executable, "-c", "from fewer.cli import main; main()", "serve", "--port", "0"]
    command += ["--method", "truncation", "--tokenizer", "characters", "--upstream", url, "--upstream-timeout", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}) as started:  # noqa: S603
        assert started.stderr is not None
        lines = []
        while not (found := re.search(r"chats sent to (http://\S+)/v1", lines[-1] if lines else "")):
            lines.append(started.stderr.readline())
            assert lines[-1], lines
        headers = {"authorization": f"Bearer {SECRET}", "x-api-key": SECRET}
        with httpx2.Client(base_url=found[1], headers=headers, timeout=30) as client:
            until(lambda: _answers(client))
            for model in ("echo", "500", "hang", "cut", "cut-events"):
                asked = chat(model, stream=model == "cut-events", user=SECRET)
                asked["messages"][1]["content"] += SECRET
                client.post(f"{PATH}?key={SECRET}", json=asked)
            client.post("/v1/compress", json={"text": SECRET, "keep": 0.5, SECRET: 1})
            client.get(f"/nowhere?key={SECRET}")
        started.terminate()
        said = "".join(lines) + started.stderr.read()
    assert SECRET not in said and "fox" not in said
    assert said.count("POST /v1/chat/completions") == 5
    assert "GET /nowhere 404" in said
    assert "the upstream was silent for 1 s" in said


def _answers(client: httpx2.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx2.ConnectError:
        return False


def test_a_port_that_is_taken(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fewer import cli

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr("sys.argv", ["fewer", "serve", "--port", port, "--method", "truncation"])
        with pytest.raises(SystemExit) as left:
            cli.main()
    assert left.value.code == 2
    assert "cannot listen there" in capfd.readouterr().err


@pytest.mark.slow
def test_a_shared_model_gives_each_client_its_own_answer() -> None:
    texts = [f"{LONG} The key number {i} is under the mat. {'It rains again. ' * (i + 1)}" for i in range(8)]
    asked = {"method": "recomp-extractive", "keep": 0.2, "question": "Where is the key?"}
    wanted = [fewer.compress_prompt(text, **asked).text for text in texts]
    with serving(tokenizer=None) as client, ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda text: client.post("/v1/compress", json={"text": text, **asked}).json(), texts))
    assert [done["text"] for done in made] == wanted
    assert {done["tokenizer"] for done in made} == {"default"}
