"""What merging did to weights, and what rounding added: collected tensor by tensor, told by kind of layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class KindReport:
    """What merging did to the layers of one kind, such as q_proj."""

    kind: str
    tensors: int
    change: float
    """Mean relative size of what the adapter changed, ‖W' − W‖ / ‖W‖ (Frobenius norms)."""
    rounding_mean: float
    """Mean relative rounding error of what was written, ‖written − W'‖ / ‖W'‖."""
    rounding_max: float
    """The largest of these among the layers."""
    rounding_max_abs: float
    """The largest rounding error of a single weight."""


class RoundedPart(NamedTuple):
    """Squares of norms of a tensor, or of the weights of one of several experts in it, and its largest error."""

    merged: float
    error: float
    start: float
    change: float
    max_abs: float

    @classmethod
    def of(cls, base: Tensor, merged: Tensor, written: Tensor) -> RoundedPart:
        """Of the weights before, after, and after rounding. Change and start are nan where their shapes differ."""
        error, start = written.to(merged.dtype) - merged, base.to(merged.dtype)
        known = base.shape == merged.shape
        sizes = [_squares(merged), _squares(error)]
        sizes += [_squares(start), _squares(merged - start)] if known else [math.nan, math.nan]
        return cls(*sizes, max_abs=float(error.abs().max()))


@dataclass
class Rounding:
    """Collects the numbers of a `KindReport`, tensor by tensor."""

    change: list[float] = field(default_factory=list[float])
    relative: list[float] = field(default_factory=list[float])
    max_abs: float = 0.0

    def add(self, parts: Sequence[RoundedPart]) -> None:
        """Note one tensor, of one part or of several."""
        merged, error, start, change = (math.fsum(values) for values in list(zip(*parts, strict=True))[:4])
        self.relative.append(math.sqrt(error / merged) if merged else 0.0)
        self.max_abs = max([self.max_abs, *(part.max_abs for part in parts)])
        if not math.isnan(start):
            self.change.append(math.sqrt(change / start) if start else 0.0)

    def report(self, kind: str) -> KindReport:
        """The report of one kind."""
        count = len(self.relative)
        change = math.fsum(self.change) / len(self.change) if self.change else math.nan
        return KindReport(kind, count, change, math.fsum(self.relative) / count, max(self.relative), self.max_abs)


def _squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2
