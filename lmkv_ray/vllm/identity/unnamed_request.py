"""Block hashes of a request without the name and the path of its LoRA adapter.

What is in the adapter is part of the chunk's key already (``adapters``). What it is called here,
and where it lies on this node, is not: so replicas share its KV whatever they call it. The hashes
are vLLM's, made by its own hasher of the same tokens, images and salts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.request import Request


class UnnamedRequest:
    """A request, as vLLM's hasher sees it, that has no adapter.

    Args:
        request: vLLM's.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self.lora_request = None
        self.block_hashes: list[bytes] = []
        self._theirs: bytes = b""
        """The last of the request's own hashes that ours were made for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)

    def hashes(self) -> list[bytes]:
        """Of as many blocks as vLLM has hashed; it takes some microseconds for each new one."""
        hasher: Any = self._request._block_hasher
        theirs, made = self._request.block_hashes, len(self.block_hashes)
        if made and (len(theirs) < made or theirs[made - 1] != self._theirs):
            self.block_hashes = []  # a streaming session has dropped a token
        if len(self.block_hashes) < len(theirs):
            self.block_hashes += hasher(self)
            del self.block_hashes[len(theirs) :]
            self._theirs = theirs[len(self.block_hashes) - 1]
        return self.block_hashes
