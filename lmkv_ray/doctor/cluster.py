"""What the doctor sees in the status of a cache: pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from lmkv_ray.doctor.finding import Finding, bad, good, note
from lmkv_ray.kin import explain
from lmkv_ray.status import CacheStatus, ShardStatus

MOST_CLOCK_SECONDS = 15.0
"""A status is gathered within some seconds, so a smaller difference says nothing."""
FULL = 0.9
"""A part of the directory that is fuller than this forgets chunks soon."""


def cluster_findings(status: CacheStatus) -> Iterator[Finding]:
    """All that is wrong, and one line for what is right."""
    found = [
        *_nodes(status),
        *_sharing(status),
        *_versions(status),
        *_clocks(status),
        *_directory(status),
    ]
    yield from found
    if not found:
        yield good(
            "cache", f"{len(status.nodes)} nodes and {status.engines} engines, without a problem."
        )


def _nodes(status: CacheStatus) -> Iterator[Finding]:
    for node_id in status.silent:
        yield bad(
            f"node {node_id[:12]}",
            "Its shard does not answer.",
            "look at its log in /tmp/ray/session_latest/logs on that node, and at 'ray status'.",
        )
    for node in status.nodes:
        name = f"node {node.name}"
        if node.problem is not None:
            yield _problem(name, node.problem)
        for refusal in node.refusals:
            yield _problem(name, refusal)
        for tier in node.tiers:
            if tier.problem is not None:
                yield _problem(f"{tier.name} of {name}", tier.problem)
            if tier.counters.get("read_corrupt", 0):
                yield note(
                    f"{tier.name} of {name}",
                    f"{tier.counters['read_corrupt']} chunks were damaged, and not served.",
                    "look at the disk or the store; the chunks were removed.",
                )


def _problem(about: str, text: str) -> Finding:
    what, _, next_step = text.partition(" Next step: ")
    return bad(about, what, next_step or "see 'lmkv status'.")


def _sharing(status: CacheStatus) -> Iterator[Finding]:
    for line in explain({node.node_id: node.kin for node in status.nodes}):
        yield note(
            "sharing", line, "start these engines alike if they should share (docs/identity.md)."
        )


def _versions(status: CacheStatus) -> Iterator[Finding]:
    by_version: defaultdict[str, list[ShardStatus]] = defaultdict(list)
    for node in status.nodes:
        if node.version:
            by_version[node.version].append(node)
    if len(by_version) > 1:
        where = "; ".join(
            f"{version} on {', '.join(node.name for node in nodes)}"
            for version, nodes in sorted(by_version.items())
        )
        yield note(
            "versions",
            f"Nodes run different versions: {where}.",
            "install one version on all nodes; until then they may not understand each other.",
        )


def _clocks(status: CacheStatus) -> Iterator[Finding]:
    clocks = [node.wall for node in status.nodes if node.wall]
    if clocks and (apart := max(clocks) - min(clocks)) > MOST_CLOCK_SECONDS:
        yield note(
            "clocks",
            f"The clocks of nodes are {apart:.0f} s apart.",
            "synchronise them (chrony, systemd-timesyncd): chunks with a ttl expire by them.",
        )


def _directory(status: CacheStatus) -> Iterator[Finding]:
    if not status.directory:
        yield bad("directory", "No part of it answers.", "run 'ray list actors'.")
    for part in status.directory:
        about = f"directory {part.part}"
        if part.unsynced:
            yield note(
                about,
                f"It does not know yet all that {part.unsynced} nodes hold.",
                "wait some seconds and look again; it asks for it by itself.",
            )
        if part.chunks > FULL * part.capacity:
            yield note(
                about,
                f"It is {part.chunks / part.capacity:.0%} full and forgets the oldest chunks.",
                "raise LMKV_DIRECTORY_CAPACITY and start the cache again.",
            )
