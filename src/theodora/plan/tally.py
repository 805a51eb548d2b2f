"""How much memory a pass holds: the storages that are alive, counted as operators make them and as they go.

Works on real tensors, and on those of the meta device, which have sizes and nothing else. What an operator of ours
takes for itself while it runs is not seen on the meta device; `SCRATCH` tells it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from theodora.kernels.cross_entropy import block_rows

_GRANULE = 512
"""Bytes to whose multiples CUDA's caching allocator rounds up."""


class Tally(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside the block, as long as they are alive.

    Attributes:
        live: bytes alive now.
        peak: the most there ever were.
    """

    def __init__(self, most: int | None = None) -> None:
        """Begin with nothing.

        Args:
            most: operators after which it is enough, with a RuntimeError (a scan over tokens, one by one, say).
        """
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()
        self._most, self._calls = most, 0

    def hold(self, *tensors: Tensor) -> None:
        """Count tensors that were there before (parameters)."""
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._calls += 1
        if self._most is not None and self._calls > self._most:
            raise RuntimeError(f"more than {self._most:,} operators")
        result = func(*args, **(kwargs or {}))
        scratch = SCRATCH.get(func._schema.name) if any(t.is_meta for t in args if isinstance(t, Tensor)) else None
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        if scratch is not None:
            self.peak = max(self.peak, self.live + scratch(*args))
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        if key in self._known or not (size := storage.nbytes()):
            return
        size = -(-size // _GRANULE) * _GRANULE
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _logits(hidden: Tensor, weight: Tensor, *_: Any) -> int:
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    padded = -(-vocabulary // 64) * 64
    return block_rows(tokens, vocabulary, hidden.element_size()) * padded * hidden.element_size() + 16 * tokens


SCRATCH: dict[str, Callable[..., int]] = {"theodora::linear_cross_entropy": _logits}
"""Bytes that an operator of ours takes while it runs and gives back, from its arguments."""
