"""What happens beside the training steps: the metrics file, and ends of a run that come early."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from theodora.errors import TheodoraError
from theodora.files.atomic import atomic_write, explained_io_errors
from theodora.parse import to_json


class Diverged(TheodoraError):
    """A run stopped over a step: one that was not taken, or one whose weights are of no use.

    `in_doubt` is the step of the checkpoint that holds weights in doubt, if there is one: those that it ran on.
    """

    def __init__(self, message: str, step: int, reason: str, *, in_doubt: int | None) -> None:
        super().__init__(message)
        self.step, self.reason, self.in_doubt = step, reason, in_doubt


class MetricsFile(TrainerCallback):
    """One JSON line in metrics.jsonl for every log, flushed, so that it can be watched and survives a crash."""

    def __init__(
        self, path: Path, *, resume_at: int | None, pace: Callable[[], Mapping[str, float]] | None = None
    ) -> None:
        """Begin the file, or cut it back.

        Args:
            path: of the file.
            resume_at: the step that the run goes on from; None for a run that begins.
            pace: how fast it goes, to stand beside the loss of a step; no part of what resumed runs have to repeat.
        """
        self.path, self._pace = path, pace or dict
        earlier = [] if resume_at is None else [line for line in read_metrics(path) if _is_before(line, resume_at)]
        with atomic_write(path) as file:
            file.write_text("".join(to_json(line) + "\n" for line in earlier), encoding="utf-8")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write one line."""
        pace = self._pace() if "loss" in (logs or {}) else {}
        line = to_json({"step": state.global_step, **logs, **pace}) + "\n"
        with explained_io_errors(self.path):
            size = self.path.stat().st_size
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line)
            except OSError:
                os.truncate(self.path, size)  # a full disk may have taken part of it
                raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut off is left out."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def _is_before(line: dict[str, Any], step: int) -> bool:
    """Whether a line belongs to the part of a run that a checkpoint at `step` holds; the closing summary does not."""
    return line["step"] <= step and "train_runtime" not in line


class StopWhenDiverged(TrainerCallback):
    """Ends the run at the first loss that is not finite: nothing after it can be of use."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Look at the loss, the gradient norm and the held-out loss."""
        # In fp16 gradients that overflow are expected: the loss scaler leaves such steps out.
        for name in ("loss", "eval_loss") if args.fp16 else ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise Diverged(
                    f"Training diverged: {name} is {value} at step {state.global_step}. Try a lower learning_rate "
                    f"(it is {args.learning_rate:g}), a longer warm-up, or bf16 instead of fp16.",
                    state.global_step,
                    f"{name} is {value}",
                    in_doubt=None,
                )


class CountUpdates(TrainerCallback):
    """Counts the optimizer steps at a learning rate above 0 (a warm-up begins at 0)."""

    def __init__(self) -> None:
        self.count = 0

    def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Look at the learning rate of the coming update."""
        self.count += any(group["lr"] > 0 for group in optimizer.param_groups)
