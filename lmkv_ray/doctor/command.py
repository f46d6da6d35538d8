"""``lmkv doctor`` on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console

from lmkv_ray.config import Settings, load_settings
from lmkv_ray.doctor.cluster import cluster_findings
from lmkv_ray.doctor.finding import Finding, Level, good, of_error
from lmkv_ray.doctor.machine import machine_findings
from lmkv_ray.errors import ConfigError, ConnectError, LmkvError

_MARKS = {Level.GOOD: "[green]ok  [/green]", Level.NOTE: "[yellow]note[/yellow]"}
_MARKS[Level.BAD] = "[red]bad [/red]"


def doctor(
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster. Default: RAY_ADDRESS, else the one on this machine."),
    ] = None,
    trial: Annotated[
        bool,
        typer.Option(
            help="Write a chunk of 64 KiB and move it to every tier and node. In a full arena "
            "other chunks make room for it, a 64th of the arena at most. The tiers keep their copy "
            "as long as any other chunk."
        ),
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, one finding a line.")
    ] = False,
) -> None:
    """Look for what is wrong with this machine and the cache, and say the next step."""
    console = Console(soft_wrap=True, highlight=False)
    worst = 0
    for finding in _findings(address, trial):
        worst += finding.level is Level.BAD
        if as_json:
            print(json.dumps(_plain(finding)))
            continue
        console.print(f"{_MARKS[finding.level]} [bold]{finding.about}[/bold]: {finding.what}")
        if finding.next_step:
            console.print(f"     Next step: {finding.next_step}")
    if worst:
        raise typer.Exit(1)


def _findings(address: str | None, trial: bool) -> Iterator[Finding]:
    try:
        settings = load_settings()
    except ConfigError as error:
        yield of_error("settings", error)
        return
    yield good("settings", "Those of this process can be used ('lmkv config' lists them).")
    yield from machine_findings(settings)
    yield from _of_cache(address, settings, trial)


def _of_cache(address: str | None, settings: Settings, trial: bool) -> Iterator[Finding]:
    from lmkv_ray.actors import connect
    from lmkv_ray.actors.cluster import join
    from lmkv_ray.doctor.trial import Trial

    try:
        join(address or settings.ray_address, start=False)
    except ConnectError as error:
        yield of_error("Ray", error)
        return
    yield good("Ray", "The cluster answers.")
    try:
        cache = connect(address, start=False)
        status = cache.status()
        yield from cluster_findings(status)
        if trial:
            yield from Trial(cache).run(status)
    except LmkvError as error:
        yield of_error("cache", error)


def _plain(finding: Finding) -> dict[str, str]:
    return {
        "level": finding.level.value,
        "about": finding.about,
        "what": finding.what,
        "next_step": finding.next_step,
    }
