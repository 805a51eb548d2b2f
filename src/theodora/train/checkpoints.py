"""The output folder: may a run begin in it, and from which checkpoint does one go on."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from theodora.errors import CheckpointError, ConfigError, bullet_list
from theodora.files.atomic import atomic_write, clear_leftovers, remove_folder
from theodora.files.read_back import write_text
from theodora.files.run_files import (
    CARD_FILE,
    CHECKPOINTS,
    CONFIG_FILE,
    FULL_LINE,
    MODEL_FILES,
    RECORD_HEAD,
    RUN_FILES,
)
from theodora.train.wholeness import faults, is_listed, read_state

_BEGUN = f"{RECORD_HEAD} It has only begun.\n"
"""What it says before anything else of a run is written."""
_DOOMED = f"{RECORD_HEAD} It is being deleted, for another run to begin here.\n"
"""What it says from the moment at which a run is given up until the next one has its own."""
_RESULTS = ("adapter_config.json", "adapter_model.safetensors", *MODEL_FILES, CARD_FILE)


def check_output(output: Path, *, overwrite: bool, resume: bool | str | None, trains_all: bool = False) -> None:
    """Check that a run may write into `output`, before anything is loaded. Nothing is deleted yet.

    Args:
        output: the folder.
        overwrite: whether a run that stands there may be deleted.
        resume: as in `TrainConfig`.
        trains_all: whether the result will be a whole model.

    Raises:
        ConfigError: the folder already holds a run, and it is neither to be overwritten nor resumed; or it holds files
            that have the names of a run's and are none.
        CheckpointError: the place cannot be written.
    """
    for above in output.resolve().parents:
        if above.name == CHECKPOINTS and _is_run(above.parent):
            raise ConfigError(
                f"{output} lies among the checkpoints of the run {above.parent}, which deletes them one by one. Choose "
                "another output folder."
            )
    begins = resume is None or (resume == "auto" and not newest_checkpoint(output))
    begun, doomed = _record_is(output, _BEGUN), is_doomed(output)
    written = (*RUN_FILES, *MODEL_FILES) if trains_all else RUN_FILES
    theirs = [name for name in written if begins and os.path.lexists(output / name) and not _is_empty(output / name)]
    theirs = [name for name in theirs if not (begun and name == CONFIG_FILE)]
    if theirs and (begun or not _is_run(output)):
        raise ConfigError(
            f"{output} holds {', '.join(theirs)}, but no run of theodora ({CONFIG_FILE} would say so), and none of "
            "that is written over. Choose another output folder, or move these files away."
        )
    # What a run that died before it had weights to show leaves is nothing to lose.
    has_result = any(os.path.lexists(output / name) for name in ("adapter_model.safetensors", MODEL_FILES[1]))
    loses_result = has_result and resume == "auto" and not newest_checkpoint(output)
    names = written if resume is None else _RESULTS if loses_result else ()
    # A link that points nowhere is there, too: written to, it would make a file elsewhere.
    there = [name for name in names if os.path.lexists(output / name)]
    if there and not (overwrite or begun or doomed):
        raise ConfigError(
            f"{output} already holds a run ({', '.join(there)}). Choose another output folder, or say "
            + ("" if resume else "--resume to go on from its newest checkpoint, or ")
            + "--overwrite to delete it."
            + "".join(f"\n{note}" for note in (passed_over(output, None) if resume == "auto" else []))
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as scratch:
            scratch.write(b"\0" * 4096)
            scratch.flush()
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error.strerror}.") from error


def check_inputs(output: Path, inputs: Mapping[str, str | None], overwrite: bool) -> None:
    """Check that a run does not write over, or delete, what it reads.

    Args:
        output: the folder.
        inputs: what is read, by the name of its option; what is no file or folder here is left alone.
        overwrite: whether a run that stands there is deleted first.

    Raises:
        ConfigError: it would.
    """
    for name, given in inputs.items():
        path = Path(given).expanduser().resolve() if given else None
        if path is None or not path.exists():
            continue
        if name == "model" and path == output.resolve():
            raise ConfigError(f"The output folder {output} is the model's own; choose another one.")
        written = [file for file in RUN_FILES if path.is_relative_to((output / file).resolve())]
        if name.startswith(("from_adapter", "reward")) and overwrite and path == output.resolve():
            raise ConfigError(f"{name} is {given}, the run that overwrite would delete; choose another output.")
        if written and (overwrite or name == "data"):
            raise ConfigError(
                f"{name} is {given}, which this run would write over ({written[0]} in its output folder {output}). "
                "Choose another output folder, or move the file."
            )


def _is_run(output: Path) -> bool:
    return _record_is(output, RECORD_HEAD)


def _trained_all(output: Path) -> bool:
    """Whether the run in `output` says that it trained a whole model, which is then its own to delete."""
    try:
        return FULL_LINE in (output / CONFIG_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False


def is_doomed(output: Path) -> bool:
    """Whether a process was killed while it deleted the run in `output`, of which nothing is to go on then."""
    return _record_is(output, _DOOMED)


def _record_is(output: Path, head: str) -> bool:
    try:
        with (output / CONFIG_FILE).open(encoding="utf-8") as file:
            return file.read(len(head)) == head
    except (OSError, UnicodeDecodeError):
        return False


@contextmanager
def marked(output: Path) -> Iterator[None]:
    """Say that a run begins in `output`, before anything else of it is written; unsay it if it comes to nothing."""
    if not _is_run(output):
        write_record(output, _BEGUN)
    try:
        yield
    finally:
        if _record_is(output, _BEGUN):
            (output / CONFIG_FILE).unlink(missing_ok=True)


def write_record(output: Path, text: str) -> None:
    """Write a run's `config.yaml`, which begins with `RECORD_HEAD`."""
    with atomic_write(output / CONFIG_FILE) as file:
        write_text(file, text)


def _is_empty(path: Path) -> bool:
    """Whether it is a folder with nothing in it but what a killed process left half-written: nobody's."""
    folder = path.is_dir() and not path.is_symlink()
    return folder and all(re.match(r"\..+\.(partial|begun)-", entry.name) for entry in path.iterdir())


def clear_run(output: Path) -> None:
    """Delete the run that `output` holds, but for its record, which says so; other files stay."""
    # First, and at one moment: nobody may go on from a run that is to be forgotten, or take the rest for foreign files.
    holds_model = _trained_all(output)
    write_record(output, _DOOMED + (f"{FULL_LINE}\n" if holds_model else ""))
    remove_folder(output / CHECKPOINTS)
    shards = [path.name for path in output.glob("model-*-of-*.safetensors")] if holds_model else []
    for name in (*RUN_FILES, *(MODEL_FILES if holds_model else ()), *shards):
        path = output / name
        if name == CONFIG_FILE:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def clear_partial(output: Path) -> None:
    """Delete what a killed process left half-written."""
    for folder in (output, output / CHECKPOINTS):
        clear_leftovers(folder)


def find_checkpoint(resume: bool | str, output: Path) -> Path | None:
    """The checkpoint to go on from: the newest whole one for true and `auto`, else the folder that `resume` names.

    Returns:
        None for `auto` if there is none.

    Raises:
        ConfigError: there is none.
        CheckpointError: the folder is no whole checkpoint, or is not as it was written.
    """
    if isinstance(resume, str) and resume != "auto":
        folder = Path(resume)
        wrong = faults(folder)
        if wrong:
            raise CheckpointError(_refusal(folder, wrong))
        return folder
    newest = newest_checkpoint(output)
    if newest is None and resume != "auto":
        raise ConfigError(
            f"There is no whole checkpoint in {output / CHECKPOINTS} to resume from. Start anew"
            + (" with --overwrite" if any((output / name).exists() for name in RUN_FILES) else " without --resume")
            + ", or say --resume auto, which goes on if it can and starts if it must."
            + "".join(f"\n{note}" for note in passed_over(output, None))
        )
    return newest


def passed_over(output: Path, checkpoint: Path | None) -> list[str]:
    """What to say of the checkpoint that a run goes on from: which newer ones are damaged, and what nobody knows.

    Args:
        output: the run's folder.
        checkpoint: the one taken; None if there is none.
    """
    numbered = sorted(numbered_checkpoints(output / CHECKPOINTS), reverse=True)
    taken = next((step for step, folder in numbered if folder == checkpoint), -1)
    newer = [one for one in numbered if one[0] > taken] if checkpoint is None or taken >= 0 else []
    notes = [f"passed over {folder}: {'; '.join(why)}" for _, folder in newer if (why := faults(folder))]
    if checkpoint is not None and not is_listed(checkpoint):
        notes.append(
            f"{checkpoint} has no list of its files, as earlier versions wrote them: that it can be read was checked, "
            "that it is as it was written could not be"
        )
    return notes


def _refusal(folder: Path, wrong: list[str]) -> str:
    if not folder.is_dir():
        return f"There is no folder {folder}, of which --resume was to go on."
    earlier = newest_checkpoint(folder.parent.parent) if folder.parent.name == CHECKPOINTS else None
    mend = (
        f"Go on from the newest whole one, {earlier}, which --resume auto takes by itself"
        if earlier is not None
        else "Bring the folder back as it was written, or start anew"
    )
    return f"{folder} is no whole checkpoint as it was written:{bullet_list(wrong)}\n{mend}."


def rotate(checkpoints: Path, step: int, limit: int | None, best: str | None) -> None:
    """Delete checkpoints beyond `limit`, each as a whole: the newest and the best stay.

    Those of later steps go as well: they belong to a run that this one has left by resuming from before them.

    Args:
        checkpoints: the folder of all.
        step: of the newest, just written.
        limit: how many to keep; None for all.
        best: the folder of the best one.
    """
    numbered = sorted(numbered_checkpoints(checkpoints))
    for later, folder in numbered:
        if later > step:
            remove_folder(folder)
    earlier = [folder for earlier, folder in numbered if earlier < step and str(folder) != best]
    staying = 1 + any(str(folder) == best and number < step for number, folder in numbered)
    for folder in earlier[: len(earlier) + staying - limit] if limit else []:
        remove_folder(folder)


def numbered_checkpoints(checkpoints: Path) -> list[tuple[int, Path]]:
    """Step and folder of everything that is called a checkpoint."""
    return [
        (int(match[1]), folder)
        for folder in checkpoints.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name))
    ]


def newest_checkpoint(output: Path) -> Path | None:
    """The whole checkpoint of the highest step in a run's folder, if there is one."""
    numbered = [] if is_doomed(output) else sorted(numbered_checkpoints(output / CHECKPOINTS), reverse=True)
    return next((folder for _, folder in numbered if not faults(folder)), None)


def steps_done(checkpoint: Path) -> int:
    """The optimizer step at which a checkpoint was written."""
    return int(read_state(checkpoint)["global_step"])


def owes_evaluation(checkpoint: Path) -> bool:
    """Whether a run was stopped before an evaluation that was due at the checkpoint's step."""
    state = read_state(checkpoint)
    step, every = int(state["global_step"]), state.get("eval_steps") or 0
    due = step >= int(state.get("max_steps") or step + 1) or (every >= 1 and step % every == 0)
    return due and not any(line.get("step") == step and "eval_loss" in line for line in state.get("log_history", []))


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
