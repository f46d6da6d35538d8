"""Which LoRA adapters a worker has loaded, and what is in them."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import torch

from lmkv_ray.vllm.worker.checksum import checksums


class AdapterWatch:
    """Looks at vLLM's adapters before each step is carried out.

    Args:
        runner: vLLM's model runner, or None.
    """

    def __init__(self, runner: Any) -> None:
        manager = getattr(runner, "lora_manager", None)
        self._manager = getattr(manager, "_adapter_manager", None)
        self._loaded: dict[int, Any] = {}
        self._serial = 0
        self.table: dict[int, tuple[int, str]] = {}
        """Adapter to the number of its load, never used twice, and its digest."""

    def look(self) -> bool:
        """Whether other adapters are loaded than when this was last called."""
        if self._manager is None:
            return False
        loaded = dict(self._manager.list_adapters())
        if loaded.keys() == self._loaded.keys() and all(
            adapter is self._loaded[number] for number, adapter in loaded.items()
        ):
            return False
        for number in self._loaded.keys() - loaded.keys():
            del self.table[number]
        for number, adapter in loaded.items():
            if self._loaded.get(number) is not adapter:
                self._serial += 1
                self.table[number] = (self._serial, _digest(adapter))
        self._loaded = loaded
        return True


def _digest(adapter: Any) -> str:
    digest = blake2b(digest_size=16)
    with torch.no_grad():
        for name, layer in sorted(adapter.loras.items()):
            parts = (layer.lora_a, layer.lora_b, layer.scaling)
            digest.update(f"{name} {type(layer).__name__}\n".encode())
            for value in _values(parts):
                if isinstance(value, torch.Tensor):
                    digest.update(f"{value.dtype} {value.shape} {value.stride()}\n".encode())
                    digest.update(checksums(value).cpu().numpy().tobytes())
                else:
                    digest.update(f"{value!r}\n".encode())
    return digest.hexdigest()


def _values(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        yield len(value)
        for each in value:
            yield from _values(each)
    else:
        yield value
