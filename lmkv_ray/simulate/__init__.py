"""What a cache of some size would have done for requests of the past."""

from lmkv_ray.simulate.belady import Belady
from lmkv_ray.simulate.costs import ConstantCosts, Costs, Rate
from lmkv_ray.simulate.replay import BELADY, Result, Setup, replay
from lmkv_ray.simulate.traces import Trace, TracedRequest, read_trace

__all__ = [
    "BELADY",
    "Belady",
    "ConstantCosts",
    "Costs",
    "Rate",
    "Result",
    "Setup",
    "Trace",
    "TracedRequest",
    "read_trace",
    "replay",
]
