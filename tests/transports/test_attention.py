"""When a peer is asked before it is read from."""

from __future__ import annotations

from lmkv_ray.transports.nixl.attention import AWAKE_SECONDS, HELD_SECONDS, Attention

QUICK, SLOW, FAR = 1e-3, 5e-3, 0.1


def test_hardware_needs_nobody() -> None:
    peer = Attention()
    for now in (0.0, 1.0, 1000.0):
        assert not peer.wants_asking(now)
        assert peer.looked(now, QUICK) is None


def test_who_sleeps_is_asked_and_then_awake_for_a_while() -> None:
    peer = Attention()
    assert peer.looked(10.0, SLOW) == "has to be woken"
    assert peer.wants_asking(10.0)
    assert peer.looked(10.0, SLOW) is None, "said already"
    peer.asked(11.0)
    assert peer.looked(11.5, SLOW) is None, "it is only busy"
    assert not peer.wants_asking(11.0 + AWAKE_SECONDS / 2)
    assert peer.wants_asking(12.0 + AWAKE_SECONDS)
    assert not peer.wants_asking(10.0 + HELD_SECONDS), "tried again"


def test_who_is_far_away_is_always_asked() -> None:
    peer = Attention()
    assert peer.looked(10.0, FAR) == "has to be woken", "as far as one can tell yet"
    peer.asked(11.0)
    assert peer.looked(11.2, FAR) == "is far away"
    assert peer.wants_asking(11.3)
    assert peer.looked(11.4, FAR) is None, "said already"
    assert not peer.wants_asking(11.2 + HELD_SECONDS), "tried again"
