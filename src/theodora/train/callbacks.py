"""What happens beside the training steps: the metrics file, and ends of a run that come early."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from theodora.errors import TheodoraError


class MetricsFile(TrainerCallback):
    """One JSON line in metrics.jsonl for every log, flushed, so that it can be watched and survives a crash."""

    def __init__(self, path: Path, *, resume_at: int | None) -> None:
        self.path = path
        kept = [] if resume_at is None else [line for line in read_metrics(path) if _is_before(line, resume_at)]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write one line."""
        if not state.is_world_process_zero:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **{k: _plain(v) for k, v in logs.items()}}) + "\n")


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


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class StopWhenDiverged(TrainerCallback):
    """Ends the run at the first loss that is not finite: nothing after it can be of use."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Look at the loss, the gradient norm and the held-out loss."""
        for name in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise TheodoraError(
                    f"Training diverged: {name} is {value} at step {state.global_step}. Try a lower learning_rate "
                    f"(it is {args.learning_rate:g}), a longer warm-up, or bf16 instead of fp16."
                )


class CountUpdates(TrainerCallback):
    """Counts the optimizer steps at a learning rate above 0 (a warm-up begins at 0)."""

    def __init__(self) -> None:
        self.count = 0

    def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Look at the learning rate of the coming update."""
        self.count += any(group["lr"] > 0 for group in optimizer.param_groups)


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C ends the run after the step (or evaluation batch) at hand, with a checkpoint; a second one at once."""

    def __init__(self) -> None:
        self.requested = False
        self.in_evaluation = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT inside the block. Only the main thread of a process can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _on_signal(self, *_: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end."""
        if self.requested and state.global_step < state.max_steps:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the evaluation."""
        if self.requested:
            self.in_evaluation = True
            raise KeyboardInterrupt
