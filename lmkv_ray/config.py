"""Settings: one typed field each, with a default, a unit and a sentence.

Sources, weakest first: the defaults below, a YAML file named by ``LMKV_CONFIG_FILE``, environment
variables ``LMKV_<FIELD>``, and what is passed in code (the connector passes vLLM's
``kv_connector_extra_config``). Nothing needs to be set. Each setting is a node's, the cluster's or
an engine's (``NODE``, ``CLUSTER``, ``ENGINE``).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ByteSize, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from lmkv_ray.errors import ConfigError
from lmkv_ray.masking import MASK, mask_options, mask_text, mask_urls
from lmkv_ray.policies import POLICIES

LONGEST_SECONDS = 30 * 86_400.0
Seconds = Annotated[float, Field(le=LONGEST_SECONDS)]
"""A wait: never without an end, and no longer than the system's timers can count."""

CONFIG_FILE_VARIABLE = "LMKV_CONFIG_FILE"

RENAMED = {"directory_shards": "directory_parts"}
"""Settings of earlier versions, and what they are called now."""

# Whose a setting is. Each is a pydantic ``json_schema_extra``.
NODE: dict[str, Any] = {"scope": "node"}
"""Each node's own: its shard takes it from the environment of ``ray start`` there, if it is set."""
CLUSTER: dict[str, Any] = {"scope": "cluster"}
"""One for all nodes: of the process that started the cache."""
ENGINE: dict[str, Any] = {"scope": "engine"}
"""Of the engine, or the program, that reads it."""


class Settings(BaseSettings):
    """Everything that can be configured. Construct with :func:`load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix="LMKV_",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        validate_default=True,
    )

    capacity: ByteSize | None = Field(
        None,
        ge=4 << 20,
        json_schema_extra=NODE,
        description="Memory of one node's arena, for instance 64GiB. "
        "Default: a fifth of the memory of machine, container and Ray, at most half of what "
        "arena_dir has free beside Ray's object store; the shard says at start what it took.",
    )
    arena_dir: Path = Field(
        Path("/dev/shm"),
        json_schema_extra=NODE,
        description="A directory on a memory file system (tmpfs or hugetlbfs) for the arena.",
    )
    chunk_tokens: int | None = Field(
        None,
        gt=0,
        json_schema_extra=ENGINE,
        description="Tokens in one chunk; rounded up to whole engine blocks. Default: 256 on "
        "accelerators; one block on CPUs, where recomputing a tail costs more than moving it.",
    )
    salt: str = Field(
        "",
        json_schema_extra=ENGINE,
        description="Engines with different salts never share a chunk (tenant isolation).",
    )
    weights_id: str | None = Field(
        None,
        min_length=1,
        json_schema_extra=ENGINE,
        description="Names the weights of engines that do not load them from files of this machine "
        "(streamed weights): engines with the same model name and weights_id are taken to have the "
        "same weights. Change it whenever the weights change. Default: such an engine shares with "
        "no other one (docs/identity.md).",
    )
    save_generated: bool = Field(
        True,
        json_schema_extra=ENGINE,
        description="Save the KV of generated tokens too: the next turn contains them.",
    )
    anywhere: Literal["off", "asked", "all"] = Field(
        "off",
        json_schema_extra=ENGINE,
        description="Reuse stored text wherever it stands in a prompt, not only as a prefix: "
        "never, for requests that ask for it, or for all. Answers are then approximate. vLLM needs "
        "--scheduler-cls lmkv_ray.vllm.scheduler.rows.scheduler. Not finished: nothing finds such "
        "text yet (docs/anywhere.md).",
    )
    copy_threads: int = Field(
        2,
        ge=1,
        le=16,
        json_schema_extra=ENGINE,
        description="Threads with which one worker loads chunks on a CPU.",
    )
    gpu_ring_bytes: ByteSize = Field(
        ByteSize(64 << 20),
        ge=0,
        json_schema_extra=ENGINE,
        description="GPU memory of one worker through which chunks in short pieces pass, half for "
        "loads and half for saves, for instance 64MiB; 0: every piece is copied by itself.",
    )
    direct_copy_bytes: ByteSize = Field(
        ByteSize(128 << 10),
        ge=0,
        json_schema_extra=ENGINE,
        description="Size from which the contiguous pieces of a chunk are copied one by one "
        "between GPU and arena, for instance 128KiB; shorter ones are packed by a kernel.",
    )
    max_inflight_saves: int = Field(
        256,
        ge=1,
        json_schema_extra=ENGINE,
        description="Chunks one engine may be saving at a time; past it, they wait.",
    )
    grant_slots: int = Field(
        256,
        ge=1,
        json_schema_extra=ENGINE,
        description="Free slots an engine asks for ahead of need, within its share of the arena.",
    )
    grant_seconds: Seconds = Field(
        30.0,
        gt=0,
        json_schema_extra=CLUSTER,
        description="Seconds in which a granted slot must be filled.",
    )
    stage_seconds: Seconds = Field(
        5.0,
        ge=0,
        json_schema_extra=ENGINE,
        description="Seconds a request waits at most for chunks from other nodes; 0 never waits.",
    )
    stage_min_tokens: int = Field(
        512,
        ge=0,
        json_schema_extra=ENGINE,
        description="Missing tokens below which other nodes are not asked: computing is quicker.",
    )
    exchange_seconds: Seconds = Field(
        1.0,
        gt=0,
        json_schema_extra=ENGINE,
        description="Seconds between an engine's messages to its shard while nothing is urgent: "
        "what it has saved, or wants, is told at once.",
    )
    eviction_policy: str = Field(
        "arc",
        json_schema_extra=CLUSTER,
        description="Which chunks make room when the arena is full (docs/policies.md): one of "
        + ", ".join(f"`{name}`" for name in sorted(POLICIES))
        + ".",
    )
    tenant_share: float | None = Field(
        None,
        gt=0,
        le=1,
        json_schema_extra=CLUSTER,
        description="Share of a shard's chunks past which a tenant (requests with one cache_salt) "
        "makes room before others do. Default: tenants have no shares.",
    )
    request_pins: float = Field(
        0.125,
        ge=0,
        le=0.5,
        json_schema_extra=CLUSTER,
        description="Share of a shard's slots of one size that requests may pin "
        "(kv_transfer_params); 0: requests cannot pin. Cache.pin has half of them, these included.",
    )
    remote_url: str | None = Field(
        None,
        json_schema_extra=CLUSTER,
        description="An object store for chunks, shared by all nodes and clusters: "
        "s3://BUCKET/PREFIX, gs://..., az://... or file:///DIRECTORY. Credentials come from the "
        "cloud's own environment variables. Nothing is evicted: let the bucket expire what is "
        "below chunks/. Default: no remote tier.",
    )
    remote_options: dict[str, str] = Field(
        {},
        json_schema_extra=CLUSTER,
        description="Options of the object store as the package obstore names them, for instance "
        '{"endpoint": "http://HOST:PORT", "allow_http": "true"}.',
    )
    encryption_key_file: Path | None = Field(
        None,
        json_schema_extra=NODE,
        description="Encrypts disk and remote tier (AES-256-GCM) with the key in this file, 32 "
        "bytes or more; what is on disk must be removed to change it. Default: no encryption.",
    )
    tier_admission: Literal["second_hit", "all"] = Field(
        "second_hit",
        json_schema_extra=CLUSTER,
        description="Which chunks are also kept below memory: those that were used or saved a "
        "second time, or all.",
    )
    load_when: Literal["faster", "always"] = Field(
        "faster",
        json_schema_extra=ENGINE,
        description="Fetch chunks from lower tiers and other nodes when that is expected to be "
        "faster than computing them, or always.",
    )
    transport: Literal["auto", "shared_memory", "nixl", "object_store"] = Field(
        "auto",
        json_schema_extra=CLUSTER,
        description="How chunks move between nodes; auto takes the fastest that works.",
    )
    disk_dir: Path | None = Field(
        None,
        json_schema_extra=NODE,
        description="A directory on a local disk for this node's disk tier, and for nothing else. "
        "Default: no disk tier.",
    )
    disk_capacity: ByteSize | None = Field(
        None,
        ge=1 << 20,
        json_schema_extra=NODE,
        description="Bytes the disk tier may take, for instance 1TiB. "
        "Default: a quarter of what its file system has free, what the tier holds included.",
    )
    disk_threads: int = Field(
        4,
        ge=1,
        le=64,
        json_schema_extra=NODE,
        description="Chunks read from disk at a time; half as many are written.",
    )
    directory_capacity: int = Field(
        1 << 20,
        ge=1024,
        json_schema_extra=CLUSTER,
        description="Chunks the directory remembers, about 100 bytes each; the oldest make room.",
    )
    directory_parts: int = Field(
        1,
        ge=1,
        le=64,
        json_schema_extra=CLUSTER,
        description="Actors that share the directory's keys; one is enough for some ten nodes "
        "or ten million chunks.",
    )
    reconcile_seconds: Seconds = Field(
        5.0,
        gt=0,
        json_schema_extra=CLUSTER,
        description="Seconds between checks that every live node has a shard.",
    )
    drain_seconds: Seconds = Field(
        30.0,
        gt=0,
        json_schema_extra=CLUSTER,
        description="Seconds in which a node that leaves hands over what only it holds; less if "
        "Ray says that it ends earlier.",
    )
    release_idle_seconds: Seconds | None = Field(
        None,
        gt=0,
        json_schema_extra=CLUSTER,
        description="Seconds without an engine after which a node's shard hands over its chunks "
        "and ends, so that Ray's autoscaler can remove the node. Default: never.",
    )
    replicas: int = Field(
        1,
        ge=1,
        le=4,
        json_schema_extra=CLUSTER,
        description="Nodes that should hold a chunk that is hit often; 1 leaves copies to use.",
    )
    ray_address: str | None = Field(
        None,
        json_schema_extra=ENGINE,
        description="The Ray cluster to use. Default: the initialised one, else RAY_ADDRESS, "
        "else a running local cluster, else a new local one.",
    )
    ray_namespace: str = Field(
        "lmkv",
        min_length=1,
        json_schema_extra=ENGINE,
        description="Ray namespace of the actors; one cache per namespace.",
    )
    connect_seconds: Seconds = Field(
        60.0,
        gt=0,
        json_schema_extra=ENGINE,
        description="Seconds to wait for the cache's actors to start.",
    )

    @field_validator("arena_dir", "disk_dir", "encryption_key_file", mode="before")
    @classmethod
    def _absolute(cls, value: Any) -> Any:
        """Paths mean the same in every process: with ``~`` expanded, and never relative."""
        return absolute(value) if isinstance(value, (str, Path)) else value

    @field_validator("eviction_policy")
    @classmethod
    def _known_policy(cls, value: str) -> str:
        if value not in POLICIES:
            raise ValueError(f"should be one of: {', '.join(sorted(POLICIES))}")
        return value

    @field_validator("remote_url")
    @classmethod
    def _absolute_url(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("is empty; leave it out to have no remote tier")
        if value is not None and value.startswith("file:"):
            directory = value.removeprefix("file://")
            if not re.match("/[^/~]", directory):
                raise ValueError("must name an absolute directory: file:///DIRECTORY")
        return value

    def shown(self, name: str) -> Any:
        """The value of a setting as it may be printed: without secrets."""
        value = getattr(self, name)
        if name == "remote_options":
            return mask_options(value)
        if name == "salt":
            return value and MASK
        return mask_urls(value) if isinstance(value, str) else value

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """What ``repr`` and ``str`` print."""
        return [(name, self.shown(name)) for name in type(self).model_fields]

    @property
    def has_tiers(self) -> bool:
        """Whether anything is kept below memory."""
        return self.disk_dir is not None or self.remote_url is not None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources, strongest first."""
        path = _config_file()
        files = (YamlConfigSettingsSource(settings_cls, yaml_file=path),) if path else ()
        return init_settings, env_settings, *files


def load_settings(overrides: Mapping[str, Any] | None = None) -> Settings:
    """The settings of this process, with ``overrides`` on top.

    Raises:
        ConfigError: a value is wrong, a name in ``overrides``, the file or the environment is not
            a setting, or the file cannot be read; the message lists every problem at once.
    """
    path = _config_file()
    if path and not path.is_file():
        raise ConfigError(
            f"{CONFIG_FILE_VARIABLE} names {path}, which is not a file.",
            next_step="Correct the path or unset the variable.",
        )
    _refuse_unknown_variables()
    try:
        return Settings(**(overrides or {}))
    except ValidationError as error:
        problems = "; ".join(_problem(e) for e in error.errors())
    except (ValueError, yaml.YAMLError) as error:  # the file is not a mapping, or not YAML
        problems = mask_text(str(error))
    # Not as the cause of what follows: pydantic prints what it was given, secrets too.
    raise ConfigError(
        f"Wrong settings: {problems}.", next_step="Run 'lmkv config' for all settings."
    )


def scope_of(name: str) -> str:
    """Whose a setting is: of the ``node``, the ``cluster`` or the ``engine``."""
    extra = Settings.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["scope"])


def settings_here(given: Settings) -> tuple[Settings, list[str]]:
    """The settings of a shard: those of a node are its own, as far as they are set there.

    Args:
        given: of the process that started the cache.

    Returns:
        the settings, and the names of settings of the cluster that this node would have otherwise.

    Raises:
        ConfigError: what is set on this node is wrong.
    """
    own = load_settings()
    node = {n: getattr(own, n) for n in own.model_fields_set if scope_of(n) == "node"}
    others = [
        name
        for name in sorted(own.model_fields_set)
        if scope_of(name) == "cluster" and getattr(own, name) != getattr(given, name)
    ]
    return given.model_copy(update=node), others


def absolute(value: str | Path) -> Path:
    """A path as every process understands it.

    Raises:
        ValueError: it is empty or relative, or has the home of a user that there is not.
    """
    if not str(value) or "\0" in str(value):
        raise ValueError("is empty, or no path; leave it out for the default")
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if not path.is_absolute():
        raise ValueError("is relative, and every process has a directory of its own: start with /")
    return path


def _config_file() -> Path | None:
    value = os.environ.get(CONFIG_FILE_VARIABLE)
    try:
        return absolute(value) if value else None
    except ValueError as error:
        raise ConfigError(
            f"{CONFIG_FILE_VARIABLE} ({value}) {error}.",
            next_step="Correct the path or unset the variable.",
        ) from error


def _problem(error: ErrorDetails) -> str:
    """What is wrong with one setting. A misspelt one may hold a secret."""
    name = str(error["loc"][0]) if error["loc"] else ""
    secret = name in ("remote_options", "salt") or name not in Settings.model_fields
    given = MASK if secret else mask_text(repr(error["input"]))
    told = f"{'.'.join(map(str, error['loc']))}: {error['msg']}{_meant(name)}"
    return f"{told} (given: {given})"


def _refuse_unknown_variables() -> None:
    known = {f"LMKV_{name.upper()}" for name in Settings.model_fields} | {CONFIG_FILE_VARIABLE}
    unknown = sorted(n for n in os.environ if n.startswith("LMKV_") and n not in known)
    if unknown:
        raise ConfigError(
            "Unknown environment variables: "
            + ", ".join(f"{n}{_meant(n.removeprefix('LMKV_').lower(), 'LMKV_')}" for n in unknown)
            + ".",
            next_step="Run 'lmkv config' for all settings.",
        )


def _meant(name: str, prefix: str = "") -> str:
    """Which setting an unknown name may mean, to be put behind it; empty: none, or it is known."""
    if name in Settings.model_fields:
        return ""
    if name in RENAMED:
        meant = f"is {prefix}{RENAMED[name].upper() if prefix else RENAMED[name]} now"
    elif close := difflib.get_close_matches(name, Settings.model_fields, 1, 0.75):
        meant = f"did you mean {prefix}{close[0].upper() if prefix else close[0]}?"
    else:
        return ""
    return f" ({meant})"
