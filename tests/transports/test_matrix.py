"""Every behaviour over every transport: ``TransportContract``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from random import Random

import pytest
import pytest_asyncio

from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.transports import ObjectStoreTransport, SharedMemoryTransport, Transport
from tests.simulation.transport import SimulatedTransport, Wire
from tests.transports.contract import TransportContract
from tests.transports.harness import CHUNK, Here, LocalPeer, Peers, RayPeer

module_fixture = pytest_asyncio.fixture(scope="module", loop_scope="module")
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    import ray

    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20,
        log_to_driver=False,
    )  # fmt: skip
    yield
    ray.shutdown()


@module_fixture
async def here() -> AsyncIterator[Here]:
    here = Here()
    yield here
    await here.close()


@module_fixture
async def peers() -> AsyncIterator[Peers]:
    peers = Peers()
    yield peers
    await peers.close()


class TestSharedMemory(TransportContract):
    def make(self, here: Here, peer: LocalPeer | RayPeer) -> Transport:
        return SharedMemoryTransport(SYSTEM_CLOCK, step_bytes=2 * CHUNK)


class TestObjectStore(TransportContract):
    def make(self, here: Here, peer: LocalPeer | RayPeer) -> Transport:
        return ObjectStoreTransport(SYSTEM_CLOCK, batch_bytes=2 * CHUNK)


class TestNixl(TransportContract):
    def make(self, here: Here, peer: LocalPeer | RayPeer) -> Transport:
        return here.transport


class TestSimulated(TransportContract):
    """The simulation's card, on the clock of this machine; it has no server, and reads the peer."""

    together = 1

    def make(self, here: Here, peer: LocalPeer | RayPeer) -> Transport:
        assert isinstance(peer, LocalPeer)
        wire = Wire(_at_once, lambda _: peer.store.reader if peer.alive else None, lambda: 0.0)
        return SimulatedTransport("here", wire, SYSTEM_CLOCK, Random(1))


async def _at_once(sender: str, receiver: str, nbytes: int) -> None:
    """A network without delay."""


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
class TestObjectStoreInRay(TestObjectStore):
    peer = RayPeer


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
class TestNixlInRay(TestNixl):
    peer = RayPeer
