"""The fingerprint of a base model: a few values of its weights, by which an adapter's file recognises its base."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from theodora.errors import CheckpointError
from theodora.files.adapter import AdapterFile

SAME_BASE = 0.02
"""Rounding a base to bfloat16 moves its fingerprint by about 0.002; more than this deserves a word."""
OTHER_BASE = 0.5
"""4-bit quantisation moves it by about 0.1, another model by more than 1."""


def base_fingerprint(paths: list[str], of_module: Callable[[str], list[float]]) -> dict[str, list[float]]:
    """The fingerprints of at most four base weights, spread over the model.

    Args:
        paths: the adapted modules.
        of_module: gives `weight_fingerprint` of a module's base weight.

    Returns:
        Module path → values.
    """
    chosen = sorted({paths[i * (len(paths) - 1) // 3] for i in range(4)}) if paths else []
    return {path: of_module(path) for path in chosen}


def weight_fingerprint(w_OI: Tensor) -> list[float]:
    """Sixteen values from all over a weight."""
    return _values(w_OI.detach()[fingerprint_positions(w_OI.shape)])


def fingerprint_of_rows(shape: tuple[int, int], rows: Callable[[Tensor], Tensor]) -> list[float]:
    """`weight_fingerprint` of a weight (O, I) of which `rows` gives those at some indices, (N, I)."""
    at, columns = fingerprint_positions(shape)
    return _values(rows(at).detach()[torch.arange(len(at)), columns])


def fingerprint_positions(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows and columns of the values, (16,) each."""
    at = torch.arange(16, dtype=torch.int64)
    # Steps coprime to most sizes spread the values over rows and columns.
    return (at * 7919) % shape[0], (at * 104729) % shape[1]


def _values(picked: Tensor) -> list[float]:
    return [float(value) for value in picked.float().cpu()]


def check_fingerprint(file: AdapterFile, of_module: Callable[[str], list[float] | None]) -> float:
    """How far the base weights at hand are from those the adapter was trained on, relative (0: the same).

    Args:
        file: the adapter.
        of_module: gives `weight_fingerprint` of a module's base weight, or None if there is none.

    Raises:
        CheckpointError: they are so far apart that this is another model (`OTHER_BASE`).
    """
    if not file.fingerprint:
        return 0.0
    square = difference = 0.0
    for path, expected in file.fingerprint.items():
        here = of_module(path) or []
        if len(here) != len(expected):
            raise CheckpointError(
                f"The adapter in {file.path} was trained on another base model: {path} has another shape there"
                f"{_trained_on(file)}."
            )
        square += sum(e * e for e in expected)
        difference += sum((h - e) ** 2 for h, e in zip(here, expected, strict=True))
    distance = math.sqrt(difference / square) if square else (math.inf if difference else 0.0)
    if distance > OTHER_BASE:
        raise CheckpointError(
            f"The adapter in {file.path} was trained on another base model{_trained_on(file)}: the weights here are "
            f"{distance:.0%} away from those it started from. Give the model it was trained on."
        )
    return distance


def _trained_on(file: AdapterFile) -> str:
    return f" ({file.base_model})" if file.base_model else ""
