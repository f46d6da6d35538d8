from lmkv_ray.layout import ChunkLayout, Run
from lmkv_ray.messages import Owner
from lmkv_ray.vllm.engine.metadata import LayoutReport, Share, WorkerReport, share_chunks


def test_reports_of_workers_add_up() -> None:
    first = WorkerReport({1: 1}, {2: 1}, {"a": 4, "b": 2})
    both = first.aggregate(WorkerReport({1: 1, 3: 1}, {2: 1}, {"a": 3}))
    assert both == WorkerReport({1: 2, 3: 1}, {2: 2}, {"a": 3, "b": 2})


def report(rank: int, *block_bytes: int) -> LayoutReport:
    layouts = tuple(ChunkLayout((Run(0, size, size),), 2, 9) for size in block_bytes)
    return LayoutReport(rank, "here", Owner(pid=1, start=1), layouts, "cpu")


def test_slices_of_workers_lie_side_by_side() -> None:
    """Those of pipeline stages may differ in size."""
    nbytes, shares = share_chunks([report(0, 8, 4), report(1, 6, 0)], replicas=1)
    assert nbytes == [28, 8]
    assert shares == {0: Share((0, 0)), 1: Share((16, 8))}


def test_workers_with_the_same_bytes_share_a_slice() -> None:
    """As of latent attention, where all tensor ranks of a stage have the whole."""
    nbytes, shares = share_chunks([report(rank, 8) for rank in range(4)], replicas=2)
    assert nbytes == [32]
    assert shares == {
        0: Share((0,), 0, 2),
        1: Share((0,), 1, 2),
        2: Share((16,), 0, 2),
        3: Share((16,), 1, 2),
    }


def test_workers_with_the_same_bytes_on_another_node_have_a_copy_of_their_own() -> None:
    """Those on this node take turns among themselves: nobody else writes into this arena."""
    nbytes, shares = share_chunks([report(rank, 8) for rank in (2, 3, 4)], replicas=4)
    assert nbytes == [32]
    assert shares == {2: Share((0,), 0, 2), 3: Share((0,), 1, 2), 4: Share((16,), 0, 1)}
