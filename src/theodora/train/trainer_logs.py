"""The trainer's overrides that write the log: on a GPU, figures are fetched while the next steps run."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from theodora.train.deferred_metrics import DeferredMetrics
from theodora.train.step_state import CountingTrainer, Metrics, replace_metrics

_LINES_UNDER_WAY = 2  # steps that the host may be ahead of the figures it logs


@dataclass(frozen=True)
class _Line:
    """A line of the log whose figures are on their way."""

    step: int
    epoch: float
    steps: int
    """Steps since the line before."""
    figures: DeferredMetrics


class LogOverrides(CountingTrainer):
    """Logs each line under its own step, a step or two later; nothing is reported home."""

    defers_logs = False
    """Whether the host goes on meanwhile."""
    means: tuple[str, ...] = ("entropy", "mean_token_accuracy")
    """Metrics that are means over the passes of all processes."""
    _under_way: deque[_Line]

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Overrides transformers 5.17 to 5.23's `Trainer._maybe_log_save_evaluate`, which waits for the figures.

        Sends for those of this step and logs those that have come; waits where something depends on them.
        """
        if self.guard is not None and (self.control.should_save or self.control.should_evaluate):
            self.guard.look()
        if self.defers_logs:
            if self.control.should_log and self.state.global_step > self.logged_at:
                self._send_for_figures(tr_loss, grad_norm, kwargs.get("learning_rate"))
                self.control.should_log = False
            control = self.control
            self.log_arrived(control.should_save or control.should_evaluate or control.should_training_stop)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        self.note_step()

    def _send_for_figures(self, tr_loss: Tensor, grad_norm: Any, learning_rate: float | None) -> None:
        step = self.state.global_step
        metrics, loss = self._of_all(self.metrics_of("train"), tr_loss.clone())
        tr_loss.zero_()
        figures: dict[str, Any] = {**metrics, "loss": [loss], "grad_norm": [] if grad_norm is None else [grad_norm]}
        figures["learning_rate"] = [self._get_learning_rate() if learning_rate is None else learning_rate]
        self.metrics_of("train").clear()
        self._under_way.append(_Line(step, self.state.epoch or 0.0, step - self.logged_at, DeferredMetrics(figures)))
        self.logged_at = step

    def _of_all(self, metrics: Metrics, loss: Tensor) -> tuple[Metrics, Tensor]:
        """Metrics and the sum of losses over all processes, each of which calls this."""
        if self.processes.alone:
            return metrics, loss
        names = [*self.means, *(["aux_loss"] if self.aux_loss_enabled else [])]
        wide = torch.float64 if loss.device.type != "mps" else torch.float32
        own = [(metrics.get(name, []), len(metrics.get(name, []))) for name in names]
        sums = [torch.as_tensor(v, device=loss.device).to(wide) for v in (loss, self.tokens)]
        for values, count in own:
            sums.append(
                sum((torch.as_tensor(v, device=loss.device).to(wide) for v in values), torch.zeros_like(sums[0]))
            )
            sums.append(torch.full_like(sums[0], count))
        total = self.processes.sum(torch.stack(sums))
        means = {name: [total[2 + 2 * n] / total[3 + 2 * n].clamp(min=1)] for n, name in enumerate(names)}
        return {**metrics, **means, "num_tokens": [total[1]]}, total[0]

    def log_arrived(self, all_of_them: bool) -> None:
        """Log in order, each under its own step."""
        now = self.state.global_step, self.state.epoch or 0.0
        while self._under_way:
            line = self._under_way[0]
            if not (all_of_them or line.figures.ready() or len(self._under_way) > _LINES_UNDER_WAY):
                break
            self._under_way.popleft()
            metrics = line.figures.read()
            own = {name: metrics.pop(name) for name in ("loss", "grad_norm", "learning_rate")}
            self.loss_logged += own["loss"][0]
            logs = {name: values[0] for name, values in own.items() if values}
            newer = dict(self.metrics_of("train"))
            replace_metrics(self.metrics_of("train"), metrics)
            self.state.global_step, self.state.epoch = line.step, line.epoch
            try:
                self.store_flos()
                self.log({**logs, "loss": logs["loss"] / line.steps})
            finally:
                self.state.global_step, self.state.epoch = now
            self.metrics_of("train").update(newer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Overrides TRL 1.16's `SFTTrainer.log`: fetches the metrics from the device first, all at once."""
        metrics = self.metrics_of(self.mode)
        # Those of training are sent for by the step that is logged; the summary of a run has none.
        if self.mode == "eval" and "train_runtime" not in logs:
            replace_metrics(metrics, self._of_all(dict(metrics), self.loss_sum)[0])
        metrics.update(DeferredMetrics(metrics).read())
        self.settle(metrics)
        super().log(logs, start_time)

    def settle(self, metrics: Metrics) -> None:
        """Make of what was recorded, numbers now, what is logged."""

    def store_flos(self) -> None:
        """Overrides transformers 5.17 to 5.23's `Trainer.store_flos`: other processes do as much."""
        self.current_flos *= self.processes.count
        super().store_flos()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Overrides TRL 1.16's `_BaseTrainer.create_model_card`: the run writes a card of its own."""

    def _send_telemetry(self) -> None:
        """Overrides TRL 1.16's `_BaseTrainer._send_telemetry`, which tells its makers about the run."""
