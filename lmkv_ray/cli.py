"""``lmkv``: look at a cache, clear it, stop it, and list all settings."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Annotated, ParamSpec

import typer
from rich.console import Console
from rich.table import Table

from lmkv_ray.config import Settings, load_settings
from lmkv_ray.errors import LmkvError

app = typer.Typer(
    help="The KV cache layer of Ray.", no_args_is_help=True, pretty_exceptions_enable=False
)
P = ParamSpec("P")

Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster. Default: RAY_ADDRESS, else the one on this machine."),
]


def _clear_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Errors as two lines and exit code 1, not as a traceback."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except LmkvError as error:
            console = Console(stderr=True, soft_wrap=True)
            console.print(f"[red]{error.what}[/red]\nNext step: {error.next_step}", highlight=False)
            raise typer.Exit(1) from None

    return wrapped


@app.command()
@_clear_errors
def status(address: Address = None) -> None:
    """Nodes, chunks, memory and engines of the running cache."""
    from lmkv_ray.actors import connect

    cache = connect(address, start=False).status()
    table = Table("node", "chunks", "used", "capacity", "engines", "problem")
    for node in cache.nodes:
        models = ", ".join(sorted({engine.model for engine in node.engines}))
        engines = f"{len(node.engines)} ({models})" if models else "0"
        used, capacity = _size(node.nbytes), _size(node.capacity)
        state = node.problem or ("leaves" if node.draining else "")
        table.add_row(node.node_id[:12], str(node.chunks), used, capacity, engines, state)
    for node_id in cache.silent:
        table.add_row(node_id[:12], "", "", "", "", "does not answer")
    Console().print(table)
    for part in cache.directory:
        behind = f"; waits for all of {part.unsynced} nodes" if part.unsynced else ""
        Console().print(
            f"directory {part.part}: {part.chunks:,} chunks of {part.nodes} nodes, "
            f"{part.chunks / part.capacity:.0%} full{behind}"
        )


@app.command()
@_clear_errors
def drain(
    node: Annotated[str, typer.Argument(help="Id of the node, or the beginning of it.")],
    seconds: Annotated[
        float | None, typer.Option(help="Time for it. Default: LMKV_DRAIN_SECONDS.")
    ] = None,
    address: Address = None,
) -> None:
    """Let a node that will be ended hand its chunks to others. It serves until it ends."""
    from lmkv_ray.actors import connect

    done = connect(address, start=False).drain(node, seconds)
    Console().print(f"Others have taken over {done.copied} chunks.", highlight=False)
    if done.left:
        Console().print(f"{done.left} chunks are only there: no room, or no time.")
    Console().print("The node may be ended now.")


@app.command()
@_clear_errors
def clear(address: Address = None) -> None:
    """Remove every chunk from every node."""
    from lmkv_ray.actors import connect

    connect(address, start=False).clear()
    Console().print("All chunks are removed.")


@app.command()
@_clear_errors
def stop(address: Address = None) -> None:
    """End the cache. Engines go on without it."""
    from lmkv_ray.actors import connect

    connect(address, start=False).stop()
    Console().print("The cache has ended.")


@app.command()
@_clear_errors
def config() -> None:
    """Every setting: its value here, its default, and what it does."""
    settings = load_settings()
    table = Table("LMKV_...", "value", "default", "meaning", show_lines=True)
    for name, field in Settings.model_fields.items():
        value, default = getattr(settings, name), field.default
        shown = "" if value == default else str(value)
        table.add_row(name.upper(), shown, _text(default), field.description or "")
    Console().print(table)


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} TiB"


if __name__ == "__main__":
    app()
