from lmkv_ray.vllm.metadata import WorkerReport


def test_reports_of_workers_add_up() -> None:
    first = WorkerReport({1: 1}, {2: 1}, {"a": 4, "b": 2})
    both = first.aggregate(WorkerReport({1: 1, 3: 1}, {2: 1}, {"a": 3}))
    assert both == WorkerReport({1: 2, 3: 1}, {2: 2}, {"a": 3, "b": 2})
