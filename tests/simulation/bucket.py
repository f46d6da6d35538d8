"""A bucket that simulated nodes share: late, failing, lying, or not there, as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

from obstore.exceptions import AlreadyExistsError, PermissionDeniedError

T = TypeVar("T")


@dataclass
class BucketResult:
    """See ``lmkv_ray.tiers.remote.objects.GetResult``."""

    meta: Mapping[str, Any]
    data: bytes

    async def bytes_async(self) -> bytes:
        return self.data


class Bucket:
    """Objects by name.

    Args:
        random: for all that is a matter of chance.
    """

    def __init__(self, random: Random) -> None:
        self.random = random
        self.objects: dict[str, bytes] = {}
        self.pace = 0.02
        """Mean seconds that a request takes, each way."""
        self.down = False
        self.denied = False
        self.fails = 0.0
        """Share of the requests that fail, half of them after they were carried out."""
        self.hangs = 0.0
        """Share of the requests that are carried out and never answered."""
        self.lies = 0.0
        """Share of the answers with one wrong bit."""

    def store(self) -> BucketStore:
        """The bucket as one node sees it."""
        return BucketStore(self)


class BucketStore:
    """See ``lmkv_ray.tiers.remote.objects.ObjectStore``.

    What was asked is carried out also if whoever asked is gone, or has given up waiting.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.cut = False
        """This node does not reach the bucket."""

    async def put_async(
        self,
        path: str,
        file: Iterable[bytes],
        *,
        use_multipart: bool | None = None,
        mode: str = "overwrite",
    ) -> object:
        """With the mode ``create`` an object that is there is not replaced."""
        data = b"".join(bytes(part) for part in file)

        def effect() -> None:
            if mode == "create" and path in self.bucket.objects:
                raise AlreadyExistsError(path)
            self.bucket.objects[path] = data

        return await self._request(effect)

    async def get_async(
        self, path: str, *, options: Mapping[str, Any] | None = None
    ) -> BucketResult:
        def effect() -> BucketResult:
            data = self.bucket.objects.get(path)
            if data is None:
                raise FileNotFoundError(path)
            begin, end = (options or {}).get("range", (0, len(data)))
            part = self._perhaps_wrong(data[begin:end])
            return BucketResult({"path": path, "size": len(data)}, part)

        return await self._request(effect)

    async def list(
        self, prefix: str, *, chunk_size: int
    ) -> AsyncIterator[Sequence[Mapping[str, Any]]]:
        names = await self._request(
            lambda: sorted(name for name in self.bucket.objects if name.startswith(prefix))
        )
        for begin in range(0, len(names), chunk_size):
            yield [{"path": name} for name in names[begin : begin + chunk_size]]

    async def delete_async(self, paths: str) -> object:
        return await self._request(lambda: self.bucket.objects.pop(paths, None) and None)

    async def _request(self, effect: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[T | Exception] = loop.create_future()
        # In no context: the bucket is no part of the process that asks.
        loop.call_later(self._pause(), self._arrived, effect, answered, context=Context())
        answer = await answered
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _arrived(self, effect: Callable[[], T], answered: asyncio.Future[T | Exception]) -> None:
        random, bucket = self.bucket.random, self.bucket
        chance = random.random()
        answer: T | Exception
        if self.cut or bucket.down or chance < bucket.fails / 2:
            answer = OSError("connection reset")
        elif bucket.denied:
            answer = PermissionDeniedError("AccessDenied")
        else:
            try:
                answer = effect()
            except Exception as error:
                answer = error
            if chance < bucket.fails:
                answer = OSError("connection reset")
            if random.random() < bucket.hangs:
                return
        loop = asyncio.get_running_loop()
        loop.call_later(self._pause(), _deliver, answered, answer, context=Context())

    def _pause(self) -> float:
        return self.bucket.random.expovariate(1 / self.bucket.pace)

    def _perhaps_wrong(self, data: bytes) -> bytes:
        random = self.bucket.random
        if not data or random.random() >= self.bucket.lies:
            return data
        at = random.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _deliver(answered: asyncio.Future[T], answer: T) -> None:
    if not answered.done():
        answered.set_result(answer)
