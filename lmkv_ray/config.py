"""Settings: one typed field each, with a default, a unit and a sentence.

Sources, weakest first: the defaults below, a YAML file named by ``LMKV_CONFIG_FILE``, environment
variables ``LMKV_<FIELD>``, and what is passed in code (the connector passes vLLM's
``kv_connector_extra_config``). Nothing needs to be set.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ByteSize, Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from lmkv_ray.errors import ConfigError
from lmkv_ray.masking import MASK, mask_options, mask_text, mask_urls

CONFIG_FILE_VARIABLE = "LMKV_CONFIG_FILE"


class Settings(BaseSettings):
    """Everything that can be configured. Construct with :func:`load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix="LMKV_", extra="forbid", frozen=True, validate_default=True
    )

    capacity: ByteSize | None = Field(
        None,
        ge=4 << 20,
        description="Memory of one node's arena, for instance 64GiB. "
        "Default: a fifth of the memory of machine, container and Ray, at most half of what "
        "arena_dir has free beside Ray's object store; the shard says at start what it took.",
    )
    arena_dir: Path = Field(
        Path("/dev/shm"),
        description="A directory on a memory file system (tmpfs or hugetlbfs) for the arena.",
    )
    chunk_tokens: int | None = Field(
        None,
        gt=0,
        description="Tokens in one chunk; rounded up to whole engine blocks. Default: 256 on "
        "accelerators; one block on CPUs, where recomputing a tail costs more than moving it.",
    )
    salt: str = Field(
        "", description="Engines with different salts never share a chunk (tenant isolation)."
    )
    weights_id: str | None = Field(
        None,
        min_length=1,
        description="Names the weights of engines that do not load them from files of this machine "
        "(streamed weights): engines with the same model name and weights_id are taken to have the "
        "same weights. Change it whenever the weights change. Default: such an engine shares with "
        "no other one (docs/identity.md).",
    )
    save_generated: bool = Field(
        True, description="Save the KV of generated tokens too: the next turn contains them."
    )
    copy_threads: int = Field(
        2, ge=1, le=16, description="Threads with which one worker loads chunks on a CPU."
    )
    gpu_ring_bytes: ByteSize = Field(
        ByteSize(64 << 20),
        ge=0,
        description="GPU memory of one worker through which chunks in short pieces pass, half for "
        "loads and half for saves, for instance 64MiB; 0: every piece is copied by itself.",
    )
    direct_copy_bytes: ByteSize = Field(
        ByteSize(128 << 10),
        ge=0,
        description="Size from which the contiguous pieces of a chunk are copied one by one "
        "between GPU and arena, for instance 128KiB; shorter ones are packed by a kernel.",
    )
    max_inflight_saves: int = Field(
        256,
        ge=1,
        description="Chunks one engine may be saving at a time; past it, saves are dropped.",
    )
    grant_slots: int = Field(
        256,
        ge=1,
        description="Free slots an engine asks for ahead of need, within its share of the arena.",
    )
    grant_seconds: float = Field(
        30.0, gt=0, description="Seconds in which a granted slot must be filled."
    )
    stage_seconds: float = Field(
        5.0,
        ge=0,
        description="Seconds a request waits at most for chunks from other nodes; 0 never waits.",
    )
    stage_min_tokens: int = Field(
        512,
        ge=0,
        description="Missing tokens below which other nodes are not asked: computing is quicker.",
    )
    exchange_seconds: float = Field(
        0.1, gt=0, description="Seconds between an engine's batched messages to its shard."
    )
    eviction_policy: Literal["arc", "hinted", "lru", "s3fifo"] = Field(
        "arc", description="Which chunks make room when the arena is full (docs/policies.md)."
    )
    tenant_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of a shard's chunks past which a tenant (requests with one cache_salt) "
        "makes room before others do. Default: tenants have no shares.",
    )
    request_pins: float = Field(
        0.125,
        ge=0,
        le=0.5,
        description="Share of a shard's slots of one size that requests may pin "
        "(kv_transfer_params); 0: requests cannot pin. Cache.pin has half of them, these included.",
    )
    remote_url: str | None = Field(
        None,
        description="An object store for chunks, shared by all nodes and clusters: "
        "s3://BUCKET/PREFIX, gs://..., az://... or file:///DIRECTORY. Credentials come from the "
        "cloud's own environment variables. Nothing is evicted: let the bucket expire what is "
        "below chunks/. Default: no remote tier.",
    )
    remote_options: dict[str, str] = Field(
        {},
        description="Options of the object store as the package obstore names them, for instance "
        '{"endpoint": "http://HOST:PORT", "allow_http": "true"}.',
    )
    encryption_key_file: Path | None = Field(
        None,
        description="Encrypts disk and remote tier (AES-256-GCM) with the key in this file, 32 "
        "bytes or more; what is on disk must be removed to change it. Default: no encryption.",
    )
    tier_admission: Literal["second_hit", "all"] = Field(
        "second_hit",
        description="Which chunks are also kept below memory: those that were used or saved a "
        "second time, or all.",
    )
    load_when: Literal["faster", "always"] = Field(
        "faster",
        description="Fetch chunks from lower tiers and other nodes when that is expected to be "
        "faster than computing them, or always.",
    )
    transport: Literal["auto", "shared_memory", "nixl", "object_store"] = Field(
        "auto", description="How chunks move between nodes; auto takes the fastest that works."
    )
    disk_dir: Path | None = Field(
        None,
        description="A directory on a local disk for this node's disk tier, and for nothing else. "
        "Default: no disk tier.",
    )
    disk_capacity: ByteSize | None = Field(
        None,
        ge=1 << 20,
        description="Bytes the disk tier may take, for instance 1TiB. "
        "Default: a quarter of what its file system has free, what the tier holds included.",
    )
    disk_threads: int = Field(
        4, ge=1, le=64, description="Chunks read from disk at a time; half as many are written."
    )
    directory_capacity: int = Field(
        1 << 20,
        ge=1024,
        description="Chunks the directory remembers, about 100 bytes each; the oldest make room.",
    )
    directory_shards: int = Field(
        1,
        ge=1,
        le=64,
        description="Actors that share the directory's keys; one is enough for some ten nodes "
        "or ten million chunks.",
    )
    reconcile_seconds: float = Field(
        2.0, gt=0, description="Seconds between checks that every live node has a shard."
    )
    drain_seconds: float = Field(
        30.0,
        gt=0,
        description="Seconds in which a node that leaves hands over what only it holds; less if "
        "Ray says that it ends earlier.",
    )
    release_idle_seconds: float | None = Field(
        None,
        gt=0,
        description="Seconds without an engine after which a node's shard hands over its chunks "
        "and ends, so that Ray's autoscaler can remove the node. Default: never.",
    )
    replicas: int = Field(
        1,
        ge=1,
        le=4,
        description="Nodes that should hold a chunk that is hit often; 1 leaves copies to use.",
    )
    ray_address: str | None = Field(
        None,
        description="The Ray cluster to use. Default: the initialised one, else RAY_ADDRESS, "
        "else a running local cluster, else a new local one.",
    )
    ray_namespace: str = Field(
        "lmkv", min_length=1, description="Ray namespace of the actors; one cache per namespace."
    )
    connect_seconds: float = Field(
        60.0, gt=0, description="Seconds to wait for the cache's actors to start."
    )

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
        path = os.environ.get(CONFIG_FILE_VARIABLE)
        files = (YamlConfigSettingsSource(settings_cls, yaml_file=path),) if path else ()
        return init_settings, env_settings, *files


def load_settings(overrides: Mapping[str, Any] | None = None) -> Settings:
    """The settings of this process, with ``overrides`` on top.

    Raises:
        ConfigError: a value is wrong, a name in ``overrides``, the file or the environment is not
            a setting, or the file cannot be read; the message lists every problem at once.
    """
    path = os.environ.get(CONFIG_FILE_VARIABLE)
    if path and not Path(path).is_file():
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


def _problem(error: ErrorDetails) -> str:
    """What is wrong with one setting. A misspelt one may hold a secret."""
    name = str(error["loc"][0]) if error["loc"] else ""
    secret = name in ("remote_options", "salt") or name not in Settings.model_fields
    given = MASK if secret else mask_text(repr(error["input"]))
    return f"{'.'.join(map(str, error['loc']))}: {error['msg']} (given: {given})"


def _refuse_unknown_variables() -> None:
    known = {f"LMKV_{name.upper()}" for name in Settings.model_fields} | {CONFIG_FILE_VARIABLE}
    unknown = sorted(n for n in os.environ if n.startswith("LMKV_") and n not in known)
    if unknown:
        raise ConfigError(
            f"Unknown environment variables: {', '.join(unknown)}.",
            next_step="Run 'lmkv config' for all settings.",
        )
