"""Where compression runs: threads beside the one that talks to clients, a lane for each model, and an end in time.

A lane does its calls one after another, so a model is loaded once and never run twice at a time; a method of two models
has the lane of one and waits for the other. Methods without a model share a lane of several threads. The number of
calls that wait or run is bounded, all lanes together.

A thread cannot be stopped from outside. A call that is late is answered at once; its thread is told, and ends before
the next module of a torch model runs, or at the next `check()`. Until then it counts as running.
"""

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fewer.prompts.source import PromptMethod

T = TypeVar("T")


class Full(Exception):
    """Too many calls wait; nothing was begun."""


class Late(Exception):
    """A call took longer than it may."""


@dataclass(eq=False)
class _Call:
    """A call in a lane: whether its thread is to stop, and whether it began."""

    stop: threading.Event = field(default_factory=threading.Event)
    began: bool = False


_here = threading.local()


def check() -> None:
    """End this thread's call if nobody waits for it any more. Elsewhere than in a lane it does nothing."""
    call = getattr(_here, "call", None)
    if call is not None and call.stop.is_set():
        raise Late


def models_of(method: PromptMethod) -> tuple[str, ...]:
    """Names for the models that a method runs."""
    models = [getattr(method, name, None) for name in ("model", "rewrite", "summarise")]
    names = {one if isinstance(one, str) else f"{type(one).__name__} {id(one)}" for one in models if one is not None}
    return tuple(sorted(names))


class Lanes:
    """Threads for work that takes long.

    Args:
        workers: threads of the lane without a model.
        queue: how many calls may wait or run.
        seconds: how long a call may take, waiting included.
    """

    def __init__(self, workers: int, queue: int, seconds: float) -> None:
        from torch.nn.modules.module import register_module_forward_pre_hook

        self.workers, self.queue, self.seconds = workers, queue, seconds
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._models: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._calls: set[_Call] = set()
        self._lock = threading.Lock()
        self._hook = register_module_forward_pre_hook(lambda module, args: check())

    @property
    def busy(self) -> dict[str, int]:
        """How many calls run and how many wait."""
        with self._lock:
            running = sum(call.began for call in self._calls)
            return {"running": running, "waiting": len(self._calls) - running}

    async def run(self, models: Sequence[str], work: Callable[[], T]) -> T:
        """What `work` gives, done in the lane of the first of the models that it runs, while nothing else runs them.

        Raises:
            Full: as many calls as may already wait or run.
            Late: it was not done in time.
        """
        call = _Call()
        with self._lock:
            if len(self._calls) >= self.queue:
                raise Full(f"{len(self._calls)} calls wait or run, and no more may")
            self._calls.add(call)
            held = [self._models[name] for name in models]  # in one order for all, so that none waits in a circle
            future = self._pool(models[0] if models else "").submit(self._done, call, held, work)
        future.add_done_callback(lambda _: self._calls_without(call))
        waited = asyncio.wrap_future(future)
        start = time.monotonic()
        try:
            await asyncio.wait({waited}, timeout=self.seconds)
            if waited.done():
                return waited.result()
        finally:
            call.stop.set()  # also where the client went away
            self._forget(future, waited)
        what = "compressing took" if call.began else "calls before it took"
        raise Late(f"{what} more than {time.monotonic() - start:.0f} s; send less, or give --timeout more")

    def _done(self, call: _Call, models: Sequence[threading.Lock], work: Callable[[], T]) -> T:
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(model)
            call.began, _here.call = True, call
            try:
                check()
                return work()
            finally:
                _here.call = None

    def _pool(self, lane: str) -> ThreadPoolExecutor:
        if lane not in self._pools:
            self._pools[lane] = ThreadPoolExecutor(self.workers if lane == "" else 1, f"fewer {lane}".strip())
        return self._pools[lane]

    def _calls_without(self, call: _Call) -> None:
        with self._lock:
            self._calls.discard(call)

    @staticmethod
    def _forget(future: "Future[Any]", waited: "asyncio.Future[Any]") -> None:
        """Cancel a call that still waits; what one that runs will say is nobody's business any more."""
        if not waited.done():
            waited.add_done_callback(lambda done: done.cancelled() or done.exception())
            future.cancel()

    def close(self) -> None:
        """Stop every call, wait until their threads have ended, and take no more."""
        with self._lock:
            for call in self._calls:
                call.stop.set()
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)
        self._hook.remove()
