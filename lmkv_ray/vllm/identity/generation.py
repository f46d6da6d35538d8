"""Generation: which weights an engine has by now, as its workers have read them from their memory.

It is a field of the namespace: "" for the weights that the engine was loaded with, else a name of
the bytes there are (``weights_watch``). It is in doubt when a worker found something suspicious,
when vLLM's prefix cache was emptied, and when vLLM wants ours to be: so nothing is looked up or
saved before the workers have looked again, which they are asked to do as late as possible, by the
first request that wants to know: weights may be written before a reset as well as after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from hashlib import blake2b

from lmkv_ray.vllm.engine.metadata import WorkerReport
from lmkv_ray.vllm.identity.ages import Identity

CHECK_SECONDS = 10.0
"""Requests wait so long for the answer; then they are computed without the cache."""


class Generation:
    """One per engine; on the engine's thread.

    Args:
        identity: whose chunks these are.
        workers: how many there are.
        clock: seconds.
    """

    def __init__(
        self, identity: Identity, workers: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._identity = identity
        self._workers = workers
        self._clock = clock
        self._number = 0
        self._doubted = self._ordered = False
        self._wanted_at: float | None = None
        self._answers: dict[int, str] = {}
        self._name = ""

    def doubt(self) -> None:
        """The weights may be others from now on."""
        self._identity.doubt("generation")
        self._number += 1
        self._doubted, self._ordered, self._wanted_at = True, False, None
        self._answers = {}

    def wanted(self) -> bool:
        """The scheduler half asks. Whether an answer is awaited, and may still come in time."""
        if not self._doubted:
            return False
        now = self._clock()
        if self._wanted_at is None:
            self._wanted_at = now
        return now < self._wanted_at + CHECK_SECONDS

    def order(self) -> int:
        """The number of the check that workers shall make in this step; 0: none."""
        if self._wanted_at is None or self._ordered:
            return 0
        self._ordered = True
        return self._number

    def take(self, report: WorkerReport) -> bool:
        """Take in what workers found.

        Returns:
            whether the weights have turned out to be others than at the last check, or may have
            been so since then: what was computed meanwhile is of no age, even if they are back.
        """
        before = self._name
        for rank, (number, name) in report.weights.items():
            if number == self._number:
                self._answers[rank] = name
        if self._doubted and len(self._answers) == self._workers:
            self._doubted, self._wanted_at = False, None
            self._name = _combined(self._answers)
            self._identity.learn(generation=self._name)
        if report.suspicious and (not self._doubted or self._ordered):
            self.doubt()
        return report.suspicious or self._name != before


def _combined(names: dict[int, str]) -> str:
    if not any(names.values()):
        return ""
    told = " ".join(f"{rank}:{name}" for rank, name in sorted(names.items()))
    return blake2b(told.encode(), digest_size=16).hexdigest()
