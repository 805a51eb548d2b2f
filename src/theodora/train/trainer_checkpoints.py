"""The trainer's overrides that write checkpoints, and go on from one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback

from theodora.files.atomic import atomic_directory
from theodora.files.read_back import write_text
from theodora.train.checkpoints import rotate
from theodora.train.full import tensors_of_run
from theodora.train.inputs import random_state_file
from theodora.train.movement import fingerprints
from theodora.train.resumed import OPTIONS_FILE, AsAsked
from theodora.train.step_state import (
    CountingTrainer,
    random_states,
    restore_random_states,
    unlogged,
    write_unlogged,
)
from theodora.train.wholeness import list_in_place


class CheckpointOverrides(CountingTrainer):
    """Writes a checkpoint aside and renames it when it is whole; goes on from one with the options of now."""

    options: str | None = None
    """The text of a checkpoint's `OPTIONS_FILE`."""
    saved_at: int | None = None
    """The step of the newest checkpoint that was written."""
    fingerprints_at_end: dict[str, int] | None = None
    """Of the trained tensors where training itself ended, if another adapter has taken their place."""
    _staging: Path | None = None

    @property
    def folder(self) -> Path:
        """Where checkpoints go."""
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    # Going on from one

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Overrides transformers 5.17 to 5.23's `Trainer.train`: remembers what the run goes on from."""
        self.resumed_from = resume_from_checkpoint or None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Overrides transformers 5.17 to 5.23's `Trainer._load_optimizer_and_scheduler`.

        The learning rate, decay and betas of now hold, which the checkpoint would put back as they were.
        """
        asked = AsAsked(self.optimizer, self.lr_scheduler)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            asked.put_into(self.optimizer, self.lr_scheduler)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Overrides transformers 5.17 to 5.23's `Trainer._run_epoch`, which would take a step more in a run that goes
        on from a checkpoint that is its end."""
        if self.state.global_step >= self.state.max_steps or self.has_stopped_early:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    @property
    def has_stopped_early(self) -> bool:
        """Whether held-out losses have not improved for so long that the run is to end."""
        stops = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        return any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in stops)

    # The best one

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Overrides transformers 5.17 to 5.23's `Trainer._evaluate`: also looks for the best where an evaluation that a
        stopped run owed is made at the start of the next."""
        self.note_step()  # the step is logged already, and an evaluation may be left
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if skip_scheduler and self.state.global_step > 0:
            self._determine_best_metric(metrics, trial)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Overrides transformers 5.17 to 5.23's `Trainer._determine_best_metric`: what is the best so far is saved, if
        the best is to be kept."""
        best = super()._determine_best_metric(metrics, trial)
        if best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return best

    def _load_best_model(self) -> None:
        """Overrides transformers 5.17 to 5.23's `Trainer._load_best_model`: also notes where training itself ended.

        The best adapter may be one from before it had moved everything.
        """
        if self.outcome is not None:
            self.outcome.check()
        self.fingerprints_at_end = fingerprints(tensors_of_run(self.model))
        super()._load_best_model()

    # Writing one

    def save_now(self) -> None:
        """Write a checkpoint of the last step that was finished, unless there is one."""
        step = self.state.global_step
        if not step or self.saved_at == step or self.resumed_from == str(self.folder / f"checkpoint-{step}"):
            return
        if self.last_step is not None:
            self.last_step.restore_to(self)
        self.log_arrived(all_of_them=True)  # a run that goes on from here will not log these steps
        self._save_checkpoint(self.model, None)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Overrides TRL 1.16's `SFTTrainer._save_checkpoint`, which leaves half a checkpoint where it is interrupted.

        Here it is saved into a hidden sibling folder that takes its final name when it is whole; nothing that is ruined
        is saved.
        """
        if self.outcome is not None:
            self.outcome.check()
        shares = self.processes.gather((unlogged(self), random_states() if self.processes.index else None))
        self.state.best_model_checkpoint = self.processes.first_does(lambda: self._write(model, trial, shares))
        self.saved_at = self.state.global_step

    def _write(self, model: nn.Module, trial: Any, shares: list[tuple[dict[str, Any], Any]]) -> str | None:
        """Write the checkpoint of all processes; the best one's folder."""
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        with atomic_directory(folder, overwrite=True) as partial, self._writing_to(partial):
            super()._save_checkpoint(model, trial)
            inner = partial / folder.name
            self._name_best_checkpoint(folder)
            write_unlogged(self, inner, [found for found, _ in shares])
            for process, (_, states) in enumerate(shares[1:], 1):
                torch.save(states, inner / random_state_file(process))
            self._write_options(inner)
            self.state.save_to_json(str(inner / "trainer_state.json"))
            list_in_place(self, inner)
        best = self.state.best_model_checkpoint
        rotate(self.folder, self.state.global_step, self.args.save_total_limit, best)
        return best

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Overrides transformers 5.17 to 5.23's `Trainer._load_rng_state`: each process has a state of its own."""
        if self.processes.first:
            super()._load_rng_state(checkpoint)
        elif checkpoint is not None and (file := Path(checkpoint) / random_state_file(self.processes.index)).is_file():
            restore_random_states(torch.load(file, weights_only=True))

    def _get_output_dir(self, trial: Any) -> str:
        """Overrides transformers 5.17 to 5.23's `Trainer._get_output_dir`: the hidden folder while one is written."""
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    @contextmanager
    def _writing_to(self, folder: Path) -> Iterator[None]:
        self._staging = folder
        try:
            yield
        finally:
            self._staging = None

    def _write_options(self, folder: Path) -> None:
        if self.options is not None:
            write_text(folder / OPTIONS_FILE, self.options)

    def _name_best_checkpoint(self, current: Path) -> None:
        """Record the best checkpoint under its final name, not that of the folder it is written to."""
        if not self.state.best_global_step:
            return
        best = current.with_name(f"checkpoint-{self.state.best_global_step}")
        self.state.best_model_checkpoint = str(best) if best == current or best.is_dir() else None
