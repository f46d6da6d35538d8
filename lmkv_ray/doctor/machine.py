"""What the doctor looks at on this machine. No Ray cluster is needed."""

from __future__ import annotations

import asyncio
import mmap
import os
import resource
import secrets
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lmkv_ray.arena.capacity import capacity_for
from lmkv_ray.arena.machine import machine_limits
from lmkv_ray.config import Settings
from lmkv_ray.doctor.finding import Finding, bad, good, note, of_error
from lmkv_ray.errors import LmkvError, UnsupportedError
from lmkv_ray.ownership import trouble_with_directory
from lmkv_ray.tiers.cipher import load_cipher
from lmkv_ray.tiers.remote.objects import open_objects
from lmkv_ray.vllm.engine.versions import check_version, vllm_version

FEW_FILES = 4096
"""A shard has a file for each peer and each chunk that is read, Ray some hundreds."""
TRIAL_BYTES = 32 << 20
"""Written to and read from a disk to see how fast it is."""
SLOW_BYTES_PER_SECOND = 200e6
"""Below this, computing is often quicker than reading."""
REMOTE_SECONDS = 10.0


def machine_findings(settings: Settings) -> Iterator[Finding]:
    """Packages, limits, and what the settings of this process name on this machine."""
    yield _vllm()
    yield _nixl()
    yield _files()
    yield _arena(settings)
    if settings.encryption_key_file is not None:
        yield _key(settings.encryption_key_file)
    if settings.disk_dir is not None:
        yield from _disk(settings.disk_dir)
    if settings.remote_url is not None:
        yield asyncio.run(_remote(settings))


def _vllm() -> Finding:
    try:
        check_version()
    except UnsupportedError as error:
        return note("vLLM", error.what, f"{error.next_step} A node without engines needs none.")
    return good("vLLM", f"Version {vllm_version()} is supported.")


def _nixl() -> Finding:
    try:
        found = version("nixl")
    except PackageNotFoundError:
        return note(
            "NIXL",
            "The package nixl is not installed: chunks travel through Ray's object store.",
            "pip install 'lmkv-ray[cuda]' or 'lmkv-ray[rocm]', which bring nixl.",
        )
    cards = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    network = f"over {', '.join(cards)}" if cards else "over TCP (there is no RDMA card here)"
    return good("NIXL", f"Version {found}, {network}.")


def _files() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and limit < FEW_FILES:
        return note(
            "open files",
            f"A process may have {limit} files open.",
            f"'ulimit -n 65536' before 'ray start'; {FEW_FILES} or more are good.",
        )
    return good("open files", f"A process may have {limit} files open.")


def _arena(settings: Settings) -> Finding:
    wanted = None if settings.capacity is None else int(settings.capacity)
    try:
        machine = machine_limits(settings.arena_dir)
        capacity = capacity_for(machine, wanted)
    except LmkvError as error:
        return of_error("memory", error)
    return good("memory", f"An arena that is made now {capacity.why}.")


def _key(file: Path) -> Finding:
    try:
        load_cipher(file)
    except LmkvError as error:
        return of_error("encryption", error)
    return good("encryption", f"The key in {file} can be used.")


def _disk(directory: Path) -> Iterator[Finding]:
    try:
        status = directory.stat()
    except FileNotFoundError:
        yield note("disk", f"{directory} is not there yet.", "none: the shard makes it.")
        return
    except OSError as error:
        yield bad("disk", f"{directory}: {error.strerror}.", "correct LMKV_DISK_DIR.")
        return
    if (trouble := trouble_with_directory(status, directory)) is not None:
        yield bad("disk", f"{directory} {trouble[0]}.", f"{trouble[1]}.")
        return
    try:
        written, read = _speeds(directory)
    except OSError as error:
        yield bad(
            "disk",
            f"{directory} does not take {TRIAL_BYTES >> 20} MiB: {error.strerror}.",
            "make room, or set LMKV_DISK_DIR to another directory.",
        )
        return
    what = f"{directory} writes {written / 1e9:.2f} and reads {read / 1e9:.2f} GB/s."
    if read < SLOW_BYTES_PER_SECOND:
        yield note("disk", what, "use a local NVMe disk; the cache reads what is worth it.")
    else:
        yield good("disk", what)


def _speeds(directory: Path) -> tuple[float, float]:
    """Bytes a second that a disk writes and reads, with a file that has no name.

    Raises:
        OSError: what the file system says.
    """
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    try:
        file = os.open(directory, flags | os.O_DIRECT, 0o600)
    except OSError:
        file = os.open(directory, flags, 0o600)
    try:
        with mmap.mmap(-1, TRIAL_BYTES) as memory:  # aligned to pages, as O_DIRECT wants
            memory[:] = secrets.token_bytes(TRIAL_BYTES)
            began = time.monotonic()
            for at in range(0, TRIAL_BYTES, 1 << 20):
                os.pwrite(file, memoryview(memory)[at : at + (1 << 20)], at)
            os.fdatasync(file)
            written = time.monotonic() - began
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.monotonic()
            for at in range(0, TRIAL_BYTES, 1 << 20):
                os.preadv(file, [memoryview(memory)[at : at + (1 << 20)]], at)
            read = time.monotonic() - began
    finally:
        os.close(file)
    return TRIAL_BYTES / max(written, 1e-9), TRIAL_BYTES / max(read, 1e-9)


async def _remote(settings: Settings) -> Finding:
    """Whether an object can be written, read and removed. Only a name of our own is touched."""
    assert settings.remote_url is not None
    url = settings.shown("remote_url")
    name, data = f"doctor/{secrets.token_hex(8)}", secrets.token_bytes(1 << 16)
    try:
        objects = open_objects(settings.remote_url, settings.remote_options)
    except LmkvError as error:
        return of_error("remote store", error)
    began = time.monotonic()
    try:
        await objects.put(name, [data], REMOTE_SECONDS)
        same = bytes(await objects.get(name, len(data), REMOTE_SECONDS)) == data
        await objects.delete(name, REMOTE_SECONDS)
    except Exception as error:
        what, _, next_step = objects.problem_of(error).partition(" Next step: ")
        return bad("remote store", f"{url}: {what}", next_step)
    if not same:
        return bad(
            "remote store",
            f"{url} returned other bytes than were written.",
            "do not use this store.",
        )
    taken = (time.monotonic() - began) * 1e3
    return good("remote store", f"{url} wrote, read and removed an object in {taken:.0f} ms.")
