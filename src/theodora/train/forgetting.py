"""What a run makes its model forget: the loss on general text before, along the way and after."""

from __future__ import annotations

import math
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState

from theodora.evaluate.scores import LossNotFinite, score
from theodora.train.prepare import Prepared
from theodora.train.processes import Processes

GENERAL_LOSS = "general_loss"
"""Name of the figure in metrics.jsonl, in nats per token."""


class Forgetting(TrainerCallback):
    """Measures the loss on general text before the first step and, on a GPU, at every evaluation.

    Args:
        prepared: the model, and the texts (`general`).
        trainer: in whose log the losses stand, on lines of their own.
    """

    def __init__(self, prepared: Prepared, trainer: Trainer) -> None:
        self.prepared, self.trainer = prepared, trainer
        # 16,384 tokens are a second's work there, and on a CPU that of many steps.
        self.along = trainer.args.device.type != "cpu"

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Where training starts; a run that goes on has it in its log."""
        if state.global_step == 0:
            self._note()

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Along the way."""
        if self.along and state.global_step not in self._known():
            self._note()

    def before_and_after(self) -> tuple[float | None, float]:
        """The loss where training started (None where the log does not tell), and that of the model as it is now."""
        known = self._known()
        # (The best adapter may have been put back since.)
        best = self.trainer.args.load_best_model_at_end
        after = None if best else known.get(self.trainer.state.global_step)
        return known.get(0), self._note() if after is None else after

    def _known(self) -> dict[int, float]:
        lines = [line for line in self.trainer.state.log_history if GENERAL_LOSS in line]
        return {int(line["step"]): line[GENERAL_LOSS] for line in lines}

    def _note(self) -> float:
        loss = self._measured()
        # Not TRL's `log`, which would take what the steps under way have recorded along.
        Trainer.log(self.trainer, {GENERAL_LOSS: loss})
        return loss

    def _measured(self) -> float:
        processes = Processes.here()
        # Of a sharded model every process has a part, which the others need in each pass.
        return self._loss() if processes.sharding is not None else processes.first_does(self._loss, patient=True)

    def _loss(self) -> float:
        """NaN where training has made it so: its own guards end runs, not a measurement."""
        prepared = self.prepared
        assert prepared.general is not None
        rows = prepared.config.per_device_eval_batch_size
        try:
            asked = prepared.general
            return score(prepared.model, prepared.tokenizer, asked, batch_size=rows, exact_match=False).loss
        except LossNotFinite:
            if self.trainer.state.global_step == 0:
                raise
            return math.nan
