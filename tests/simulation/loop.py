"""An event loop with virtual time, in which processes can be killed and frozen."""

from __future__ import annotations

import asyncio
import heapq
import sys
from asyncio import events
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from itertools import count
from random import Random
from typing import Any


class Callback:
    """What a loop is to run, and for which process. See ``asyncio.TimerHandle``."""

    __slots__ = ("_when", "arguments", "context", "function", "incarnation")

    def __init__(
        self,
        function: Callable[..., object],
        arguments: tuple[object, ...],
        context: Context,
        when: float,
    ) -> None:
        self.function: Callable[..., object] | None = function
        """None: the callback was cancelled, maybe while its process is frozen."""
        self.arguments = arguments
        self.context = context
        self.incarnation = context.get(_CURRENT)
        self._when = when

    def cancel(self) -> None:
        """Do not run it."""
        self.function = None
        self.arguments = ()

    def cancelled(self) -> bool:
        """Whether it will not run."""
        return self.function is None

    def when(self) -> float:
        """The virtual time at which it is due."""
        return self._when


class Incarnation:
    """One life of a simulated process. Callbacks of its tasks run only while it lives.

    A killed process runs nothing any more, not even ``finally``: as after SIGKILL. A frozen one
    goes on where it was, as after SIGSTOP and SIGCONT.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.frozen = False
        self.held: list[Callback] = []
        """They wait until it is thawed."""
        self._context = Context()
        self._context.run(_CURRENT.set, self)

    def run(self, function: Callable[..., Any], *arguments: object) -> Any:
        """Call a function as this process: tasks that it makes belong to it."""
        return self._context.copy().run(function, *arguments)

    def kill(self) -> None:
        """End it between two callbacks."""
        self.alive = False
        self.held.clear()


_CURRENT: ContextVar[Incarnation | None] = ContextVar("incarnation", default=None)


def current() -> Incarnation | None:
    """The process that the running callback belongs to."""
    return _CURRENT.get()


class NothingLeftError(Exception):
    """Every task waits for something that nothing will bring about."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs callbacks in the order of their virtual time; what they compute takes no time.

    It has of an event loop what a simulation uses: no files, no threads, no signals. asyncio's own
    takes three times as long for a callback.

    Args:
        random: how long work in threads takes.
    """

    def __init__(self, random: Random) -> None:
        super().__init__()
        self._random = random
        self._now = 0.0
        self._ready: deque[Callback] = deque()
        self._timers: list[tuple[float, int, Callback]] = []
        """A heap. Numbers keep those of one moment in the order in which they were made."""
        self._numbers = count()
        self._handler: Callable[[Any, dict[str, Any]], object] | None = None
        self.callbacks = 0
        """How many have run."""
        self.tasks: list[asyncio.Task[Any]] = []
        """All there were: a task of a killed process must not be finalised, which would run its
        ``finally`` blocks."""

    def time(self) -> float:
        return self._now

    def is_running(self) -> bool:
        return events._get_running_loop() is self

    def close(self) -> None:
        """Let go of all that was to run."""
        super().close()
        self._timers.clear()

    # -- what is to run ----------------------------------------------------------------------------

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Callback:
        entry = Callback(callback, args, copy_context() if context is None else context, self._now)
        self._ready.append(entry)
        return entry

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> Callback:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> Callback:
        entry = Callback(callback, args, copy_context() if context is None else context, when)
        heapq.heappush(self._timers, (when, next(self._numbers), entry))
        return entry

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """A thread: it runs at one moment a little later, even if its caller was cancelled."""
        future: asyncio.Future[Any] = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except BaseException as error:
                if not future.cancelled():
                    future.set_exception(error)
            else:
                if not future.cancelled():
                    future.set_result(result)

        self.call_later(self._random.uniform(0, 0.002), work)
        return future

    def thaw(self, incarnation: Incarnation) -> None:
        """Let a frozen process go on."""
        incarnation.frozen = False
        self._ready += incarnation.held
        incarnation.held = []

    # -- tasks -------------------------------------------------------------------------------------

    def create_task(  # type: ignore[override]
        self, coro: Any, *, name: str | None = "", context: Context | None = None
    ) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        self.tasks.append(task)
        if len(self.tasks) > 10_000:
            self.tasks = [task for task in self.tasks if not task.done()]
        return task

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Run a task that nobody awaits: if it fails, so does the run."""
        self.create_task(coroutine).add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.call_exception_handler({"message": "a task failed", "exception": error})

    def set_exception_handler(
        self, handler: Callable[[Any, dict[str, Any]], object] | None
    ) -> None:
        self._handler = handler

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self._handler is not None:
            self._handler(self, context)

    # -- running -----------------------------------------------------------------------------------

    def run_until_complete(self, future: Any) -> Any:
        """Run until a coroutine has ended; its result.

        Raises:
            NothingLeftError: it never will.
        """
        task = asyncio.ensure_future(future, loop=self)
        before = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(finalizer=self._abandoned)
        events._set_running_loop(self)
        try:
            while not task.done():
                if self._ready:
                    self._run(self._ready.popleft())
                else:
                    self._advance()
            for entry in [*self._ready]:  # tasks that were made last begin, and can be cancelled
                self._run(entry)
        finally:
            events._set_running_loop(None)
            sys.set_asyncgen_hooks(*before)
        return task.result()

    def _advance(self) -> None:
        """Let time jump to the next timer."""
        while self._timers:
            when, _, entry = heapq.heappop(self._timers)
            if entry.function is not None:
                self._now = max(self._now, when)
                self._ready.append(entry)
                return
        raise NothingLeftError

    def _run(self, entry: Callback) -> None:
        if entry.function is None:
            return
        incarnation = entry.incarnation
        if incarnation is not None:
            if not incarnation.alive:
                return
            if incarnation.frozen:
                incarnation.held.append(entry)
                return
        self.callbacks += 1
        try:
            entry.context.run(entry.function, *entry.arguments)
        except Exception as error:
            self.call_exception_handler({"message": "a callback failed", "exception": error})

    def _abandoned(self, generator: AsyncGenerator[Any, None]) -> None:
        self.call_soon(self.create_task, generator.aclose())
