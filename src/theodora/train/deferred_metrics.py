"""Scalars on their way from the device, which works on meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class DeferredMetrics:
    """Lists of numbers by name, some of them tensors on a device: copied together, and read when they are there."""

    def __init__(self, metrics: Mapping[str, Sequence[Tensor | float]]) -> None:
        self._metrics = {name: list(values) for name, values in metrics.items()}
        tensors = [v.detach() for values in metrics.values() for v in values if isinstance(v, Tensor)]
        self._copied: Tensor | None = None
        self._event: Any = None
        if tensors:
            # Numbers of tokens are too large for float32, and not every device has float64.
            wide = torch.float32 if tensors[0].device.type == "mps" else torch.float64
            self._copied = torch.stack([t.to(tensors[0].device, wide) for t in tensors]).to("cpu", non_blocking=True)
            if tensors[0].is_cuda:
                self._event = torch.cuda.Event()
                self._event.record()

    def ready(self) -> bool:
        """Whether reading them would not wait."""
        return self._event is None or self._event.query()

    def read(self) -> dict[str, list[float]]:
        """The numbers; waits for them if it must."""
        if self._event is not None:
            self._event.synchronize()
        fetched = iter([] if self._copied is None else self._copied.tolist())
        return {
            name: [next(fetched) if isinstance(value, Tensor) else value for value in values]
            for name, values in self._metrics.items()
        }
