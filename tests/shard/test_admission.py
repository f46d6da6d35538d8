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


def test_saved_again_is_a_second_use() -> None:
    admission = Admission("second_hit")
    admission.committed(KEYS[:2])
    admission.removed(KEYS[:2])  # evicted before anybody came back
    assert admission.missed == 0
    admission.committed(KEYS[1:3])
    assert taken(admission) == KEYS[1:2]


def test_what_was_seen_is_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmkv_ray.shard.admission.MAX_SEEN", 2)
    admission = Admission("second_hit")
    admission.committed(KEYS[:3])
    admission.removed(KEYS[:3])
    admission.committed(KEYS[:1])
    assert taken(admission) == []


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
