"""From the workers' reports to the engine's places: their keys, their slices, their links."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from lmkv_ray.arena import this_process
from lmkv_ray.config import Settings
from lmkv_ray.host import host_id
from lmkv_ray.messages import Hello
from lmkv_ray.vllm.engine.groups import Group
from lmkv_ray.vllm.engine.metadata import LayoutReport, share_chunks
from lmkv_ray.vllm.engine.support import check_workers
from lmkv_ray.vllm.identity.ages import Identity
from lmkv_ray.vllm.identity.content import CONTENT, ContentThread
from lmkv_ray.vllm.identity.namespace import derive_namespace
from lmkv_ray.vllm.link.device_watch import DeviceWatch
from lmkv_ray.vllm.link.shard_link import ShardClient, ShardLink
from lmkv_ray.vllm.scheduler.places import Place

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

Connect = Callable[[str | None], ShardClient]
"""Finds the shard of another host, or of this one (None)."""


def open_places(
    config: VllmConfig,
    settings: Settings,
    groups: Sequence[Group],
    reports: Sequence[LayoutReport],
    *,
    replicas: int,
    engine_id: str,
    connect: Connect,
    device: DeviceWatch,
    content: ContentThread,
) -> list[Place]:
    """The places of an engine, its own node first; their links have begun to attach.

    Args:
        config: vLLM's configuration of the engine.
        settings: the engine's own settings.
        groups: the engine's KV groups, in its order.
        reports: of all workers.
        replicas: consecutive ranks whose slices are the same bytes.
        engine_id: unique among engines.
        connect: see ``Connect``.
        device: what the shard of this node is told of the engine's own cache.
        content: reads what the engine's model is made of; is begun.

    Raises:
        UnsupportedError: see ``check_workers`` and ``derive_namespace``.
    """
    reports = sorted(reports, key=lambda report: report.rank)
    check_workers(config, reports)
    # Two steps' worth of chunks, so that a burst of prefill finds room.
    tokens = 2 * config.scheduler_config.max_num_batched_tokens
    here = host_id()
    hosts = sorted({report.host for report in reports}, key=lambda host: (host != here, host))
    by_host = [[report for report in reports if report.host == host] for host in hosts]
    ranks = [[report.rank for report in mine] for mine in by_host] if len(hosts) > 1 else [None]
    identity = Identity(
        [derive_namespace(config, settings, groups, reports, members) for members in ranks],
        pending=CONTENT,
    )
    content.begin(identity.learn)
    identity.adopt()
    places = []
    for number, (host, mine) in enumerate(zip(hosts, by_host, strict=True)):
        nbytes, shares = share_chunks(mine, replicas)
        links: dict[int, ShardLink] = {}
        for size in dict.fromkeys(filter(None, nbytes)):
            hello = Hello(  # a shard grants a holder slots of one size
                engine_id=f"{engine_id}-{size}" if links else engine_id,
                # The shard watches a process that it can see.
                owner=mine[0].owner if number else this_process(),
                writers=[report.owner for report in mine],
                space=identity.space(number),
                fields=identity.fields(number),
                model=config.model_config.model,
                slot_bytes=size,
                held=[],
            )
            members = (group for group, nb in zip(groups, nbytes, strict=True) if nb == size)
            burst = sum(tokens // group.tokens for group in members)
            links[size] = ShardLink(
                partial(connect, host if number else None),
                hello,
                want_slots=max(16, min(settings.grant_slots, burst)),
                period=settings.exchange_seconds,
                maps=not number,
                device=None if number or links else device,
            )
        by_group = {group: links[size] for group, size in enumerate(nbytes) if size}
        places.append(Place(number, identity, by_group, nbytes, shares))
        logger.info(
            "lmkv_ray: chunks of %s tokens (%s MiB) over %d of %d workers",
            "/".join(str(group.tokens) for group in groups),
            "/".join(f"{size / 2**20:.2f}" for size in nbytes),
            len(mine),
            len(reports),
        )
    return places
