"""The status of a cache as people read it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Column, Table

from lmkv_ray.kin import explain
from lmkv_ray.status import CacheStatus, ShardStatus, TierStatus


def status_view(cache: CacheStatus) -> Iterator[Table | str]:
    """A table of the nodes, and lines below it."""
    table = Table(
        Column("node", overflow="fold"),
        "chunks",
        "used",
        "capacity",
        "engines",
        Column("problem", overflow="fold"),
    )
    for node in cache.nodes:
        _add_node(table, node)
    for node_id in cache.silent:
        table.add_row(node_id[:12], "", "", "", "", "does not answer")
    yield table
    for node in cache.nodes:
        if node.taken:
            yield f"node {node.name} {node.taken}"
    yield from explain({node.node_id: node.kin for node in cache.nodes})
    for part in cache.directory:
        behind = f"; waits for all of {part.unsynced} nodes" if part.unsynced else ""
        yield (
            f"directory {part.part}: {part.chunks:,} chunks of {part.nodes} nodes, "
            f"{part.chunks / part.capacity:.0%} full{behind}"
        )


def size(nbytes: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} TiB"


def _add_node(table: Table, node: ShardStatus) -> None:
    models = ", ".join(sorted({engine.model for engine in node.engines}))
    engines = f"{len(node.engines)} ({models})" if models else "0"
    state = node.problem or ("leaves" if node.draining else "")
    used, capacity = size(node.nbytes), size(node.capacity)
    table.add_row(node.name, str(node.chunks), used, capacity, engines, state)
    for refusal in node.refusals:
        table.add_row("", "", "", "", "", refusal)
    if node.engines:
        on_devices = sum(engine.device_chunks for engine in node.engines)
        table.add_row("  engines' own", str(on_devices), "", "", "", "")
    for tier in node.tiers:
        _add_tier(table, tier)


def _add_tier(table: Table, tier: TierStatus) -> None:
    held = "" if tier.chunks < 0 else str(tier.chunks)
    sizes = ["" if nbytes < 0 else size(nbytes) for nbytes in (tier.nbytes, tier.capacity)]
    table.add_row(f"  {tier.name}", held, *sizes, "", tier.problem or "")
