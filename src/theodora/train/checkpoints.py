"""The output folder: may a run begin in it, and from which checkpoint does one go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from theodora.adapters.atomic import partial_name
from theodora.errors import CheckpointError, ConfigError

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
FIGURE_FILE = "loss.png"
CARD_FILE = "README.md"
HELD_OUT_FILE = "held_out.jsonl"
RUN_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    CARD_FILE,
    METRICS_FILE,
    FIGURE_FILE,
    CONFIG_FILE,
    HELD_OUT_FILE,
    CHECKPOINTS,
)
# The state file is listed last because the trainer writes it last.
_PARTS = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def check_output(output: Path, *, overwrite: bool, resume: bool) -> None:
    """Check that a run may write into `output`, before anything is loaded. Nothing is deleted yet.

    Raises:
        ConfigError: the folder already holds a run, and it is neither to be overwritten nor resumed.
        CheckpointError: the place cannot be written.
    """
    # A link that points nowhere is there, too: written to, it would make a file elsewhere.
    found = [name for name in RUN_FILES if os.path.lexists(output / name)]
    if found and not overwrite and not resume:
        raise ConfigError(
            f"{output} already holds a run ({', '.join(found)}). Choose another output folder, or say "
            "--resume to go on from its newest checkpoint, or --overwrite to delete it."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error.strerror}.") from error


def clear_run(output: Path) -> None:
    """Delete the run that `output` holds; other files stay."""
    for name in RUN_FILES:
        path = output / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def clear_partial(checkpoints: Path) -> None:
    """Delete what a killed process left half-written."""
    prefix = partial_name(checkpoints / "checkpoint")
    for leftover in checkpoints.glob(f"{prefix.removesuffix('.partial-')}-*.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def find_checkpoint(resume: str, output: Path) -> Path:
    """The checkpoint to go on from: the newest whole one for `auto`, else the folder that `resume` names.

    Raises:
        ConfigError: there is none.
        CheckpointError: the folder is no whole checkpoint.
    """
    if resume == "auto":
        newest = newest_checkpoint(output)
        if newest is None:
            raise ConfigError(
                f"There is no whole checkpoint in {output / CHECKPOINTS} to resume from. Start anew"
                + (
                    " with --overwrite."
                    if any((output / name).exists() for name in RUN_FILES)
                    else " without --resume."
                )
            )
        return newest
    folder = Path(resume)
    missing = missing_parts(folder)
    if missing:
        raise CheckpointError(f"{folder} is no whole checkpoint: {', '.join(missing)} missing or damaged.")
    return folder


def newest_checkpoint(output: Path) -> Path | None:
    """The whole checkpoint of the highest step in a run's folder, if there is one."""
    numbered = [
        (int(match[1]), folder)
        for folder in (output / CHECKPOINTS).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and not missing_parts(folder)
    ]
    return max(numbered)[1] if numbered else None


def missing_parts(checkpoint: Path) -> list[str]:
    """Files that a checkpoint lacks, or whose trainer state cannot be read."""
    missing = [name for name in _PARTS if not (checkpoint / name).is_file()]
    if not missing:
        try:
            steps_done(checkpoint)
        except (ValueError, KeyError):
            missing.append("trainer_state.json")
    return missing


def steps_done(checkpoint: Path) -> int:
    """The optimizer step at which a checkpoint was written."""
    return int(read_state(checkpoint)["global_step"])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def check_space(output: Path, trainable_bytes: int, checkpoints: int) -> None:
    """Check that the checkpoints of a run will fit.

    Args:
        output: the run's folder.
        trainable_bytes: size of the trained tensors.
        checkpoints: how many are kept; one more exists while it is written.

    Raises:
        CheckpointError: saying how much is needed and free.
    """
    # Adam keeps two more tensors of each; 32 MB are for the tokenizer, metrics and figures.
    needed = trainable_bytes * 3 * (checkpoints + 1) + trainable_bytes + 32 * 2**20
    free = shutil.disk_usage(output).free
    if free < needed:
        raise CheckpointError(
            f"The disk of {output} has {free / 2**20:,.0f} MB free; this run needs about {needed / 2**20:,.0f} MB. "
            "Free some space, choose another output folder, or lower save_total_limit."
        )
