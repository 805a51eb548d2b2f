"""Is a checkpoint whole, and as it was written?

A checkpoint lists its files with a hash of each, last of all (`theodora_files.json`): what is missing, damaged, or of
another checkpoint does not fit it. Those of versions that wrote no list are checked as far as they tell themselves:
torch's archives hold checksums, safetensors its sizes.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerState

from theodora.adapters.state import find_state
from theodora.files.atomic import atomic_write, flush
from theodora.files.model_folder import INDEX, is_whole_model
from theodora.files.ours import CHECKPOINT, MARK, changes, mark_written
from theodora.files.read_back import TOKENIZER_NAME, check_model, check_tokenizer, unlike
from theodora.train.inputs import INPUTS_FILE

_STATE, _DIVERGED = "trainer_state.json", "diverged.json"
# The state file is listed last because the trainer writes it last.
_PARTS = ("optimizer.pt", "scheduler.pt", _STATE)
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_MODEL = ("config.json", "model.safetensors")  # of a run that trains all weights; of large ones the index alone
_ARCHIVES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "scaler.pt", "training_args.bin")


def faults(checkpoint: Path) -> list[str]:
    """What keeps a checkpoint from being resumed: each file with what is wrong with it. Empty for a whole one."""
    return list(_faults(checkpoint, _stamp(checkpoint)))


def list_in_place(trainer: Trainer, inner: Path) -> None:
    """Move a checkpoint's files into the folder above, in which it is prepared, and list them there."""
    read_back(trainer, inner)
    for file in inner.iterdir():
        file.rename(inner.parent / file.name)
    inner.rmdir()
    mark_written(inner.parent, CHECKPOINT)


def read_back(trainer: Trainer, checkpoint: Path) -> None:
    """Look at what was just written, before its list vouches for it. (An adapter was compared when it was saved.)

    Raises:
        CheckpointError: a file is not what was written.
    """
    for path in checkpoint.rglob("*"):
        if path.is_file():
            flush(path)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if find_state(model) is None:
        check_model(checkpoint, model.state_dict())
    tokenizer = trainer.processing_class
    has_tokenizer = tokenizer is not None and (checkpoint / "tokenizer_config.json").is_file()
    if has_tokenizer:
        check_tokenizer(tokenizer, checkpoint)
    native = has_tokenizer and getattr(tokenizer, "backend_tokenizer", None) is not None
    found = _unreadable(checkpoint, {TOKENIZER_NAME} if native else set())
    if found:
        raise unlike(checkpoint / found[0].split()[0], found[0])
    state = TrainerState.load_from_json(str(checkpoint / _STATE))
    if state.global_step != trainer.state.global_step or len(state.log_history) != len(trainer.state.log_history):
        raise unlike(checkpoint / _STATE, f"it says step {state.global_step}")


def note_divergence(checkpoint: Path, reason: str) -> None:
    """Write into a checkpoint, if it is there, how the step after it failed: `--resume auto` passes it over then."""
    if checkpoint.is_dir():
        with atomic_write(checkpoint / _DIVERGED) as file:
            file.write_text(json.dumps({"next_step": reason}) + "\n", encoding="utf-8")


def is_listed(checkpoint: Path) -> bool:
    """Whether the checkpoint says how it was written."""
    return (checkpoint / MARK).is_file()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint.

    Raises:
        ValueError: it is none.
    """
    try:
        state: Any = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(state, dict):
        raise ValueError(f"it holds {_kind(state)}; expected a trainer's state")
    step = state.get("global_step")
    if type(step) is not int or step < 1:
        raise ValueError(f"its global_step is {json.dumps(step)}; expected a step, 1 or more")
    numbers = ("max_steps", "eval_steps", "save_steps", "epoch", "num_input_tokens_seen")
    odd = [name for name in numbers if not isinstance(state.get(name), int | float | None)]
    history = state.get("log_history", [])
    if not isinstance(history, list) or not all(isinstance(line, dict) for line in history):
        odd.append("log_history")
    if odd:
        raise ValueError(f"its {odd[0]} is {_kind(state[odd[0]])}, which a trainer's never is")
    return state


def tokens_at(checkpoint: Path) -> int:
    """The tokens that a run had learned from at a checkpoint."""
    history = read_state(checkpoint).get("log_history", [])
    return int(next((line["num_tokens"] for line in reversed(history) if "num_tokens" in line), 0))


def _stamp(checkpoint: Path) -> tuple[tuple[str, int, int], ...]:
    """What changes when a file does, so that no hash is computed twice."""
    found: list[tuple[str, int, int]] = []
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            stat = path.stat()
            found.append((str(path), stat.st_mtime_ns, stat.st_size))
    return tuple(found)


@lru_cache(maxsize=64)
def _faults(checkpoint: Path, stamp: tuple[tuple[str, int, int], ...]) -> tuple[str, ...]:
    del stamp
    missing = [
        f"{name} is missing" for name in (*_weights_of(checkpoint), *_PARTS) if not (checkpoint / name).is_file()
    ]
    if missing:
        return tuple(missing)
    found = changes(checkpoint) or []  # without a list the adapter tells of itself
    if not is_listed(checkpoint):
        found += _unreadable(checkpoint)
        if (checkpoint / INPUTS_FILE).is_file():  # which versions that write no list do not write
            found.append(f"{MARK}, the list of its files, is missing")
    if (checkpoint / _DIVERGED).is_file():
        found.append(f"the run diverged on its weights, as {_DIVERGED} says (delete that file to go on from it anyway)")
    if not any(fault.startswith(_STATE) for fault in found):
        found += _state_faults(checkpoint)
    return tuple(found)


def _weights_of(checkpoint: Path) -> tuple[str, ...]:
    """The files of what was trained: an adapter, or a whole model."""
    if not is_whole_model(checkpoint):
        return _ADAPTER
    return (_MODEL[0], INDEX) if (checkpoint / INDEX).is_file() else _MODEL


def _state_faults(checkpoint: Path) -> list[str]:
    try:
        step = read_state(checkpoint)["global_step"]
    except (OSError, ValueError) as error:
        return [f"{_STATE} cannot be used: {error}"]
    numbered = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    if numbered and int(numbered[1]) != step:
        return [f"{_STATE} is of another checkpoint: its global_step is {step}, and the folder's {numbered[1]}"]
    return []


def _unreadable(checkpoint: Path, known: Collection[str] = ()) -> list[str]:
    """Files that show their damage by themselves; `known` ones were compared with what they are to hold."""
    archives = sorted({path for pattern in _ARCHIVES for path in checkpoint.glob(pattern)})
    found = [f"{path.name} is damaged: {why}" for path in archives if (why := _archive_fault(path))]
    for path in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            found.append(f"{path.name} is damaged: {error}")
    for path in sorted(checkpoint.glob("*.json")):
        if path.name in known:
            continue
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            found.append(f"{path.name} is damaged: {error}")
    return found


def _archive_fault(path: Path) -> str | None:
    """Why a file of torch's is no whole archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        return str(error) or type(error).__name__
    return None if bad is None else f"{bad} does not fit its checksum"


def _kind(value: Any) -> str:
    return {dict: "a mapping", list: "a list", str: "a text", type(None): "null", bool: "true or false"}.get(
        type(value), "a number"
    )
