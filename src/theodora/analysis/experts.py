"""How far an adapter has moved each expert of a fused weight: the measures of `movement` and `change`, one by one.

Shapes: E experts, O out features, I in features; `w_EOI` is (E, O, I).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from theodora.analysis.change import WeightChange, adapter_change
from theodora.analysis.movement import Movement, measure, update_norm
from theodora.files.adapter import AdapterTensors

BARELY = 0.01
"""Of what the median expert's weight changes: an expert that changes by less has barely moved."""


@dataclass(frozen=True)
class ExpertMovement:
    """One expert of one weight. What needs the base weight is None without it."""

    update: float
    """‖s·B·A‖, Frobenius norm."""
    magnitude: float | None
    """Mean over the rows of how much their length changed, relative, without sign."""
    angle: float | None
    """Mean over the rows of the angle between base and adapted row, in degrees."""


@dataclass(frozen=True)
class ExpertChange:
    """What happened to the weight of one expert; as `WeightChange` says."""

    relative_magnitude: float
    direction: float
    size: float


def measure_experts(
    w_EOI: Tensor | None, tensors: AdapterTensors
) -> tuple[Movement | None, tuple[ExpertMovement, ...]]:
    """The movement of all rows of all experts together, and of each expert; without a base weight the updates alone."""
    each = [tensors.of(expert) for expert in range(len(tensors.a))]
    updates = [update_norm(own) for own in each]
    if w_EOI is None:
        return None, tuple(ExpertMovement(update, None, None) for update in updates)
    moved = [measure(w_OI, own) for w_OI, own in zip(w_EOI, each, strict=True)]
    base = float(torch.linalg.vector_norm(w_EOI.float()))
    whole = Movement(
        torch.cat([found.magnitude for found in moved]),
        torch.cat([found.angle for found in moved]),
        _root_of_squares(updates) / base if base else math.nan,
        all(found.magnitude_rests for found in moved),
    )
    return whole, tuple(
        ExpertMovement(update, _mean(found.magnitude.abs()), _mean(found.angle))
        for update, found in zip(updates, moved, strict=True)
    )


def experts_change(
    w_EOI: Tensor, tensors: AdapterTensors, *, rank: bool
) -> tuple[WeightChange, tuple[ExpertChange, ...]]:
    """What happened to all experts together, and to each.

    The effective rank is the mean of the experts', of LoRA alone: DoRA's would take an eigendecomposition of each.
    """
    lora = tensors.magnitude is None
    found = [adapter_change(w_OI, tensors.of(expert), rank=rank and lora) for expert, w_OI in enumerate(w_EOI)]
    norms = [float(torch.linalg.vector_norm(w_OI.float())) for w_OI in w_EOI]
    lengths = [float(torch.linalg.vector_norm(w_OI.float(), dim=1).mean()) for w_OI in w_EOI]
    ranks = [change.effective_rank for change in found if change.effective_rank is not None]
    magnitude = math.fsum(change.magnitude for change in found) / len(found)
    turned = [change.direction for change in found if math.isfinite(change.direction)]
    changed = _root_of_squares(change.size * norm for change, norm in zip(found, norms, strict=True) if norm)
    whole = WeightChange(
        magnitude=magnitude,
        relative_magnitude=magnitude * len(lengths) / math.fsum(lengths) if any(lengths) else math.nan,
        direction=math.fsum(turned) / len(turned) if turned else math.nan,
        size=changed / _root_of_squares(norms) if any(norms) else math.nan,
        effective_rank=math.fsum(ranks) / len(ranks) if ranks else None,
    )
    return whole, tuple(ExpertChange(c.relative_magnitude, c.direction, c.size) for c in found)


def barely_moved(updates: Iterable[float]) -> list[int]:
    """The experts that change by less than a hundredth of what the median one does."""
    values = torch.tensor(list(updates), dtype=torch.float64)
    return (values <= BARELY * values.median()).nonzero().flatten().tolist() if len(values) else []


def _root_of_squares(values: Iterable[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values if math.isfinite(value)))


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None
