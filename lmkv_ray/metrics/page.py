"""docs/metrics.md, from the declarations of the metrics."""

from __future__ import annotations

from collections.abc import Iterable

from lmkv_ray.messages import MissReason
from lmkv_ray.metrics.engine import ENGINE_COUNTERS, MISSED_TOKENS, MISSED_TOKENS_TEXT
from lmkv_ray.metrics.services import SERVICE_METRICS

_INTRODUCTION = """\
# Metrics
Made by `lmkv metrics --markdown > docs/metrics.md`.

## Of shards and the directory
On the metrics port of Ray: `ray start --metrics-export-port=8080` fixes it; without that, Ray
chooses one for each node and writes all of them to `prom_metrics_service_discovery.json` in its
session directory, which Prometheus reads by `file_sd_configs`. Ray adds labels of its own
(`SessionName`, `NodeAddress`, `WorkerId`, ...). `node` is the beginning of Ray's node id, as in
`lmkv status`. A series exists from the start, with 0. A service that is restarted begins a new
series (another `WorkerId`): use `increase` and `rate`. A dashboard and alert rules:
[dashboards/](../dashboards/README.md).
"""
_ENGINES = """\
## Of engines
On the `/metrics` of vLLM, with the labels that vLLM's own metrics have. Under Ray Serve they are
on the metrics port of Ray, as `ray_vllm_lmkv_hit_tokens_total` and so on.
"""
_REASONS = """\
## Reasons of missed tokens
The values of the label `reason` (`MissReason` in `lmkv_ray/messages.py` explains them):
"""
_HEAD = ("| metric | type | labels | meaning |", "|---|---|---|---|")


def metrics_rows() -> list[tuple[str, str, str, str]]:
    """Of each metric its name at Prometheus, type, labels, and meaning."""
    return [*_service_rows(), *_engine_rows()]


def metrics_page() -> str:
    """All metrics in Markdown: docs/metrics.md."""
    reasons = ", ".join(f"`{reason.value}`" for reason in MissReason)
    return "\n".join(
        [
            _INTRODUCTION,
            *_table(_service_rows()),
            "",
            _ENGINES,
            *_table(_engine_rows()),
            "",
            f"{_REASONS}{reasons}.",
            "",
        ]
    )


def _service_rows() -> list[tuple[str, str, str, str]]:
    return [
        (metric.exported, metric.kind.value, ", ".join(metric.labels), metric.text)
        for metric in SERVICE_METRICS
    ]


def _engine_rows() -> list[tuple[str, str, str, str]]:
    rows = [(f"vllm:lmkv_{name}_total", "counter", "", t) for name, t in ENGINE_COUNTERS.items()]
    missed = f"vllm:lmkv_{MISSED_TOKENS}_total"
    return [*rows, (missed, "counter", "reason", MISSED_TOKENS_TEXT)]


def _table(rows: Iterable[tuple[str, str, str, str]]) -> list[str]:
    return [*_HEAD, *(f"| `{n}` | {kind} | {labels} | {text} |" for n, kind, labels, text in rows)]
