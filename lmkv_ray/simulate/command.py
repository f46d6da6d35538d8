"""``lmkv simulate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from rich.console import Console
from rich.progress import Progress

from lmkv_ray.errors import ConfigError
from lmkv_ray.policies import POLICIES
from lmkv_ray.simulate.admissions import AdmissionRule
from lmkv_ray.simulate.costs import ConstantCosts
from lmkv_ray.simulate.plot import plot
from lmkv_ray.simulate.replay import BELADY, Result, Setup, replay
from lmkv_ray.simulate.report import table, write_json
from lmkv_ray.simulate.sizes import chunks_of, usual_capacities
from lmkv_ray.simulate.traces import Format, Trace, read_trace

EVERY = (*POLICIES, BELADY)


def simulate(
    trace: Annotated[Path, typer.Argument(help="JSON lines: Mooncake or Qwen-Bailian format.")],
    capacity: Annotated[
        str,
        typer.Option(
            help="Memory, one or more with commas: chunks (10000) or bytes (64GiB). Default: from "
            "a hundredth to all of what the trace asks for."
        ),
    ] = "",
    policy: Annotated[
        str, typer.Option(help=f"One or more with commas: {', '.join(EVERY)}. Default: all.")
    ] = "",
    disk: Annotated[str, typer.Option(help="Disk below memory: chunks or bytes.")] = "0",
    remote: Annotated[str, typer.Option(help="Remote store below disk: chunks or bytes.")] = "0",
    admission: Annotated[
        str,
        typer.Option(help=f"What is written below memory: {', '.join(get_args(AdmissionRule))}."),
    ] = "second_hit",
    ttl: Annotated[
        float | None, typer.Option(help="Seconds after which chunks expire. Default: never.")
    ] = None,
    format: Annotated[
        str, typer.Option(help=f"Of the trace: {', '.join(get_args(Format))}.")
    ] = "auto",
    chunk_tokens: Annotated[int, typer.Option(help="Tokens in one chunk, at least.", min=1)] = 256,
    bytes_per_token: Annotated[
        int, typer.Option(help="KV bytes of one token. Default: Llama 3.1 8B in 16 bit.", min=1)
    ] = 131_072,
    prefill_rate: Annotated[
        float, typer.Option(help="Tokens one second of prefill computes.", min=1)
    ] = 10_000.0,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    plot_to: Annotated[
        Path | None, typer.Option("--plot", help="Draw memory against hit rate to this file.")
    ] = None,
) -> None:
    """What a cache of some size would have done for the requests of a trace."""
    _one_of("admission", admission, get_args(AdmissionRule))
    _one_of("format", format, get_args(Format))
    names = [name.strip() for name in policy.split(",")] if policy else list(EVERY)
    for name in names:
        _one_of("policy", name, EVERY)
    requests = read_trace(trace, format=cast(Format, format), chunk_tokens=chunk_tokens)
    chunk_bytes = requests.chunk_tokens * bytes_per_token
    capacities = (
        [chunks_of(text, chunk_bytes) for text in capacity.split(",")]
        if capacity
        else usual_capacities(requests)
    )
    if min(capacities) < 1:
        raise ConfigError(
            "A memory of less than one chunk holds nothing.",
            next_step=f"give at least {chunk_bytes} bytes (one chunk).",
        )
    base = Setup(
        memory=1,
        disk=chunks_of(disk, chunk_bytes),
        remote=chunks_of(remote, chunk_bytes),
        admission=cast(AdmissionRule, admission),
        ttl=ttl,
        bytes_per_token=bytes_per_token,
        costs=ConstantCosts(prefill_tokens_per_second=prefill_rate),
    )
    setups = [replace(base, memory=n, policy=name) for n in capacities for name in names]
    results = _run(requests, setups)
    Console().print(table(results))
    if json is not None:
        write_json(results, json)
    if plot_to is not None:
        plot(results, requests.chunk_tokens, plot_to)


def _run(trace: Trace, setups: Sequence[Setup]) -> list[Result]:
    results = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("replaying", total=len(setups) * len(trace))
        step = max(len(trace) // 100, 1)

        def on_request(number: int) -> None:
            if number % step == 0:
                progress.advance(task, step)

        for setup in setups:
            progress.update(task, description=f"{setup.policy}, {setup.memory:,} chunks")
            results.append(replay(trace, setup, on_request))
    return results


def _one_of(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(
            f"There is no {option} called {value!r}.", next_step=f"take one of {', '.join(known)}."
        )
