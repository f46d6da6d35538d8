"""What a service measures, on the Prometheus endpoint of Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ray.util.metrics import Counter, Gauge

from lmkv_ray.metrics.services import MetricKind, Sample

EXPORT_SECONDS = 5.0
"""Between two looks at the service; Ray itself reports every 10 s."""


class Exporter:
    """Gives samples to Ray.

    Args:
        samples: what the service measures now; asked at each step.
    """

    def __init__(self, samples: Callable[[], Iterable[Sample]]) -> None:
        self._samples = samples
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._reported: dict[tuple[str, tuple[str, ...]], float] = {}
        """By counter and labels: the value that Ray knows."""

    async def step(self) -> None:
        """Give Ray the values of now."""
        for sample in self._samples():
            if sample.metric.kind is MetricKind.GAUGE:
                self._set(sample)
            else:
                self._raise(sample)

    def _set(self, sample: Sample) -> None:
        metric = sample.metric
        if metric.name not in self._gauges:
            self._gauges[metric.name] = Gauge(metric.name, metric.text, metric.labels)
        self._gauges[metric.name].set(float(sample.value), _tags(sample))

    def _raise(self, sample: Sample) -> None:
        metric, known = sample.metric, (sample.metric.name, sample.labels)
        if metric.name not in self._counters:
            self._counters[metric.name] = Counter(metric.name, metric.text, metric.labels)
        counter = self._counters[metric.name]
        if known not in self._reported:
            # The series begins with 0, or Prometheus would not see the first increase. Ray's
            # public method takes no 0; the record behind it does.
            counter._record(0.0, _tags(sample))
            self._reported[known] = 0.0
        grown = sample.value - self._reported[known]
        if grown < 0:  # the service began anew within this process
            grown = sample.value
        if grown > 0:
            counter.inc(grown, _tags(sample))
        self._reported[known] = sample.value


def _tags(sample: Sample) -> dict[str, str]:
    return dict(zip(sample.metric.labels, sample.labels, strict=True))
