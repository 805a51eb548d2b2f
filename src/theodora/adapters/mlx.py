"""Adapters in MLX's files: `adapter_config.json` and `adapters.safetensors`, as mlx-lm writes and reads them."""

from __future__ import annotations

from pathlib import Path

from torch import nn


def save_mlx(model: nn.Module, path: str | Path, name: str | None = None) -> None:
    """Save one adapter in MLX's files, whole or not at all."""
    raise NotImplementedError
