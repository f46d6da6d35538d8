"""The dashboard and the alert rules ask for metrics that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dashboards.dashboard import dashboard
from lmkv_ray.metrics.engine import ENGINE_COUNTERS, MISSED_TOKENS
from lmkv_ray.metrics.services import SERVICE_METRICS

FOLDER = Path(__file__).parent.parent / "dashboards"
ALERTS = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
SERVICES = {metric.exported: metric for metric in SERVICE_METRICS}
ENGINES = {f"{name}_total" for name in (*ENGINE_COUNTERS, MISSED_TOKENS)}


def queries() -> Iterator[str]:
    for panel in dashboard()["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (rule["expr"] for rule in RULES)


def test_the_file_is_what_the_panels_declare() -> None:
    assert json.loads((FOLDER / "lmkv.json").read_text()) == dashboard()


@pytest.mark.parametrize("query", sorted(set(queries())))
def test_a_query_names_metrics_that_are_declared(query: str) -> None:
    services = set(re.findall(r"\bray_lmkv_\w+", query))
    engines = set(re.findall(r"vllm:\)lmkv_(\w+)", query))
    assert services | engines
    assert services <= SERVICES.keys()
    assert engines <= ENGINES


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_texts_of_a_rule_use_labels_that_its_metric_has(rule: dict[str, object]) -> None:
    used = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
    [*metrics] = [SERVICES[name] for name in re.findall(r"\bray_lmkv_\w+", str(rule["expr"]))]
    assert used <= {label for metric in metrics for label in metric.labels}


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken
        taken |= cells
        assert max(x for x, _ in cells) < 24
