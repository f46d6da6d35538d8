from __future__ import annotations

import pytest

from lmkv_ray.shard import Admission

KEYS = [bytes([i]) * 16 for i in range(9)]


def taken(admission: Admission) -> list[bytes]:
    return list(iter(admission.take, None))


def test_second_hit_waits_for_a_use() -> None:
    admission = Admission("second_hit")
    admission.committed(KEYS)
    assert taken(admission) == []
    admission.touched(KEYS[3:5])
    assert taken(admission) == KEYS[3:5]


def test_all_takes_what_is_saved_in_order_and_once() -> None:
    admission = Admission("all")
    admission.committed(KEYS)
    admission.touched(KEYS)
    assert admission.take() == KEYS[0]
    admission.touched(KEYS)
    assert taken(admission) == KEYS[1:]
    assert admission.take() is None


def test_no_tier_collects_nothing() -> None:
    admission = Admission(None)
    admission.committed(KEYS)
    admission.touched(KEYS)
    assert len(admission) == 0


@pytest.mark.parametrize("rule", ["all", "second_hit"])
def test_what_is_evicted_first_is_missed_and_may_come_again(rule: str) -> None:
    admission = Admission(rule)  # type: ignore[arg-type]
    admission.touched(KEYS[:2])
    admission.removed(KEYS[:1])
    assert admission.missed == 1
    assert taken(admission) == KEYS[1:2]
    admission.touched(KEYS[:2])
    assert taken(admission) == KEYS[:1]


def test_bounded() -> None:
    admission = Admission("all", limit=3)
    admission.committed(KEYS)
    assert admission.missed == 6
    assert taken(admission) == KEYS[6:]
