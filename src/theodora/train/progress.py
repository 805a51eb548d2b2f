"""The live view of a run: two lines at the foot of a terminal, or a line now and then in a file."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SMOOTHING = 0.9  # weight of the past in the loss that is shown
_SECONDS_BETWEEN_LINES = 10  # where the output is no terminal
_SECONDS_OF_RATE = 3

PACE = ("tokens_per_second", "seconds_left", "peak_memory")
"""What metrics.jsonl has beside a step's loss."""


class _Mark(NamedTuple):
    """Where a run was."""

    busy: float = 0.0
    """Seconds spent in training steps."""
    tokens: int = 0

    def rate_since(self, other: _Mark) -> float | None:
        """Tokens a second; None where no time has passed."""
        return (self.tokens - other.tokens) / (self.busy - other.busy) if self.busy > other.busy else None


class ProgressView(TrainerCallback):
    """Shows step, loss, held-out loss, learning rate, tokens/s, memory and time left while a run goes on."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.loss: float | None = None
        self.eval_loss: float | None = None
        self.accuracy: float | None = None
        self.margin: float | None = None
        self.reward: float | None = None
        self.eval_reward: float | None = None
        self.learning_rate: float | None = None
        self.tokens_per_second: float | None = None
        self.seconds_left: float | None = None
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(None, complete_style="cyan", finished_style="cyan"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}", style="bold", markup=False),
            expand=True,
        )
        self._task = self._bar.add_task("Training", total=None, left="")
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)
        self._weight = 0.0
        self._busy = 0.0
        self._marks = deque([_Mark()])
        self._start = self._marks[0]
        self._first: _Mark | None = None
        self._last_line = 0.0
        self._eval_steps = 0

    def __enter__(self) -> ProgressView:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
        self._first_step, self._started = state.global_step, time.monotonic()
        self._counted_to = self._started

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        now = self._count_time()
        per_step = (now - self._started) / (state.global_step - self._first_step)
        self.seconds_left = per_step * (state.max_steps - state.global_step)
        self._bar.update(self._task, completed=state.global_step, left=f"{as_time(self.seconds_left)} left")

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Count the batches of an evaluation."""
        self._eval_steps += 1
        total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else "?"
        self._bar.update(self._task, description=f"Evaluating {self._eval_steps}/{total}")

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Go back to training."""
        self._counted_to = time.monotonic()
        self._eval_steps = 0
        self._bar.update(self._task, description="Training")

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Go back to training."""
        self._counted_to = time.monotonic()

    def _count_time(self) -> float:
        """Count the time up to now as spent on training."""
        now = time.monotonic()
        self._busy += now - self._counted_to
        self._counted_to = now
        return now

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Take the values over."""
        logs = logs or {}
        if "loss" in logs:
            # Corrected as in Adam, so that the first value is the first loss.
            self._weight = _SMOOTHING * self._weight + 1 - _SMOOTHING
            self.loss = (self.loss or 0.0) + (logs["loss"] - (self.loss or 0.0)) * (1 - _SMOOTHING) / self._weight
            self.learning_rate = logs["learning_rate"]
            self._count_time()  # on a GPU the host may be ahead, until it waits for these values
            # (A log that follows an evaluation at the same step has no tokens.)
            self._note(_Mark(self._busy, logs.get("num_tokens", self._marks[-1].tokens)))
            self.accuracy = logs.get("rewards/accuracies", self.accuracy)
            self.margin = logs.get("rewards/margins", self.margin)
            if "reward" in logs:
                weight = 1 - _SMOOTHING if self.reward is not None else 1.0
                self.reward = (self.reward or 0.0) * (1 - weight) + logs["reward"] * weight
        if "eval_loss" in logs:
            self.eval_loss = logs["eval_loss"]
            self.eval_reward = logs.get("eval_reward")
        evaluated = "eval_loss" in logs
        if not self.console.is_terminal and (evaluated or ("loss" in logs and not control.should_evaluate)):
            self._print_line(state, due=evaluated)  # where an evaluation follows, once, with what it found

    def _note(self, mark: _Mark) -> None:
        """Take the rate over the last seconds: lines that have waited for the device come several at once."""
        self._first = self._first or mark
        self._marks.append(mark)
        while len(self._marks) > 2 and mark.busy - self._marks[1].busy >= _SECONDS_OF_RATE:
            self._marks.popleft()
        self.tokens_per_second = mark.rate_since(self._marks[0]) or self.tokens_per_second

    def pace(self) -> dict[str, float]:
        """Tokens a second over the last seconds, seconds left, and the most bytes held: what is known of it."""
        known = (self.tokens_per_second, self.seconds_left, peak_memory() or None)
        return {name: value for name, value in zip(PACE, known, strict=True) if value is not None}

    @property
    def mean_tokens_per_second(self) -> float:
        """Tokens over the time spent in training steps, without that of evaluations and checkpoints."""
        return self._marks[-1].rate_since(self._start) or 0.0

    @property
    def warm_tokens_per_second(self) -> float:
        """Likewise from the second logged step on, if there is one: the first makes ready what later ones use."""
        return self._marks[-1].rate_since(self._first or self._start) or self.mean_tokens_per_second

    def count_tokens_from(self, tokens: int) -> None:
        """Set how many tokens a resumed run had seen, so that the first rate is right."""
        self._start = _Mark(0.0, tokens)
        self._marks = deque([self._start])

    def _print_line(self, state: TrainerState, due: bool) -> None:
        now = time.monotonic()
        if due or now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            parts = [f"step {state.global_step}/{state.max_steps}", *map(" ".join, self._values())]
            parts += [f"{as_time(self.seconds_left)} left"] if self.seconds_left is not None else []
            self.console.print("  ".join(parts), soft_wrap=True)

    def _values(self) -> list[tuple[str, str]]:
        values: list[tuple[str, float | None, Callable[[float], str]]] = [
            # (a loss that rewards weigh is no figure to look at)
            ("loss", self.loss if self.reward is None else None, "{:.4f}".format),
            ("reward", self.reward, "{:.3f}".format),
            ("held-out", self.eval_loss if self.eval_reward is None else self.eval_reward, "{:.4f}".format),
            ("preferred", self.accuracy, "{:.0%}".format),
            ("margin", self.margin, "{:.3f}".format),
            ("lr", self.learning_rate, "{:.1e}".format),
            ("tokens/s", self.tokens_per_second, "{:,.0f}".format),
            ("memory", peak_memory() or None, as_size),
        ]
        return [(name, show(value)) for name, value, show in values if value is not None]

    def _render(self) -> Group:
        figures = [Text.assemble((name + " ", "dim"), (value, "bold")) for name, value in self._values()]
        return Group(self._bar, Text("   ").join(figures))


def as_time(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def as_size(size: float) -> str:
    """`3.1 GB` or `120 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def peak_memory() -> int:
    """Most bytes this process has held so far: of the GPU if there is one, else of main memory; 0 if unknown."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return _peak_rss()


def _peak_rss() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def shorten(path: str | Path, length: int = 60) -> str:
    """A path with its beginning cut off if it is long."""
    text = str(path)
    return text if len(text) <= length else "…" + text[1 - length :]
