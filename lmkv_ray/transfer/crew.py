"""Threads that start when they can."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from lmkv_ray.complaints import Complaints

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
"""After a thread could not be started, until the next attempt."""
CLOSE_SECONDS = 10.0
"""Within which what is under way must have ended, or is left to the end of the process."""


@dataclass(frozen=True, slots=True)
class _Task:
    future: Future[Any]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def do(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.function(*self.arguments))
        except Exception as error:
            self.future.set_exception(error)


class Crew:
    """Does what it is told, in order, on up to so many threads.

    A system may refuse threads for a while (a limit on processes). What is asked for while there is
    none at all is cancelled at once, and never done: in the queue of a ``ThreadPoolExecutor`` it
    would stay, and be done when its blocks are another's. One thread is enough to go on.

    Args:
        threads: at most.
        name: the beginning of the threads' names.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._most = threads
        self._name = name
        self._threads: list[threading.Thread] = []
        self._retry_at = 0.0
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._complaints = Complaints(logger)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have something done; the future is cancelled already if there is no thread."""
        task = _Task(Future(), function, arguments)
        self._recruit()
        if self._threads:
            self._tasks.put(task)
        else:
            task.future.cancel()
            task.future.set_running_or_notify_cancel()
        return task.future

    def close(self) -> None:
        """Begin nothing more, and wait for what is under way."""
        while True:
            try:
                task = self._tasks.get_nowait()
            except Empty:
                break
            if task is not None:
                task.future.cancel()
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._threads, self._most = [], 0

    def _recruit(self) -> None:
        if len(self._threads) >= self._most or time.monotonic() < self._retry_at:
            return
        try:
            while len(self._threads) < self._most:
                number = len(self._threads)
                name = f"{self._name}-{number}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
        except (RuntimeError, MemoryError) as error:
            self._retry_at = time.monotonic() + RETRY_SECONDS
            self._complaints.say(
                f"{self._name}: {len(self._threads)} of {self._most} threads can be started "
                f"({error}). Next step: raise the limit on processes (ulimit -u, pids.max)."
            )

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task.do()
            del task  # or it would keep the arena mapped until the next one
