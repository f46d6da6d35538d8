"""The vLLM replicas of a running app, as one who measures sees them: names, kill, wait."""

from __future__ import annotations

import time
from collections.abc import Collection

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

POLL_S = 0.2
SETTLED_S = 2.0  # what Serve reports of its replicas lags behind a crash
ENGINE = "LLMServer"  # how ray.serve.llm's deployments of engines begin


class NotReadyError(RuntimeError):
    """The app did not come up; the message says what Serve reports."""


def names(app: str) -> list[str]:
    """Ids of the app's engine replicas, sorted; those still starting included."""
    return sorted(actor.rsplit("#", 1)[1] for actor in _actors(app))


def kill(app: str) -> None:
    """Kill every engine replica, as a crash would. Serve then starts new ones."""
    for actor in _actors(app):
        ray.kill(ray.get_actor(actor, namespace="serve"), no_restart=True)


def wait(app: str, count: int, timeout_s: float, gone: Collection[str] = ()) -> list[str]:
    """Ids of `count` running replicas, none of them in `gone`.

    NotReadyError after timeout_s seconds, or at once when Serve gives up.
    """
    since = time.monotonic()
    deadline = since + timeout_s
    while time.monotonic() < deadline:
        status = serve.status().applications.get(app)
        if status is not None and status.status == ApplicationStatus.DEPLOY_FAILED:
            raise NotReadyError(f"the app {app} failed to start: {status.message}")
        found = names(app)
        ready = status is not None and _running(status) == len(found) == count
        if not ready or set(found) & set(gone):
            since = time.monotonic()
        elif time.monotonic() - since > SETTLED_S:
            return found
        time.sleep(POLL_S)
    raise NotReadyError(f"the app {app} has no {count} running replicas after {timeout_s:.0f} s")


def _running(status: ApplicationStatusOverview) -> int:
    """Engine replicas that Serve says are running: 0 while anything else of the app is not."""
    if status.status != ApplicationStatus.RUNNING:
        return 0
    return sum(
        sum(n for state, n in deployment.replica_states.items() if state == "RUNNING")
        for name, deployment in status.deployments.items()
        if name.startswith(ENGINE)
    )


def _actors(app: str) -> list[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    prefix = f"SERVE_REPLICA::{app}#{ENGINE}"
    return [a["name"] for a in named if a["namespace"] == "serve" and a["name"].startswith(prefix)]
