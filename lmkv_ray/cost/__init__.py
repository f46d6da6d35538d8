"""What loading and recomputing cost, learnt from what they did cost."""

from lmkv_ray.cost.choice import Choice, choose
from lmkv_ray.cost.fit import LinearFit
from lmkv_ray.cost.prefill import PrefillModel
from lmkv_ray.cost.sources import SourceModel, SourceModels

__all__ = ["Choice", "LinearFit", "PrefillModel", "SourceModel", "SourceModels", "choose"]
