"""An event loop with virtual time, in which processes can be killed and frozen."""

from __future__ import annotations

import asyncio
import selectors
from asyncio import events
from collections.abc import Callable, Coroutine, Mapping
from contextvars import Context, ContextVar, copy_context
from random import Random
from typing import Any


class _Callback:
    """What a loop is to run."""

    __slots__ = ("arguments", "context", "function", "handle")

    def __init__(
        self, function: Callable[..., object], arguments: tuple[object, ...], context: Context
    ) -> None:
        self.function = function
        self.arguments = arguments
        self.context = context
        self.handle: events.Handle | None = None
        """By which it may be cancelled, also while its process is frozen."""


class Incarnation:
    """One life of a simulated process. Callbacks of its tasks run only while it lives.

    A killed process runs nothing any more, not even ``finally``: as after SIGKILL. A frozen one
    goes on where it was, as after SIGSTOP and SIGCONT.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.frozen = False
        self.held: list[_Callback] = []
        """They wait until it is thawed."""

    def run(self, function: Callable[..., Any], *arguments: object) -> Any:
        """Call a function as this process: tasks that it makes belong to it."""
        context = copy_context()
        context.run(_CURRENT.set, self)
        return context.run(function, *arguments)

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


class _NoFiles(selectors.BaseSelector):
    """Waiting costs no time: the loop's time jumps to the next timer."""

    def __init__(self) -> None:
        self._keys: dict[int, selectors.SelectorKey] = {}
        self.waited = 0.0

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        key = selectors.SelectorKey(fileobj, fd, events, data)
        self._keys[fd] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        return self._keys.pop(fd)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise NothingLeftError
        self.waited += max(timeout, 0)
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs callbacks in the order of their virtual time; what they compute takes no time.

    Args:
        random: how long work in threads takes.
    """

    def __init__(self, random: Random) -> None:
        self._files = _NoFiles()
        super().__init__(self._files)
        self._random = random
        self._clock_resolution = 1e-9
        self.callbacks = 0
        """How many have run."""
        self.tasks: list[asyncio.Task[Any]] = []
        """All there were: a task of a killed process must not be finalised, which would run its
        ``finally`` blocks."""
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self._files.waited

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> events.Handle:
        entry = _Callback(callback, args, copy_context() if context is None else context)
        entry.handle = super().call_soon(self._guarded, entry, context=entry.context)
        return entry.handle

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> events.TimerHandle:
        entry = _Callback(callback, args, copy_context() if context is None else context)
        handle = super().call_at(when, self._guarded, entry, context=entry.context)
        entry.handle = handle
        return handle

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
        held, incarnation.held = incarnation.held, []
        for entry in held:
            super().call_soon(self._guarded, entry, context=entry.context)

    def _guarded(self, entry: _Callback) -> None:
        incarnation = _CURRENT.get()
        if incarnation is not None:
            if not incarnation.alive:
                return
            if incarnation.frozen:
                incarnation.held.append(entry)
                return
        if entry.handle is not None and entry.handle.cancelled():
            return
        self.callbacks += 1
        entry.function(*entry.arguments)

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Run a task that nobody awaits: if it fails, so does the run."""
        self.create_task(coroutine).add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.call_exception_handler({"message": "a task failed", "exception": error})

    def _make_task(self, loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        self.tasks.append(task)
        if len(self.tasks) > 10_000:
            self.tasks = [task for task in self.tasks if not task.done()]
        return task
