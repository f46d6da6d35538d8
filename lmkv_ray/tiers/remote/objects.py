"""The object store, as the tier sees it: bytes under names, each call with a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol, cast

from lmkv_ray.errors import ConfigError, UnsupportedError
from lmkv_ray.masking import mask_text, secrets_of

CONNECT_SECONDS = 3
MOST_LISTED = 1 << 16
"""Objects below a prefix that is listed; with more, something is wrong with the store."""
_NO_BUCKET = "there is no such bucket or directory"
_EMPTY = ("416 Range Not Satisfiable", "InvalidRange", "Requested range was invalid")
"""What stores say when asked for the beginning of an object without any bytes."""


class TooLargeError(Exception):
    """An object has more bytes than any that was stored under such a name."""


class GetResult(Protocol):
    """An object whose bytes are on their way."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """With the ``size`` of the whole object, in bytes."""
        ...

    async def bytes_async(self) -> Any:
        """A buffer with the bytes that were asked for."""
        ...


class ObjectStore(Protocol):
    """What the tier needs of an object store: the seam to the network.

    Every store of obstore is one; the simulation has a bucket that is slow and fails when it is
    told so (``tests/simulation/bucket.py``). Methods raise what those of obstore raise: where an
    object or a bucket is missing, ``FileNotFoundError``.
    """

    async def put_async(
        self, path: str, file: Iterable[bytes], *, use_multipart: bool | None
    ) -> object:
        """Publish an object in one atomic step."""
        ...

    async def get_async(self, path: str, *, options: Mapping[str, Any] | None) -> GetResult:
        """An object, or the ``range`` (begin, end) of it that the options name."""
        ...

    def list(self, prefix: str, *, chunk_size: int) -> AsyncIterator[Sequence[Mapping[str, Any]]]:
        """Pages with the ``path`` of each object below a prefix."""
        ...

    async def delete_async(self, paths: str) -> object:
        """Remove an object."""
        ...


class Objects:
    """A bucket (or a prefix of one, or a directory). Made by ``open_objects``.

    Every method raises ``TimeoutError`` past ``within`` seconds, and whatever the store raises:
    only ``problem_of`` makes of that what may be printed.

    Args:
        store: where the objects are.
        secrets: what no text about it may contain.
    """

    def __init__(self, store: ObjectStore, secrets: Sequence[str] = ()) -> None:
        from obstore.exceptions import GenericError

        self._store = store
        self._secrets = secrets
        self._generic = GenericError

    async def put(self, name: str, parts: list[Any], within: float) -> None:
        """Publish an object in one atomic step; ``parts`` are its bytes in order."""
        async with asyncio.timeout(within):
            # One part and one request, whatever the size: a multipart upload that is left alone
            # costs money for ever.
            try:
                await self._store.put_async(name, iter(parts), use_multipart=False)
            except FileNotFoundError as error:
                raise OSError(_NO_BUCKET) from error

    async def get(self, name: str, most: int, within: float) -> Any:
        """Bytes (a buffer) of an object.

        Raises:
            FileNotFoundError: there is none.
            TooLargeError: it has more than ``most`` bytes, of which none was read.
        """
        async with asyncio.timeout(within):
            result = await self._store.get_async(name, options=None)
            if result.meta["size"] > most:
                raise TooLargeError(f"{name} has {result.meta['size']} bytes, not {most} or fewer")
            return await result.bytes_async()

    async def beginning(self, name: str, nbytes: int, within: float) -> tuple[bytes, int] | None:
        """The first bytes of an object, ``nbytes`` at most, and its size; None if there is none."""
        try:
            async with asyncio.timeout(within):
                result = await self._store.get_async(name, options={"range": (0, nbytes)})
                return bytes(await result.bytes_async()), int(result.meta["size"])
        except FileNotFoundError:
            return None
        except self._generic as error:
            if any(words in str(error) for words in _EMPTY):
                return b"", 0
            raise

    async def listed(self, prefix: str, within: float) -> list[str]:
        """Names of all objects below a prefix."""
        found: list[str] = []
        async with asyncio.timeout(within):
            try:
                async for page in self._store.list(prefix, chunk_size=1000):
                    found += [str(meta["path"]) for meta in page]
                    if len(found) > MOST_LISTED:
                        raise OSError(f"it has more than {MOST_LISTED} objects below {prefix}")
            except FileNotFoundError as error:
                raise OSError(_NO_BUCKET) from error
            except self._generic as error:
                # Of listings obstore does not say more.
                if any(f" {status} " in str(error) for status in (401, 403)):
                    raise PermissionError(str(error)) from error
                raise
        return found

    async def delete(self, name: str, within: float) -> None:
        """Remove an object, if it is there."""
        try:
            async with asyncio.timeout(within):
                await self._store.delete_async(name)
        except FileNotFoundError:
            pass

    def problem_of(self, error: Exception) -> str:
        """What an error of the store means, and what to do."""
        from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

        brief = _brief(error, self._secrets)
        if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError):
            return (
                f"The remote store refuses us: {brief}. Next step: check credentials and "
                "permissions (get, put, list, delete) of LMKV_REMOTE_URL."
            )
        if isinstance(error, TimeoutError):
            return (
                "The remote store does not answer in time. Next step: look at it and the network."
            )
        return f"The remote store fails: {brief}. Next step: look at it and the network."


def open_objects(url: str, options: Mapping[str, str]) -> Objects:
    """An object store by its URL; nothing is asked of it yet.

    Args:
        url: ``s3://bucket/prefix``, ``gs://...``, ``az://...`` or ``file:///directory``.
        options: as obstore names them, on top of what the cloud's own environment variables say.

    Raises:
        UnsupportedError: the package obstore is missing.
        ConfigError: the URL or an option is wrong.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise UnsupportedError(
            "remote_url is set, but the package obstore is not installed.",
            next_step="pip install 'lmkv-ray[remote]', or unset LMKV_REMOTE_URL.",
        ) from error
    more: dict[str, Any] = {}
    if url.startswith("file:"):
        more["mkdir"] = True
    else:
        # Deadlines and pauses are ours: the store's own retries would outlive them.
        more["retry_config"] = {"max_retries": 0}
        more["client_options"] = {
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
            "allow_http": options.get("allow_http", "").lower() in ("1", "true"),
        }
        more["config"] = {k: v for k, v in options.items() if k != "allow_http"}
    secrets = secrets_of(options)
    try:
        return Objects(cast(ObjectStore, from_url(url, **more)), secrets)
    except (BaseError, ValueError, OSError) as error:
        why = _brief(error, secrets)
    # Not as the cause of what follows: it may name secrets.
    raise ConfigError(
        f"The remote store {mask_text(url, secrets)} cannot be used: {why}.",
        next_step="set LMKV_REMOTE_URL to s3://BUCKET/PREFIX, gs://..., az://... or "
        "file:///DIRECTORY, and LMKV_REMOTE_OPTIONS to options that obstore knows.",
    )


def _brief(error: Exception, secrets: Sequence[str]) -> str:
    """The first line: the rest is the store's XML and a debug dump."""
    text = mask_text(str(error).strip().split("\n")[0], secrets)
    return text[:300].rstrip(".") or type(error).__name__
