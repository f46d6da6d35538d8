"""Kin: engines that serve a model of one name. Where they share no chunks, people want to know why.

Two engines share chunks exactly when their namespaces are equal. So the fields of their namespaces
that differ are the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lmkv_ray.messages import Kin

MOST_KIN = 8
"""Kinds of engines that a node tells of, and is told of."""


def kinds(engines: Iterable[Kin]) -> list[Kin]:
    """One engine of each namespace that is known, ``MOST_KIN`` at most."""
    found = {kin.space: kin for kin in engines if kin.space}
    return [found[space] for space in sorted(found)[:MOST_KIN]]


def differing(me: Kin, others: Iterable[Kin]) -> list[str]:
    """Names of the fields in which an engine differs from its kin, sorted."""
    if not me.space:
        return []
    return sorted(
        {
            name
            for kin in others
            if kin.space and kin.space != me.space and kin.model == me.model
            for name in me.fields.keys() | kin.fields.keys()
            if me.fields.get(name) != kin.fields.get(name)
        }
    )


def explain(engines: Mapping[str, Iterable[Kin]]) -> list[str]:
    """A line for each model whose engines do not all share.

    Args:
        engines: by node.
    """
    by_model: dict[str, list[tuple[str, Kin]]] = {}
    for node, attached in engines.items():
        for kin in attached:
            if kin.space:
                by_model.setdefault(kin.model, []).append((node, kin))
    lines = []
    for model, found in sorted(by_model.items()):
        spaces = {kin.space: kin for _, kin in found}
        first, *rest = spaces.values()
        if names := differing(first, rest):
            values = "; ".join(f"{name}: {_values(name, spaces.values())}" for name in names)
            nodes = sorted({node for node, _ in found})
            lines.append(
                f"Not all engines of {model} share chunks ({len(spaces)} namespaces on "
                f"{', '.join(node[:12] for node in nodes)}). They differ in {values}."
            )
    return lines


def _values(name: str, engines: Iterable[Kin]) -> str:
    return " / ".join(sorted({kin.fields.get(name, "") for kin in engines}))
