"""``lmkv``: look at a cache, clear it, stop it, list all settings, and simulate one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Annotated, ParamSpec

import msgspec
import typer
from rich.console import Console
from rich.table import Column, Table

from lmkv_ray.config import Settings, load_settings, scope_of
from lmkv_ray.doctor.command import doctor
from lmkv_ray.errors import ConfigError, LmkvError
from lmkv_ray.keys import KEY_BYTES
from lmkv_ray.metrics.page import metrics_page, metrics_rows
from lmkv_ray.settings_page import settings_page
from lmkv_ray.simulate.command import simulate
from lmkv_ray.status_view import status_view

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
def status(
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="All that is known, as JSON.")] = False,
    story: Annotated[
        bool, typer.Option(help="The last events of each shard and the directory, for a report.")
    ] = False,
) -> None:
    """Nodes, chunks, memory and engines of the running cache."""
    from lmkv_ray.actors import connect

    cache = connect(address, start=False)
    if as_json:
        told = {"story": cache.story()} if story else cache.status()
        print(msgspec.json.encode(told).decode())
    elif story:
        for service, lines in cache.story().items():
            print("\n".join([service, *lines]))
    else:
        for part in status_view(cache.status()):
            Console().print(part, highlight=False)


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


Keys = Annotated[
    list[str],
    typer.Argument(help="Keys of chunks, 32 hex digits each, as answers of requests tell them."),
]


@app.command()
@_clear_errors
def where(keys: Keys, address: Address = None) -> None:
    """Where chunks are: in engines' own caches (gpu), nodes' memory, nodes' disks."""
    from lmkv_ray.actors import connect

    wide = Column("key", min_width=2 * KEY_BYTES)  # whole on a narrow screen too: it is copied
    table = Table(wide, "tier", "node", Column("engine", overflow="fold"))
    for key, locations in zip(keys, connect(address, start=False).where(_keys(keys)), strict=True):
        for location in locations:
            table.add_row(key, location.tier, location.node_id[:12], location.engine_id)
            key = ""
        if not locations:
            table.add_row(key, "nowhere", "", "")
    Console().print(table)


@app.command()
@_clear_errors
def pin(keys: Keys, address: Address = None) -> None:
    """Keep chunks from being evicted to make room."""
    from lmkv_ray.actors import connect

    pinned = connect(address, start=False).pin(_keys(keys))
    Console().print(f"{pinned} of {len(keys)} chunks are pinned.", highlight=False)


@app.command()
@_clear_errors
def unpin(keys: Keys, address: Address = None) -> None:
    """Let pinned chunks be evicted again."""
    from lmkv_ray.actors import connect

    connect(address, start=False).unpin(_keys(keys))
    Console().print("They may be evicted.")


@app.command()
@_clear_errors
def evict(keys: Keys, address: Address = None) -> None:
    """Remove chunks from the memory of all nodes; lower tiers keep theirs."""
    from lmkv_ray.actors import connect

    evicted = connect(address, start=False).evict(_keys(keys))
    Console().print(f"{evicted} of {len(keys)} chunks were in memory.", highlight=False)


@app.command()
@_clear_errors
def move(
    to: Annotated[str, typer.Argument(help="disk, remote, or a node's id or its beginning.")],
    keys: Keys,
    address: Address = None,
) -> None:
    """Move chunks out of the memory of all nodes to a tier or a node."""
    from lmkv_ray.actors import connect

    moved = connect(address, start=False).move(_keys(keys), to)
    Console().print(f"{moved} of {len(keys)} chunks are there.", highlight=False)


@app.command()
@_clear_errors
def clear(
    namespace: Annotated[
        str, typer.Option(help="Only of engines with this namespace, as their logs name it.")
    ] = "",
    salt: Annotated[
        str | None,
        typer.Option(help='Only of the tenant with this cache_salt; "": of requests without one.'),
    ] = None,
    address: Address = None,
) -> None:
    """Remove chunks from every node: all, or those of a namespace, a tenant, or both."""
    from lmkv_ray.actors import connect

    pending = connect(address, start=False).clear(namespace, salt)
    what = "All chunks" if not namespace and salt is None else "These chunks"
    if pending:
        Console().print(
            f"{what} are removed, but some nodes cannot clear this at present: "
            f"{', '.join(pending)}.\nNothing of it is served, and it is removed as soon as that "
            "works again. 'lmkv status' says what is wrong."
        )
    else:
        Console().print(f"{what} are removed.")


@app.command()
@_clear_errors
def stop(address: Address = None) -> None:
    """End the cache. Engines go on without it."""
    from lmkv_ray.actors import connect

    connect(address, start=False).stop()
    Console().print("The cache has ended.")


@app.command()
@_clear_errors
def config(
    markdown: Annotated[bool, typer.Option(help="Print docs/settings.md instead.")] = False,
) -> None:
    """Every setting: its value here, its default, whose it is, and what it does."""
    if markdown:
        print(settings_page(), end="")
        return
    settings = load_settings()
    table = Table("LMKV_...", "value", "default", "of the", "meaning", show_lines=True)
    for name, field in Settings.model_fields.items():
        value, default = getattr(settings, name), field.default
        shown = "" if value == default else _text(settings.shown(name))
        table.add_row(name.upper(), shown, _text(default), scope_of(name), field.description or "")
    Console().print(table)


@app.command()
@_clear_errors
def metrics(
    markdown: Annotated[bool, typer.Option(help="Print docs/metrics.md instead.")] = False,
) -> None:
    """Every metric: its name at Prometheus, its type, its labels, and what it means."""
    if markdown:
        print(metrics_page(), end="")
        return
    table = Table("metric", "type", "labels", "meaning")
    for row in metrics_rows():
        table.add_row(*row)
    Console().print(table)


app.command()(_clear_errors(doctor))
app.command()(_clear_errors(simulate))


def _keys(keys: list[str]) -> list[bytes]:
    try:
        parsed = [bytes.fromhex(key) for key in keys]
    except ValueError:
        parsed = []
    if not parsed or any(len(key) != KEY_BYTES for key in parsed):
        raise ConfigError(
            "A key has 32 hex digits.",
            next_step='send {"lmkv": {"keys": true}} as kv_transfer_params of a request: the '
            "answer has the keys of its prompt.",
        )
    return parsed


def _text(value: object) -> str:
    return "" if value is None else str(value)


if __name__ == "__main__":
    app()
