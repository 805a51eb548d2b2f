"""Recognises the base model that an adapter was trained on, by a few values of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from theodora.errors import CheckpointError
from theodora.files.adapter import AdapterFile


def probe_base(paths: list[str], sample: Callable[[str], list[float]]) -> dict[str, list[float]]:
    """A few values of a few base weights, by which another base model is recognised.

    Args:
        paths: the adapted modules.
        sample: gives `sample_weight` of a module's base weight.
    """
    chosen = sorted({paths[i * (len(paths) - 1) // 3] for i in range(4)}) if paths else []
    return {path: sample(path) for path in chosen}


def check_base(file: AdapterFile, sample: Callable[[str], list[float] | None]) -> float:
    """How far the base weights at hand are from those the adapter was trained on, relative (0: the same).

    Rounding to bfloat16 makes about 0.002, 4-bit quantisation about 0.1, another model more than 1.

    Args:
        file: the adapter.
        sample: gives `sample_weight` of a module's base weight, or None if there is none.

    Raises:
        CheckpointError: they are so far apart that this is another model.
    """
    if not file.probe:
        return 0.0
    square = difference = 0.0
    for path, expected in file.probe.items():
        found = sample(path) or []
        if len(found) != len(expected):
            raise CheckpointError(
                f"The adapter in {file.path} was trained on another base model: {path} has another shape there"
                f"{_trained_on(file)}."
            )
        square += sum(e * e for e in expected)
        difference += sum((f - e) ** 2 for f, e in zip(found, expected, strict=True))
    distance = math.sqrt(difference / square) if square else (math.inf if difference else 0.0)
    if distance > 0.5:
        raise CheckpointError(
            f"The adapter in {file.path} was trained on another base model{_trained_on(file)}: the weights here are "
            f"{distance:.0%} away from those it started from. Give the model it was trained on."
        )
    return distance


def _trained_on(file: AdapterFile) -> str:
    return f" ({file.base_model})" if file.base_model else ""


def sample_weight(w_OI: Tensor) -> list[float]:
    """Sixteen values from all over a weight."""
    rows, columns = w_OI.shape
    at = torch.arange(16, dtype=torch.int64)
    # Steps coprime to most sizes spread the sample over rows and columns.
    picked = w_OI.detach()[(at * 7919) % rows, (at * 104729) % columns]
    return [float(value) for value in picked.float().cpu()]
