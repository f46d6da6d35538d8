"""An engine without a model: it talks to a shard and moves made-up bytes."""

from collections.abc import Callable, Sequence

import numpy as np

from lmkv_ray.arena import ArenaReader, this_process
from lmkv_ray.keys import key_array
from lmkv_ray.messages import (
    Commit,
    Exchange,
    ExchangeReply,
    Hello,
    Owner,
    Stage,
    StageReply,
    Welcome,
    decode,
    encode,
)

SPACE = 7
CHUNK_BYTES = 40_000
Call = Callable[[str, bytes], bytes]


def make_keys(n: int, seed: int = 0) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [rng.bytes(16) for _ in range(n)]


def payload_of(key: bytes, nbytes: int = CHUNK_BYTES) -> bytes:
    """The bytes of a chunk, which follow from its key."""
    return np.random.default_rng(list(key)).bytes(nbytes)


class FakeEngine:
    """Args: how to call the shard (method, message) -> answer; who owns its slots."""

    def __init__(
        self,
        call: Call,
        engine_id: str = "engine",
        owner: Owner | None = None,
        space: int = SPACE,
        nbytes: int = CHUNK_BYTES,
        writers: Sequence[Owner] = (),
    ) -> None:
        self.call = call
        self.writers = list(writers)
        self.engine_id = engine_id
        self.owner = owner or this_process()
        self.space, self.nbytes = space, nbytes
        self.reader: ArenaReader | None = None
        self.slots: list[int] = []
        self.hello()

    def hello(self) -> Welcome:
        message = Hello(
            engine_id=self.engine_id,
            owner=self.owner,
            space=self.space,
            model="fake",
            slot_bytes=self.nbytes,
            held=self.slots,
            writers=self.writers,
        )
        welcome = decode(self.call("hello", encode(message)), Welcome)
        if self.reader is None or self.reader.header.arena_id != welcome.arena_id:
            self.close()
            self.reader = ArenaReader.attach(welcome.arena_path, welcome.arena_id)
        self.slots = list(welcome.grant.slots)
        return welcome

    def exchange(
        self, want: int = 0, commits: Sequence[Commit] = (), touched: Sequence[bytes] = ()
    ) -> ExchangeReply:
        message = Exchange(
            engine_id=self.engine_id, want=want, commits=list(commits), touched=b"".join(touched)
        )
        reply = decode(self.call("exchange", encode(message)), ExchangeReply)
        if reply.grant is not None:
            self.slots += reply.grant.slots
        return reply

    def tell(self, added: Sequence[bytes] = (), removed: Sequence[bytes] = ()) -> ExchangeReply:
        """Chunks came to the engine's own device, others went."""
        message = Exchange(
            engine_id=self.engine_id,
            device_added=b"".join(added),
            device_removed=b"".join(removed),
        )
        return decode(self.call("exchange", encode(message)), ExchangeReply)

    def save(self, keys: Sequence[bytes]) -> ExchangeReply:
        """Write and commit these chunks."""
        assert self.reader is not None
        if len(self.slots) < len(keys):
            self.exchange(want=len(keys) - len(self.slots))
        commits = []
        for key in keys:
            slot = self.slots.pop(0)
            view = self.reader.payload(slot, self.nbytes)
            view[:] = np.frombuffer(payload_of(key, self.nbytes), np.uint8)
            commits.append(Commit(slot=slot, key=key, nbytes=self.nbytes))
        return self.exchange(commits=commits)

    def intact(self, keys: Sequence[bytes]) -> int:
        """How many of the first keys are here, with exactly their bytes."""
        assert self.reader is not None
        hits = self.reader.lookup(key_array(keys))
        for i, key in enumerate(keys):
            if not hits.found[i]:
                return i
            at, nbytes = int(hits.offsets[i]), int(hits.nbytes[i])
            assert self.reader.data[at : at + nbytes].tobytes() == payload_of(key, self.nbytes)
        return len(keys)

    def stage_message(self, keys: Sequence[bytes], within: float = 10.0) -> bytes:
        return encode(
            Stage(
                engine_id=self.engine_id,
                keys=b"".join(keys),
                slot_bytes=self.nbytes,
                within=within,
            )
        )

    def stage(self, keys: Sequence[bytes], within: float = 10.0) -> StageReply:
        return decode(self.call("stage", self.stage_message(keys, within)), StageReply)

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()
            self.reader = None
