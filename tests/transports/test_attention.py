"""When a peer is asked before it is read from."""

from __future__ import annotations

from lmkv_ray.transports.nixl.attention import AWAKE_SECONDS, HELD_SECONDS, Attention

QUICK, SLOW = 1e-3, 5e-3


def test_hardware_needs_nobody() -> None:
    peer = Attention()
    for now in (0.0, 1.0, 1000.0):
        assert not peer.wants_asking(now)
        assert not peer.looked(now, QUICK)


def test_who_sleeps_is_asked_and_then_awake_for_a_while() -> None:
    peer = Attention()
    assert peer.looked(10.0, SLOW)
    assert peer.wants_asking(10.0)
    assert not peer.looked(10.0, SLOW), "known"
    peer.asked(11.0)
    assert not peer.wants_asking(11.0 + AWAKE_SECONDS / 2)
    assert peer.wants_asking(12.0 + AWAKE_SECONDS)
    assert not peer.wants_asking(10.0 + HELD_SECONDS), "tried again"


def test_who_is_slow_though_awake_does_not_sleep() -> None:
    peer = Attention()
    peer.asked(10.0)
    assert not peer.looked(10.0 + AWAKE_SECONDS / 2, SLOW)
    assert not peer.wants_asking(20.0)
