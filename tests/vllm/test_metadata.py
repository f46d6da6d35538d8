from lmkv_ray.layout import ChunkLayout, Run
from lmkv_ray.vllm.metadata import LayoutReport, WorkerReport, share_chunks


def test_reports_of_workers_add_up() -> None:
    first = WorkerReport({1: 1}, {2: 1}, {"a": 4, "b": 2})
    both = first.aggregate(WorkerReport({1: 1, 3: 1}, {2: 1}, {"a": 3}))
    assert both == WorkerReport({1: 2, 3: 1}, {2: 2}, {"a": 3, "b": 2})


def report(rank: int, *block_bytes: int) -> LayoutReport:
    layouts = tuple(ChunkLayout((Run(0, size, size),), 2, 9) for size in block_bytes)
    return LayoutReport(rank, "here", layouts, "cpu")


def test_slices_of_workers_lie_side_by_side() -> None:
    """Those of pipeline stages may differ in size."""
    nbytes, offsets = share_chunks([report(0, 8, 4), report(1, 6, 0)], replicas=1)
    assert nbytes == [28, 8]
    assert offsets == ((0, 0), (16, 8))


def test_workers_with_the_same_bytes_share_a_slice() -> None:
    """As of latent attention, where all tensor ranks of a stage have the whole."""
    nbytes, offsets = share_chunks([report(rank, 8) for rank in range(4)], replicas=2)
    assert nbytes == [32]
    assert offsets == ((0,), (0,), (16,), (16,))
