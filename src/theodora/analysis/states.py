"""The checkpoints in the folder of a training run: adapters, or whole models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from theodora.errors import CheckpointError, shown
from theodora.files.base_model import find_base
from theodora.files.model_folder import INDEX, WEIGHTS
from theodora.files.names import CONFIG_NAME, MLX_WEIGHTS_NAME, WEIGHTS_NAME

# `theodora train` writes checkpoints into a folder of their own, transformers' trainers beside the result.
_PLACES = (".", "checkpoints")
FINAL = "final"


@dataclass(frozen=True)
class State:
    """One folder with the weights of a moment in training."""

    label: str
    """`checkpoint-60`, or `final` for what lies in the run's own folder."""
    step: int | None
    folder: Path
    is_adapter: bool


def find_states(path: str | Path) -> tuple[Path, list[State], list[str]]:
    """The folder of a run, its states in the order of training, and notes on checkpoints that hold no weights.

    Args:
        path: the output folder of a run, one checkpoint, an adapter, a model folder, or the hub name of one of these
            that lies in the local cache.

    Raises:
        CheckpointError: there is no such folder, or nothing in it that could be compared.
    """
    try:
        folder = find_base(str(path))
    except CheckpointError as error:
        raise CheckpointError(
            f"{shown(str(path))[1:-1]} is not here: expected the output folder of a run, an adapter or a model folder, "
            "or the name of one in the local hub cache."
        ) from error
    states: list[State] = []
    notes: list[str] = []
    for step, checkpoint in _numbered(folder):
        is_adapter = _is_adapter(checkpoint)
        if is_adapter is None:
            notes.append(f"{checkpoint.name} holds neither an adapter nor a model's safetensors: left out.")
        else:
            states.append(State(checkpoint.name, step, checkpoint, is_adapter))
    own = _is_adapter(folder)
    if own is not None:
        states.append(State(FINAL, None, folder, own))
    if not states:
        raise CheckpointError(
            f"{folder} holds nothing to compare: expected checkpoint-*/ folders, an adapter ({CONFIG_NAME} and "
            f"{WEIGHTS_NAME}) or a model (config.json and {WEIGHTS})."
        )
    return folder, states, notes


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """The folders checkpoint-N, by N."""
    numbered = [
        (int(match[1]), checkpoint)
        for place in _PLACES
        for checkpoint in (folder / place).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d{1,18})", checkpoint.name)) and checkpoint.is_dir()
    ]
    return sorted(numbered)


def _is_adapter(folder: Path) -> bool | None:
    """Whether a folder holds an adapter (True), a model (False), or neither (None)."""
    if (folder / CONFIG_NAME).is_file() and any((folder / name).is_file() for name in (WEIGHTS_NAME, MLX_WEIGHTS_NAME)):
        return True
    if (folder / "config.json").is_file() and any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        return False
    return None
