"""What a run is made from, and whether a resumed one still has the same: rows, tokens, base weights, processes.

Each checkpoint holds it (`inputs.json`), hashes of what was read and where: a file that moved is the same, one that was
changed in place is not. Options that were changed on purpose are told beside (resumed.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer, TrainerCallback

from theodora.config import TrainConfig
from theodora.data import Examples
from theodora.errors import ConfigError, bullet_list
from theodora.files.model_folder import is_whole_model
from theodora.files.read_back import write_json

INPUTS_FILE = "inputs.json"
_ROWS_AT_ONCE = 1000
# Options that change which tokens rows become, and which values the base model has.
_TOKENS = (
    *("model", "revision", "from_adapter", "use_chat_template", "train_on", "max_length"),
    *("eval_data", "held_out", "replay", "replay_share", "seed"),
)
_TOKENS_OF_TRL = (
    "chat_template_path",
    "eos_token",
    "completion_only_loss",
    "assistant_only_loss",
    "dataset_text_field",
    "max_completion_length",
)
_BASE = ("model", "revision", "bf16", "quantize", "modules_to_save")
_BASE_OF_TRL = ("model_init_kwargs", "fp16")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run is made from."""

    sources: Mapping[str, tuple[str, str]]
    """Option (data, eval_data, replay, general) -> where it was read, and the hash of its rows."""
    tokens: str
    """Hash of all rows to train on, as tokens."""
    base: str
    """Hash of the base model's weights as they were loaded."""
    rewards: Mapping[str, str] = field(default_factory=dict[str, str])
    """Where a reward model was read -> the hash of its weights."""
    processes: int
    options: Mapping[str, Any]
    """Those that decide about the others."""

    @property
    def hashes(self) -> dict[str, str]:
        """All hashes, by what they are of."""
        rows = {name: sha256 for name, (_, sha256) in self.sources.items()}
        return {**rows, "tokens": self.tokens, "weights of the base": self.base, **self.rewards}


class KeepInputs(TrainerCallback):
    """Carries what a run is made from to where its checkpoints are written."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs


def write_inputs(trainer: Trainer, checkpoint: Path) -> None:
    """Write what a trainer's run is made from into a checkpoint that is being made."""
    inputs = next((c.inputs for c in trainer.callback_handler.callbacks if isinstance(c, KeepInputs)), None)
    if inputs is not None:
        values = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
        write_json(checkpoint / INPUTS_FILE, values)


def inputs_of(
    config: TrainConfig,
    sources: Mapping[str, Examples],
    rows: Dataset,
    base: str,
    processes: int,
    rewards: Mapping[str, str] | None = None,
) -> Inputs:
    """Take down what a run is made from; `rewards` are the hashes of reward models, by their folders."""
    options = config.to_options()
    return Inputs(
        sources={name: (_place(examples.source), examples.sha256) for name, examples in sources.items()},
        tokens=hash_of_tokens(rows),
        base=base,
        rewards={_place(name): weights for name, weights in (rewards or {}).items()},
        processes=processes,
        options=json.loads(json.dumps({name: options.get(name) for name in sorted({*_TOKENS, *_BASE})}, default=str)),
    )


def changes_since(checkpoint: Path, now: Inputs) -> list[str]:
    """What a run that goes on from a checkpoint has others of, and was told to; or what nobody knows.

    Raises:
        ConfigError: naming what has changed without having been asked for: a data file with other rows, a tokenizer or
            base or reward model with other values.
    """
    before = _read(checkpoint)
    if before is None:
        return [f"{checkpoint} does not say what it was trained on: whether the data have changed could not be checked"]
    changed, notes = _changed_sources(before, now)
    others = bool(changed or notes or now.sources.keys() != before.sources.keys())
    if before.tokens != now.tokens and not others:
        tokens = "the tokens of its rows"
        if asked := _differing(before, now, _TOKENS, _TOKENS_OF_TRL):
            notes.append(f"changed since the run began: {tokens}, as {', '.join(asked)} did")
        else:
            changed.append(f"{tokens} have changed, so the tokenizer or its chat template is another one")
    if before.base != now.base:
        base = f"the weights of the base model {now.options['model']}"
        if asked := _differing(before, now, _BASE, _BASE_OF_TRL):
            notes.append(f"changed since the run began: {base}, as {', '.join(asked)} did")
        else:
            changed.append(f"{base} have changed")
    changed += [
        f"the weights of the reward model {place} have changed"
        for place, weights in now.rewards.items()
        if before.rewards.get(place, weights) != weights
    ]
    if changed:
        raise ConfigError(
            f"{checkpoint} was trained on something else than there is now:{bullet_list(changed)}\n"
            "To go on from it, put back what was there. To train on what there is now, begin anew with --overwrite, or "
            f"in another output folder with {begin_with(checkpoint)}, which keeps what was learned."
        )
    if before.processes != now.processes:
        notes.append(
            f"changed since the run began: processes from {before.processes} to {now.processes}. Steps are of the same "
            "rows; what is drawn at random, as dropout, differs, and sums are rounded otherwise"
        )
    return notes


def begin_with(checkpoint: Path) -> str:
    """The flag by which another run begins with what a checkpoint holds: an adapter, or a whole model."""
    return f"--{'model' if is_whole_model(checkpoint) else 'from-adapter'} {checkpoint}"


def random_state_file(process: int) -> str:
    """The name of the file of a checkpoint with the random state of one of the processes that trained it."""
    return f"rng_state_{process}.pth" if process else "rng_state.pth"


def missing_random_state(checkpoint: Path, process: int) -> list[str]:
    """A note if a checkpoint lacks the random state of this process; the trainer would go on without a word."""
    name = random_state_file(process)
    if (checkpoint / name).is_file():
        return []
    return [f"{checkpoint} has no {name}: what is drawn at random, as dropout, is drawn anew from here on"]


def _changed_sources(before: Inputs, now: Inputs) -> tuple[list[str], list[str]]:
    changed: list[str] = []
    notes: list[str] = []
    for name, (place, rows) in now.sources.items():
        place_before, rows_before = before.sources.get(name, (place, rows))
        # Earlier versions wrote down where a link led. One that leads elsewhere now is no other option.
        if rows != rows_before and place_before in (place, str(Path(place).resolve())):
            changed.append(f"{name}: the rows of {place} have changed")
        elif rows != rows_before:
            notes.append(f"changed since the run began: the rows of {name}, which are those of {place} now")
    return changed, notes


def _differing(before: Inputs, now: Inputs, names: tuple[str, ...], of_trl: tuple[str, ...]) -> list[str]:
    """Which options have changed that explain another value: any other one of TRL's, a rate of decay, does not."""
    then, here = (dict(inputs.options.get("trainer") or {}) for inputs in (before, now))
    own = [name for name in names if before.options.get(name) != now.options.get(name)]
    return own + [name for name in of_trl if then.get(name) != here.get(name)]


def _read(checkpoint: Path) -> Inputs | None:
    """What a checkpoint says; None for one that says nothing, as those of earlier versions."""
    try:
        values = json.loads((checkpoint / INPUTS_FILE).read_text(encoding="utf-8"))
        sources = {str(name): (str(place), str(rows)) for name, (place, rows) in values["sources"].items()}
        tokens, base, options = str(values["tokens"]), str(values["base"]), dict(values["options"])
        rewards, processes = dict(values.get("rewards") or {}), int(values["processes"])  # (earlier versions: none)
        return Inputs(sources=sources, tokens=tokens, base=base, rewards=rewards, processes=processes, options=options)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _place(source: str) -> str:
    """Where rows were read: a path from the root, links as they were given; or a name on the hub."""
    path = Path(source).expanduser()
    return os.path.abspath(path) if path.exists() else source


def hash_of_tokens(rows: Dataset) -> str:
    """The hash of the tokens to read and to learn of all rows, in their order."""
    hashed = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(_ROWS_AT_ONCE):
        for name in ("input_ids", "labels"):
            column: Any = batch[name].combine_chunks()  # pyright: ignore[reportArgumentType, reportCallIssue]
            for part in (column.value_lengths(), column.flatten()):
                hashed.update(part.to_numpy(zero_copy_only=False).tobytes())
    return hashed.hexdigest()
