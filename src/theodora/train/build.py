"""The trainer of a run, with what guards its steps."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, PreTrainedModel
from trl.trainer.sft_config import SFTConfig
from trl.trainer.utils import disable_dropout_in_model

from theodora.data import PromptRows
from theodora.errors import ConfigError
from theodora.files import run_files
from theodora.train.grpo import GRPOTrainer
from theodora.train.grpo_loss import PolicySettings
from theodora.train.guard import StepGuard
from theodora.train.objectives import settings_of
from theodora.train.outcome import Outcome
from theodora.train.preference import PreferenceTrainer
from theodora.train.prepare import Prepared
from theodora.train.reference import BASE, Reference
from theodora.train.reward_loss import ScoreSettings
from theodora.train.reward_model import RewardTrainer
from theodora.train.trainer import AdapterTrainer
from theodora.train.vllm_rollouts import said_of_vllm


def build_trainer(prepared: Prepared, arguments: SFTConfig, callbacks: list[Any]) -> AdapterTrainer:
    """The trainer of the run's objective.

    Raises:
        ConfigError: TRL refuses the run.
    """
    config, settings = prepared.config, settings_of(prepared.config)
    if config.early_stopping_patience is not None:
        callbacks = [EarlyStoppingCallback(config.early_stopping_patience), *callbacks]
    trainer: Any = AdapterTrainer
    if settings is not None:
        if settings.disable_dropout:
            prepared.notes += _without_dropout(prepared)
        reference = reference_of(prepared)
        if isinstance(settings, ScoreSettings):
            trainer = partial(RewardTrainer, settings=settings)
        elif isinstance(settings, PolicySettings):
            trainer = _policy_trainer(prepared, settings, reference)
        else:
            trainer = partial(PreferenceTrainer, settings=settings, reference=reference)
    own_padding = prepared.tokenizer.pad_token
    try:
        built = trainer(
            model=prepared.model,
            args=arguments,
            train_dataset=prepared.train_rows,
            eval_dataset=prepared.held_out_rows,
            processing_class=prepared.tokenizer,
            callbacks=callbacks,
            kernels=config.kernels,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"TRL refuses this run: {error}") from error
    finally:
        prepared.tokenizer.pad_token = own_padding
    if prepared.rewards is not None:
        prepared.notes += prepared.rewards.place(prepared.model)
    return built


def _policy_trainer(prepared: Prepared, settings: PolicySettings, reference: Reference | None) -> Any:
    assert prepared.rewards is not None
    assert reference is not None
    if settings.vllm is not None:
        prepared.notes.append(said_of_vllm(prepared.model))
    return partial(
        GRPOTrainer,
        settings=settings,
        reference=reference,
        rewards=prepared.rewards,
        training=PromptRows(prepared.training),
        held_out=None if prepared.held_out is None else PromptRows(prepared.held_out),
    )


def reference_of(prepared: Prepared) -> Reference | None:
    """What the model is compared with, as it is before the first step."""
    config = prepared.config
    if config.reference is None:
        return None
    adapter = None if config.reference == BASE else config.reference
    return Reference(prepared.model, adapter, config.from_adapter)


def _without_dropout(prepared: Prepared) -> list[str]:
    """Turn dropout off, which would be noise in every comparison with the reference; what to say of it."""
    disable_dropout_in_model(prepared.model)
    asked = prepared.config.adapter.dropout
    return [f"dropout {asked:g} is off: answers are compared (disable_dropout: false leaves it on)"] if asked else []


def guard_of(prepared: Prepared, trainer: AdapterTrainer, output: Path) -> StepGuard:
    """What looks at each step."""
    config, arguments, processes = prepared.config, trainer.args, trainer.processes
    name = run_files.BAD_BATCHES_FILE.replace(".", "." if processes.first else f"-{processes.index}.")
    guessing = math.log(prepared.model.config.get_text_config().vocab_size)
    return StepGuard(
        output / name,
        config.on_nan,
        # A comparison's loss is of no scale that is known beforehand.
        config.max_loss or (3 * guessing if config.objective == "sft" else None),
        lambda ids: str(prepared.tokenizer.decode(ids)),
        waits=arguments.device.type == "cpu",
        looks_at_norm=not arguments.fp16,
        hint=f"Try a lower learning_rate (it is {arguments.learning_rate:g}) or a longer warm-up."
        + (" bf16 instead of fp16 helps, too." if arguments.fp16 else ""),
    )


def outcome_of(trainer: AdapterTrainer, guard: StepGuard, model: PreTrainedModel) -> Outcome:
    """What looks at the weights that a step has left."""
    # What a user allows a step's own loss at most may be less than what sound weights make of rows that they have seen.
    guessing = math.log(model.config.get_text_config().vocab_size)
    bound = None if guard.max_loss is None else max(guard.max_loss, 3 * guessing)
    return Outcome(trainer, trainer.processes, trainer.loss_now, bound, guard.hint)
