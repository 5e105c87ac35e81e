"""Ray: the lines of a bulk run shortened by the processes of a cluster. Needs the extra `ray`.

fewer prompt --in data.jsonl --out short.jsonl --engine ray      on the cluster of RAY_ADDRESS, else on this machine

Each line is a task. The driver alone takes in lines and writes them, in their order, so that none is lost or doubled,
however many workers die: a task whose worker died runs again elsewhere. A worker loads the method once. Nodes need the
driver's version of fewer.
"""

import os
import socket
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from fewer.prompts.bulk import Engine, Item, Outcome, Shortener
from fewer.types import FewerError

AHEAD = 4
"""Lines in work or waiting, for each core: enough that no worker waits for the driver, few enough to hold."""

_MINE: dict[str, Shortener] = {}
"""In a worker: the shortener of the run that it works for, with what it loaded."""


def engine(*, retries: int = 3, ahead: int = AHEAD) -> Engine:
    """The engine for `fewer.prompts.checkpoint.shorten_lines`.

    A cluster that the caller has connected to is used and left as it is; else that of RAY_ADDRESS, else one is started
    on this machine, without a dashboard, and ended with the run. Nothing is reported to anyone.

    Args:
        retries: how often a line runs again whose worker died.
        ahead: lines in work or waiting, for each core of the cluster.

    Raises:
        FewerError: Ray is not installed, no cluster answers, or a line's worker died every time.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read on import
    try:
        import ray
    except ImportError as why:
        raise FewerError(f"--engine ray wants Ray: pip install 'fewer[ray]' ({why})") from why

    def run(shortener: Shortener, items: Iterator[Item]) -> Iterator[Outcome]:
        mine = not ray.is_initialized()
        if mine:
            _connect(ray)
        waiting: deque[tuple[int, Any]] = deque()
        try:
            held, name = ray.put(shortener), uuid4().hex
            # a list, since an object that is an argument of its own would be fetched anew for every task
            ready = ray.remote(max_retries=retries)(_ready).remote(name, [held])
            if wrong := _got(ray, ready, "the first task", retries):
                raise FewerError(wrong)
            task = ray.remote(max_retries=retries, scheduling_strategy="SPREAD")(_shorten)
            bound = max(1, int(ray.cluster_resources().get("CPU", 1))) * ahead
            while True:
                for item in islice(items, bound - len(waiting)):
                    waiting.append((item.number, task.remote(name, [held], item.number, item.raw)))
                if not waiting:
                    return
                number, first = waiting.popleft()
                yield Outcome(*_got(ray, first, f"line {number}", retries))
        finally:
            for _, left in waiting:
                ray.cancel(left, force=True)
            if mine:
                ray.shutdown()

    return run


def _connect(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS")
    if address and (place := urlsplit(address if "//" in address else f"//{address}")).port:
        try:  # Ray ends the whole process where nothing answers
            socket.create_connection((place.hostname, place.port), timeout=10).close()
        except OSError as why:
            raise FewerError(f"--engine ray: RAY_ADDRESS={address}: nothing answers there ({why})") from None
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:  # "local", or it would look for a cluster that someone has started here
            ray.init(address="local", include_dashboard=False, **quiet)
    except (ConnectionError, OSError, RuntimeError, ValueError) as why:
        where = f"of RAY_ADDRESS={address}" if address else "on this machine"
        raise FewerError(f"--engine ray: no cluster {where} ({str(why).strip().splitlines()[0]})") from why


def _got(ray: Any, task: Any, what: str, retries: int) -> Any:
    """What a task gave.

    Raises:
        FewerError: its worker died every time.
    """
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError:
        raise  # the method's own error, with the place where it was raised
    except ray.exceptions.RayError as why:
        first = str(why).strip().splitlines()[0]
        raise FewerError(
            f"{what}: its worker died, {retries + 1} times ({type(why).__name__}: {first}). What was written "
            f"stays, and the same command goes on there"
        ) from why


def _ready(name: str, held: list[Any]) -> str:
    """In a worker: what is wrong with the settings, or nothing."""
    try:
        _mine(name, held).ready()
    except FewerError as why:
        return str(why)
    return ""


def _shorten(name: str, held: list[Any], number: int, raw: bytes) -> tuple[Any, ...]:
    """In a worker: one line."""
    return tuple(_mine(name, held)(Item(number, raw)))


def _mine(name: str, held: list[Any]) -> Shortener:
    if name not in _MINE:
        import ray

        _MINE.clear()
        _MINE[name] = ray.get(held[0])
    return _MINE[name]
