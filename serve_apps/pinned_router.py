"""A request router that lets a client say which replica answers: for measuring, not for serving."""

from __future__ import annotations

from ray.serve.experimental.round_robin_router import RoundRobinRouter
from ray.serve.request_router import PendingRequest, RunningReplica

REPLICA_HEADER = "x-replica"


class PinnedRouter(RoundRobinRouter):
    """Routes to the replica named by the HTTP header x-replica; others round-robin.

    A named replica that is not there is waited for.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        wanted = _wanted(pending_request)
        if not wanted:
            return list(await super().choose_replicas(candidate_replicas, pending_request))
        return [[r for r in candidate_replicas if r.replica_id.unique_id == wanted]]


def _wanted(request: PendingRequest | None) -> str | None:
    # ray.serve.llm calls its replicas with (request, information on the HTTP request).
    if request is None or len(request.args) < 2:
        return None
    headers: dict[str, str] = getattr(request.args[1], "headers", {})
    return headers.get(REPLICA_HEADER)
