"""A run that goes on with other options than it began with: each is really used from then on, or refused.

A checkpoint brings back more than the adapter: the optimizer with its learning rate, decay and betas, the schedule, how
often to log, evaluate and save, the patience of early stopping, and a place in the data, which is counted in steps. So
what a checkpoint brings along is set again from the options (`AsAsked`, `UseOptions`), and an option is refused where
that cannot be: what makes the adapter itself, the rows or their order, or the optimizer's state another one. The
options stand in each checkpoint beside those that held before it, which the record of the run tells.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer.sft_config import SFTConfig

from theodora.config import AdapterConfig, TrainConfig
from theodora.errors import ConfigError, bullet_list, shown
from theodora.files.run_files import CONFIG_FILE
from theodora.parse import parse_yaml
from theodora.train.checkpoints import steps_done
from theodora.train.grpo_loss import PolicySettings
from theodora.train.inputs import begin_with

OPTIONS_FILE = "options.json"
"""In a checkpoint: the options it was trained with."""

_ADAPTER = frozenset(f.name for f in fields(AdapterConfig)) - {"dropout", "adapter_dtype"}
_ROWS = frozenset({
    "seed", "held_out", "replay", "replay_share", "train_on", "use_chat_template", "resize_embeddings", "max_length",
    "packing",
    # SFTConfig's
    "data_seed", "train_sampling_strategy", "group_by_length", "length_column_name", "shuffle_dataset",
    "dataloader_drop_last", "packing_strategy", "truncation_mode", "chat_template_path", "eos_token",
    "accelerator_config",
    # PolicySettings'
    "num_generations", "max_completion_length", "num_iterations",
})  # fmt: skip
_OPTIMIZER = frozenset({"optim", "optim_args", "optim_target_modules"})
_COURSE = frozenset({"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"})
_BEST = frozenset({"eval_data", "metric_for_best_model", "greater_is_better", "reward", "reward_weights"})
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
REFUSED = _ADAPTER | _ROWS | _OPTIMIZER | {"from_adapter", "objective", "reference", "general"}
"""Options that must be as they were; `_COURSE`, `_BEST` and `_BATCH` must under conditions. All others are used."""

_OF_STATE = ("reduce_lr_on_plateau", "greedy")  # schedules whose course is a state of their own, not a formula
_SAME_OPTIMIZER = ("adamw_torch", "adamw_torch_fused")
_UNSAID = ("resume", "overwrite")


@dataclass(frozen=True)
class Past:
    """What a checkpoint tells of the options it was trained with."""

    options: dict[str, Any] | None = None
    """Option -> value, TRL's among them, with every choice made; None where nothing tells."""
    given: dict[str, Any] = field(default_factory=dict[str, Any])
    """The same as they were given, before choices were made."""
    processes: int = 1
    before: tuple[dict[str, Any], ...] = ()
    """Earlier changes: `until` which step which `options` had other values."""
    note: str | None = None
    """Why nothing tells."""


def past_of(checkpoint: Path) -> Past:
    """Read what a checkpoint, or in older ones the run around it, tells of its options."""
    own, run = checkpoint / OPTIONS_FILE, checkpoint.parent.parent / CONFIG_FILE
    record = own if own.is_file() else run
    if not record.is_file():
        return Past(note=f"nothing beside {checkpoint} says with which options it was trained")
    unknown = "so that nothing says whether options changed since the run began"
    try:
        if record is run:
            options = parse_yaml(run.read_text(encoding="utf-8"))
            if not isinstance(options, dict):
                return Past(note=f"{run} holds no options, {unknown}")
            _product(_flat(options))
            return Past(_flat(options))
        read = json.loads(own.read_text(encoding="utf-8"))
        _product(read["options"])
        return Past(dict(read["options"]), dict(read["given"]), int(read["processes"]), tuple(read["before"]))
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, RecursionError) as error:
        return Past(note=f"{record} is damaged, {unknown} ({error})")


def record_of(config: TrainConfig, given: TrainConfig, processes: int, past: Past | None, step: int) -> str:
    """The text of a checkpoint's `OPTIONS_FILE`.

    Args:
        config: the run, with every choice made.
        given: the run as it was asked for.
        processes: how many train it.
        past: what the checkpoint tells that it went on from; None if it began anew.
        step: of that checkpoint.
    """
    found = {
        "options": options_of(config),
        "given": options_of(given),
        "processes": processes,
        "before": history(config, past, step),
    }
    return json.dumps(found, indent=2) + "\n"


def history(config: TrainConfig, past: Past | None, step: int) -> list[dict[str, Any]]:
    """Which options had other values before, and until which step, the earliest first."""
    if past is None:
        return []
    changed = {name: before for name, before, _now in changes(config, past)}
    return [*past.before, *([{"until": step, "options": changed}] if changed else [])]


def history_lines(entries: list[dict[str, Any]]) -> list[str]:
    """The same in words, one line for each change."""
    return [
        f"until step {entry.get('until')}: {name} {_told(value)}"
        for entry in entries
        for name, value in dict(entry.get("options") or {}).items()
    ]


def options_of(config: TrainConfig) -> dict[str, Any]:
    """All options of a run side by side, TRL's among them, as JSON has them."""
    return _flat(json.loads(json.dumps(config.to_options(), default=str)))


def changes(config: TrainConfig, past: Past) -> Iterator[tuple[str, Any, Any]]:
    """Name, value before and value now of each option that a run does not share with the one it goes on from."""
    if past.options is None:
        return
    now = options_of(config)
    for name in dict.fromkeys((*now, *past.options)):
        if name in _UNSAID:
            continue
        one, other = _value(name, past.options), _value(name, now)
        if one != other:
            yield name, one, other


def change_notes(config: TrainConfig, past: Past) -> list[str]:
    """What the panel says of options that have changed."""
    if past.note is not None:
        return [past.note]
    return [
        f"changed since the run began: {name} from {_told(before)} to {_told(now)}"
        for name, before, now in changes(config, past)
    ]


def check_options(config: TrainConfig, processes: int, checkpoint: Path, past: Past) -> None:
    """Refuse options that a run cannot go on with from a checkpoint, before anything is loaded.

    Raises:
        ConfigError: naming each with its value then and now, and why.
    """
    done = steps_done(checkpoint)
    if config.max_steps is not None and done > config.max_steps:
        raise ConfigError(
            f"{checkpoint} holds {done} steps, and this run has {config.max_steps}. Raise max_steps to go on."
        )
    if past.options is None:
        return
    now = options_of(config)
    problems = [
        f"{name} was {_told(_value(name, past.options))} and is {_told(_value(name, now))}: {why}"
        for name, why in _reasons(now, past).items()
        if _differs(name, now, past)
    ]
    problems += _batches(now, past, processes)
    if problems:
        raise ConfigError(
            f"{checkpoint} was trained with other options, and a run cannot go on from it with these:"
            + bullet_list(problems)
            + f"\nLeave them as they were; or begin a run of its own with what is there: {begin_with(checkpoint)}, "
            "another --output, and no --resume."
        )


def _reasons(now: Mapping[str, Any], past: Past) -> dict[str, str]:
    """Option -> why it must be what it was."""
    assert past.options is not None
    then = past.options
    reasons = dict.fromkeys(sorted(_ADAPTER), "the checkpoint holds an adapter made with it")
    reasons |= dict.fromkeys(sorted(_ROWS), "the place in the data is counted in rows chosen and ordered with it")
    reasons |= dict.fromkeys(sorted(_OPTIMIZER), "the checkpoint holds the state of that optimizer")
    reasons["from_adapter"] = "the checkpoint's adapter takes its place"
    reasons["objective"] = "the optimizer's state is of that loss"
    reasons["reference"] = "the model has been compared with it so far"
    reasons["general"] = "the loss before training was measured on it"
    if not then.get("replay") and not now.get("replay"):
        del reasons["replay_share"]
    kinds = [_value("lr_scheduler_type", options) for options in (then, now)]
    if any(kind in _OF_STATE for kind in kinds) or "layerwise" in str(_value("optim", then)):
        reasons |= dict.fromkeys(sorted(_COURSE), "the checkpoint holds the course of the learning rate")
    keeps_best = [
        options.get("early_stopping_patience") or options.get("load_best_model_at_end") for options in (then, now)
    ]
    if all(keeps_best):
        reasons |= dict.fromkeys(sorted(_BEST), "the best result so far was found with it")
    if _value("eval_data", then) and _value("eval_data", now):
        del reasons["held_out"]  # which neither reads
    return reasons


def _differs(name: str, now: Mapping[str, Any], past: Past) -> bool:
    """Whether an option is another one than it was, both as it was given and as it was chosen."""
    assert past.options is not None
    value = _value(name, now)
    if not past.given and value is None:  # an older checkpoint tells of choices alone
        return False
    known = [_value(name, past.options), *([_value(name, past.given)] if past.given else [])]
    if name == "optim" and value in _SAME_OPTIMIZER and known[0] in _SAME_OPTIMIZER:
        return False
    if name == "from_adapter" and value and known[0]:
        return Path(value).resolve() != Path(known[0]).resolve()
    if name == "held_out" and _value("eval_data", now) and known[0] in (None, 0):
        return False  # nothing of the data was held out, nor is it now
    return value not in known


def _batches(now: Mapping[str, Any], past: Past, processes: int) -> list[str]:
    assert past.options is not None
    then = _product(past.options) * past.processes
    here = _product(now) * processes
    if then == here:
        before, after = _drawn(past.options, past.processes), _drawn(now, processes)
        return (
            []
            if before == after
            else [
                f"completions were drawn for {before:g} steps at once and are for {after:g} (steps_per_generation, in "
                f"batches of {_BATCH[0]}, or generation_batch_size): the place in the data goes by it"
            ]
        )
    at_once = int(_value(_BATCH[0], now)) * processes
    same = f"; {_BATCH[1]} {then // at_once} would keep it" if then % at_once == 0 else ""
    return [
        f"a step was {then:,} rows ({' × '.join(_BATCH)} × processes) and is {here:,}: the place in the data is "
        f"counted in steps. Change them such that their product stays{same}"
    ]


def _drawn(options: Mapping[str, Any], processes: int) -> float:
    """Optimizer steps that grpo draws completions for at once."""
    batches, completions = _value("steps_per_generation", options), _value("generation_batch_size", options)
    if completions is not None:
        return int(completions) / (_product(options) * processes)
    return 1 if batches is None else int(batches) / int(_value(_BATCH[1], options))


def _product(options: Mapping[str, Any]) -> int:
    one, other = (_value(name, options) for name in _BATCH)
    return int(one) * int(other)


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    own = {str(name): value for name, value in options.items() if name != "trainer"}
    return own | dict(options.get("trainer") or {})


def _value(name: str, options: Mapping[str, Any]) -> Any:
    """An option's value, or what it is by default."""
    return options[name] if name in options else _DEFAULTS.get(name)


def _defaults() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in (PolicySettings, SFTConfig, AdapterConfig, TrainConfig):  # of a name in several the last counts
        found |= {f.name: getattr(f.default, "value", f.default) for f in fields(kind) if f.default is not MISSING}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


_DEFAULTS = _defaults()


def _told(value: Any) -> str:
    return shown(value) if isinstance(value, str) and not value.isprintable() else str(value)


class AsAsked:
    """What the options make of optimizer and schedule, taken down before a checkpoint's state is put into them."""

    _NAMES = ("weight_decay", "betas", "eps", "momentum", "fused", "foreach")

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        self._groups = [{name: g[name] for name in self._NAMES if name in g} for g in optimizer.param_groups]
        self._rates = list(scheduler.base_lrs) if isinstance(scheduler, LambdaLR) else None

    def put_into(self, optimizer: Any, scheduler: Any) -> None:
        """Set it again; what the optimizer has gathered, and how far the schedule is, stay."""
        for group, asked in zip(optimizer.param_groups, self._groups, strict=True):
            group.update(asked)
        if self._rates is None:
            return
        scheduler.base_lrs = list(self._rates)
        now = [
            base * course(scheduler.last_epoch) for base, course in zip(self._rates, scheduler.lr_lambdas, strict=True)
        ]
        for group, base, rate in zip(optimizer.param_groups, self._rates, now, strict=True):
            group["initial_lr"] = base
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        scheduler._last_lr = now


class UseOptions(TrainerCallback):
    """Sets again what a checkpoint's trainer state brings back of the options of old."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.patience: int | None = next((c.early_stopping_patience for c in self._early_stops()), None)

    def _early_stops(self) -> list[EarlyStoppingCallback]:
        return [c for c in self.trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """How often to log, evaluate and save, and the patience of early stopping."""
        state.compute_steps(args, state.max_steps)
        for callback in self._early_stops():  # the checkpoint's has taken the place of the one that was given
            callback.early_stopping_patience = self.patience or callback.early_stopping_patience
