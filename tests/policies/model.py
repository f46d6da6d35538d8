"""Every core and every wrapper there is, by name."""

from __future__ import annotations

from collections.abc import Callable

from lmkv_ray.policies import (
    ARC,
    POLICIES,
    S3FIFO,
    Clock,
    Expiry,
    Pins,
    Policy,
    Prefix,
    Quota,
)

CORES: dict[str, Callable[[Clock], Policy]] = {
    **POLICIES,
    "arc of 5": lambda _: ARC(5),
    "s3fifo of 5": lambda _: S3FIFO(5),
}
WRAPPERS: dict[str, Callable[[Policy, Clock], Policy]] = {
    "": lambda core, _: core,
    "prefix ": lambda core, _: Prefix(core),
    "expiry ": Expiry,
    "quota ": lambda core, _: Quota(core, 0.3),
    "pins ": lambda core, _: Pins(core),
    "all ": lambda core, clock: Pins(Expiry(Prefix(Quota(core, 0.3)), clock)),
}
