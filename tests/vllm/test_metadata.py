from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.vllm.metadata import LoadJob, WorkerReport


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.data())
def test_the_parts_of_a_load_are_the_load(
    chunks: int, per_chunk: int, parts: int, data: st.DataObject
) -> None:
    skip = data.draw(st.integers(0, per_chunk - 1))
    count = data.draw(st.integers(1, max(1, chunks * per_chunk - skip)))
    job = LoadJob("r", 1, 5, list(range(chunks)), [2] * chunks, skip, list(range(100, 100 + count)))
    split = job.split(parts, per_chunk)
    assert len(split) <= parts
    assert [s for part in split for s in part.slots] == job.slots
    assert [b for part in split for b in part.blocks] == job.blocks
    assert split[0].skip == skip
    for part in split:
        assert part.first_chunk == 5 + part.slots[0]
        first_block = (part.first_chunk - 5) * per_chunk + part.skip - skip
        assert part.blocks == job.blocks[first_block : first_block + len(part.blocks)]


def test_reports_of_workers_add_up() -> None:
    first = WorkerReport({1: 1}, {2: 1}, {"a": 4, "b": 2})
    both = first.aggregate(WorkerReport({1: 1, 3: 1}, {2: 1}, {"a": 3}))
    assert both == WorkerReport({1: 2, 3: 1}, {2: 2}, {"a": 3, "b": 2})
