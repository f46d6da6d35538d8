"""The dashboard of Grafana, from the panels below.

Printed as JSON: ``python -m dashboards.dashboard > dashboards/lmkv.json``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 8, 8
"""Of a panel; a row of Grafana's grid is 24 wide."""
ENGINE = '{__name__=~"(ray_vllm_|vllm:)lmkv_%s_total"}'
"""A counter of engines: under Ray Serve it is on Ray's port, else on vLLM's own."""


@dataclass(frozen=True)
class Panel:
    """One picture."""

    title: str
    text: str
    """What a reader learns from it."""
    queries: Sequence[tuple[str, str]]
    """Each a PromQL expression and the name of its lines."""
    unit: str = "short"
    """As Grafana calls it."""
    stacked: bool = False
    most: float | None = None
    """The top of the scale, where there is one."""


def _rate(metric: str, by: str = "") -> str:
    total = f"rate({metric}[$__rate_interval])"
    return f"sum by ({by}) ({total})" if by else f"sum({total})"


def _engine(name: str, by: str = "") -> str:
    return _rate(ENGINE % name, by)


HITS = _engine("hit_tokens")
MISSES = _engine("missed_tokens")

ROWS: Sequence[tuple[str, Sequence[Panel]]] = (
    (
        "Is it worth it",
        (
            Panel(
                "Hit rate",
                "Share of prompt tokens that were loaded and not computed, beyond vLLM's own hits.",
                [(f"{HITS} / ({HITS} + {MISSES})", "hit rate")],
                "percentunit",
                most=1,
            ),
            Panel(
                "Tokens loaded and computed",
                "Prompt tokens a second.",
                [(HITS, "loaded"), (MISSES, "computed")],
                stacked=True,
            ),
            Panel(
                "Why tokens were computed",
                "By reason; docs/metrics.md explains them.",
                [(_engine("missed_tokens", "reason"), "{{reason}}")],
                stacked=True,
            ),
        ),
    ),
    (
        "Memory",
        (
            Panel(
                "Arena in use",
                "Share of each node's arena. A full arena is normal: it evicts.",
                [("ray_lmkv_used_bytes / (ray_lmkv_capacity_bytes > 0)", "{{node}}")],
                "percentunit",
                most=1,
            ),
            Panel(
                "Chunks saved and evicted",
                "Chunks a second. Evictions close to saves, and few hits: memory is short.",
                [
                    (_rate("ray_lmkv_committed_chunks_total"), "saved"),
                    (_rate("ray_lmkv_evicted_chunks_total"), "evicted"),
                    (_rate("ray_lmkv_cleared_chunks_total"), "cleared"),
                    (_engine("dropped_chunks"), "dropped by engines"),
                ],
            ),
            Panel(
                "Pinned chunks and slots of engines",
                "Neither can be evicted.",
                [
                    ("ray_lmkv_pinned_chunks", "pinned, {{node}}"),
                    ("ray_lmkv_granted_slots", "granted, {{node}}"),
                ],
            ),
        ),
    ),
    (
        "Copies and fetches",
        (
            Panel(
                "Copies between arena and engines",
                "Bytes a second.",
                [(_engine("load_bytes"), "loads"), (_engine("save_bytes"), "saves")],
                "Bps",
            ),
            Panel(
                "Chunks from tiers and other nodes",
                "Chunks a second: fetched, not delivered, and left because computing is quicker.",
                [
                    (_rate("ray_lmkv_staged_chunks_total"), "fetched"),
                    (_rate("ray_lmkv_stage_failed_chunks_total"), "not delivered"),
                    (_rate("ray_lmkv_stage_left_chunks_total"), "left to compute"),
                ],
            ),
            Panel(
                "Fetches, against what was expected",
                "Above 1: fetches take longer than the cost model says.",
                [
                    (
                        f"{_rate('ray_lmkv_stage_seconds_total', 'node')} / "
                        f"{_rate('ray_lmkv_stage_expected_seconds_total', 'node')}",
                        "{{node}}",
                    )
                ],
            ),
        ),
    ),
    (
        "Tiers",
        (
            Panel(
                "Bytes of tiers",
                "What each tier holds, where it counts.",
                [("ray_lmkv_tier_used_bytes", "{{tier}}, {{node}}")],
                "bytes",
            ),
            Panel(
                "Reads and writes of tiers",
                "Bytes a second.",
                [
                    (_rate("ray_lmkv_tier_read_bytes_total", "tier"), "read, {{tier}}"),
                    (_rate("ray_lmkv_tier_stored_bytes_total", "tier"), "written, {{tier}}"),
                ],
                "Bps",
            ),
            Panel(
                "What tiers did not do",
                "Chunks a second.",
                [
                    (_rate("ray_lmkv_tier_read_corrupt_chunks_total", "tier"), "damaged, {{tier}}"),
                    (_rate("ray_lmkv_tier_read_failed_chunks_total", "tier"), "unread, {{tier}}"),
                    (_rate("ray_lmkv_tier_read_late_chunks_total", "tier"), "late, {{tier}}"),
                    (_rate("ray_lmkv_tier_store_failed_chunks_total", "tier"), "refused, {{tier}}"),
                ],
            ),
        ),
    ),
    (
        "Health",
        (
            Panel(
                "Problems",
                "Nodes and tiers out of use, and engines refused: 'lmkv status' says why.",
                [
                    ("sum(ray_lmkv_problem)", "nodes"),
                    ("sum by (tier) (ray_lmkv_tier_problem)", "tier {{tier}}"),
                    ("sum(ray_lmkv_refusals)", "refusals of engines"),
                ],
            ),
            Panel(
                "Engines",
                "Attached to each node's shard.",
                [("ray_lmkv_engines", "{{node}}")],
                stacked=True,
            ),
            Panel(
                "Directory",
                "How full each part is, and nodes that it does not know completely yet.",
                [
                    (
                        "ray_lmkv_directory_chunks / ray_lmkv_directory_capacity_chunks",
                        "part {{part}}",
                    ),
                    ("ray_lmkv_directory_unsynced_nodes", "unsynced nodes, part {{part}}"),
                ],
            ),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append(_row(title, len(panels) + 1, y))
        for column, panel in enumerate(row):
            panels.append(_panel(panel, len(panels) + 1, column * WIDTH, y + 1))
        y += 1 + HEIGHT
    return {
        "uid": "lmkv",
        "title": "KV cache (lmkv_ray)",
        "tags": ["ray", "vllm", "kv-cache"],
        "timezone": "browser",
        "schemaVersion": 39,
        "version": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "label": "Prometheus",
                    "type": "datasource",
                    "query": "prometheus",
                    "current": {},
                }
            ]
        },
        "panels": panels,
    }


def _row(title: str, number: int, y: int) -> dict[str, Any]:
    place = {"x": 0, "y": y, "w": 24, "h": 1}
    return {"type": "row", "id": number, "title": title, "collapsed": False, "gridPos": place}


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    custom = {
        "fillOpacity": 20 if panel.stacked else 0,
        "stacking": {"mode": "normal" if panel.stacked else "none"},
    }
    defaults = {"unit": panel.unit, "min": 0, "custom": custom}
    if panel.most is not None:
        defaults["max"] = panel.most
    return {
        "type": "timeseries",
        "id": number,
        "title": panel.title,
        "description": panel.text,
        "datasource": source,
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": source, "expr": expr, "legendFormat": name}
            for i, (expr, name) in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))
