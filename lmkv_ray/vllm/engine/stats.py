"""Counters of one engine, in vLLM's own statistics and on its Prometheus endpoint."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from lmkv_ray.complaints import Complaints, quote
from lmkv_ray.messages import MissReason
from lmkv_ray.metrics.engine import ENGINE_COUNTERS, MISSED_TOKENS, MISSED_TOKENS_TEXT
from lmkv_ray.vllm.engine.guard import never_raises, swallowed

if TYPE_CHECKING:
    from vllm.config import VllmConfig

complaints = Complaints(logging.getLogger(__name__))

MISSED = f"{MISSED_TOKENS}:"
"""Prefix of the counters of missed tokens, one per ``MissReason``."""


@dataclass
class LmkvStats(KVConnectorStats):
    """Sums since the last report; ``data`` maps a counter's name to its value."""

    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()  # copy threads add too

    def add(self, name: str, value: float) -> None:
        """Raise a counter."""
        with self._lock:
            self.data[name] = self.data.get(name, 0) + value

    def take(self) -> LmkvStats | None:
        """What was counted since the last call, with the errors that ended in this process."""
        if errors := swallowed.take():
            self.add("swallowed_errors", errors)
        with self._lock:
            data, self.data = self.data, {}
        return LmkvStats(data=data) if data else None

    def add_missed(self, reason: MissReason, tokens: int) -> None:
        """Count tokens that were not loaded."""
        self.add(MISSED + reason.value, tokens)

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Both sums as one."""
        self.data = {
            name: self.data.get(name, 0) + other.data.get(name, 0)
            for name in self.data.keys() | other.data.keys()
        }
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log line: the counters, and rates in GB/s."""
        line: dict[str, int | float] = dict(sorted(self.data.items()))
        for kind in ("load", "save"):
            seconds = line.pop(f"{kind}_seconds", 0)
            if seconds:
                line[f"{kind}_GB_per_s"] = round(line.get(f"{kind}_bytes", 0) / seconds / 1e9, 2)
        return line

    def reset(self) -> None:
        """Start again from nothing."""
        with self._lock:
            self.data = {}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class LmkvPromMetrics(KVConnectorPromMetrics):
    """``vllm:lmkv_*`` counters beside vLLM's own, with the same labels."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(
                name=f"vllm:lmkv_{name}", documentation=text, labelnames=labelnames
            )
            for name, text in ENGINE_COUNTERS.items()
        }
        self._missed = self._counter_cls(
            name=f"vllm:lmkv_{MISSED_TOKENS}",
            documentation=MISSED_TOKENS_TEXT,
            labelnames=[*labelnames, "reason"],
        )
        for labels in per_engine_labelvalues.values():  # there from the start, as zeros
            for counter in self._counters.values():
                counter.labels(*labels)
            for reason in MissReason:
                self._missed.labels(*labels, reason.value)

    @never_raises(None)
    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one report's sums."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            if name.startswith(MISSED):
                self._missed.labels(*labels, name.removeprefix(MISSED)).inc(value)
            elif (counter := self._counters.get(name)) is not None:
                counter.labels(*labels).inc(value)
            else:
                complaints.say(f"there is no metric called {quote(name)}: it is not exported.")
