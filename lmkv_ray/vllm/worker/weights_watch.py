"""Which weights a worker has in memory, and whether it still has those it was loaded with.

Weights are changed while an engine runs in ways that no connector is told of: RL writes into them,
``reload_weights`` does, ``collective_rpc`` may. So they are looked at where they lie, at two costs:

* ``suspicious`` compares what costs microseconds: which parameters there are, torch's count of the
  writes to each, and some words of each (``param.data`` is written uncounted);
* ``check`` sums up all of them (``checksum``), when something is suspicious or the engine's prefix
  cache was emptied, as it must be when weights change: vLLM's own cache would be wrong else.

Equal sums are the same weights, whatever happened in between (a sleep, a reload of the same file).
Other sums name the new ones, so that replicas that were given the same weights share their KV. On
CPUs vLLM hides some weights in packed form (``cpu_linear``); these cannot be written to, only
replaced, and what replaces them is equal to nothing.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from lmkv_ray.vllm.worker.checksum import checksums, parts, words

if TYPE_CHECKING:
    import torch

SAMPLES = 32
"""Words of each tensor that are compared by ``suspicious``."""


class _Held(NamedTuple):
    """A parameter or buffer, or packed weights, as they were seen last."""

    where: dict[str, Any]
    name: str
    value: Any
    version: int | None
    """Torch's count of writes; None: it is not counted."""


class WeightsWatch:
    """See the module.

    Args:
        models: the worker's: the model, and a draft if there is one; none: they are not known, so
            that every check finds something new.
    """

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        self._models = models
        self._held: list[_Held] = []
        self._views: list[torch.Tensor] = []
        self._samples: torch.Tensor | None = None
        self._packed: dict[str, Any] = {}
        self._packed_token = ""
        self._loaded = self._sum_up()

    def suspicious(self, *, samples: bool) -> bool:
        """Whether the weights may be others than those of the last check.

        Args:
            samples: look into them as well; waits for what the device is doing.
        """
        import torch

        if any(
            (held.version is not None and held.value._version != held.version)
            or held.where.get(held.name) is not held.value
            for held in self._held
        ):
            return True
        if not samples or self._samples is None:
            return False
        return not torch.equal(torch.cat(self._views), self._samples)

    def check(self) -> str:
        """Which weights there are: "" for those of the beginning, else a name of them."""
        if not self._models:
            return uuid.uuid4().hex
        now = self._sum_up()
        return "" if now == self._loaded else now

    def _sum_up(self) -> str:
        import torch

        held, tensors, packed = [], [], {}
        digest = blake2b(digest_size=16)
        for path, where, name, value in self._weights():
            if isinstance(value, torch.Tensor):
                counted = not value.is_inference()
                held.append(_Held(where, name, value, value._version if counted else None))
                for part in parts(value):
                    digest.update(f"{path} {part.dtype} {part.shape} {part.stride()}\n".encode())
                    tensors.append(part)
            else:
                held.append(_Held(where, name, value, None))
                packed[path] = value
        self._views = [_some(words(tensor)) for tensor in tensors if tensor.numel()]
        with torch.no_grad():
            sums = [checksums(tensor) for tensor in tensors]
            self._samples = torch.cat(self._views) if self._views else None
            if sums:
                digest.update(torch.cat(sums).cpu().numpy().tobytes())
        if self._packed and packed.items() != self._packed.items():
            self._packed_token = uuid.uuid4().hex
        self._packed = packed
        digest.update(self._packed_token.encode())
        self._held = held
        return digest.hexdigest()

    def _weights(self) -> Iterator[tuple[str, dict[str, Any], str, Any]]:
        """Path, where it is held, under which name, and a parameter, lasting buffer or packing."""
        for number, model in enumerate(self._models):
            for module_name, module in model.named_modules():
                transient = module._non_persistent_buffers_set
                found = [
                    *((module._parameters, n, p) for n, p in module._parameters.items()),
                    *((module._buffers, n, b) for n, b in module._buffers.items()
                      if n not in transient),
                ]  # fmt: skip
                own = vars(module)
                if own.get("cpu_linear") is not None:
                    found.append((own, "cpu_linear", own["cpu_linear"]))
                for where, name, value in found:
                    if value is not None:
                        yield f"{number} {module_name}.{name}", where, name, value


def _some(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:: max(1, len(tensor) // SAMPLES)][:SAMPLES]


def models_of(runner: Any) -> list[torch.nn.Module]:
    """The model, and the draft if there is one, of a model runner; none of None."""
    if runner is None:
        return []
    drafters = [getattr(runner, name, None) for name in ("drafter", "speculator")]
    drafts = [getattr(drafter, "model", None) for drafter in drafters]
    return [runner.get_model(), *(draft for draft in drafts if draft is not None)]


def runner_of_caller() -> Any:
    """The model runner that is calling this, however indirectly, or None.

    A connector is handed no model, but its pages by the runner that has it.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        runner = frame.f_locals.get("self")
        if callable(getattr(runner, "get_model", None)):
            return runner
        frame = frame.f_back
    return None
