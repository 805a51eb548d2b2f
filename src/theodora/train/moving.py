"""How far an adapter has moved its base so far: the length and the direction of the weights' rows, along a run.

Each row w of the base becomes w + d, with d a row of s·B·A; DoRA then gives it the length m. Noted are the angle
between w and w + d, in degrees, and of DoRA |m / |w| - 1|: means over the rows of a module, then over modules. It is
what `inspect_adapter` measures of the files (`analysis.movement`), here in float32 of the weights in memory.

It is computed where the host waits anyhow, at evaluations and checkpoints, and reads each weight once: about what a
pass over as many tokens as the rank costs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from theodora.adapters.state import active_name, adapter_layers, require_state
from theodora.functional import row_angles, update_products
from theodora.layers import AdapterLayer
from theodora.train.callbacks import read_metrics

DIRECTION, MAGNITUDE = "moved_direction", "moved_magnitude"
"""Names of the figures in metrics.jsonl: degrees, and a share of the length."""


class Moving(TrainerCallback):
    """Notes it at every evaluation, and at every checkpoint that was planned.

    Args:
        trainer: in whose log it stands, on lines of their own.
        metrics: metrics.jsonl, which a run that goes on finds with lines in it.
    """

    def __init__(self, trainer: Trainer, metrics: Path) -> None:
        self.trainer, self._metrics = trainer, metrics
        self._due: int | None = None
        self._norms: dict[str, Tensor] = {}
        """‖W‖ of each row, (O,): frozen, so computed once."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that goes on may have been killed between a checkpoint and its line."""
        step = state.global_step
        noted = {line["step"] for line in read_metrics(self._metrics) if DIRECTION in line} if step else set[int]()
        if step not in noted and (step == 0 or _planned(args, state)):
            self._due = step
            if step and not args.eval_on_start:
                self._note(state)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What is asked for later, to stop, is not planned."""
        if _planned(args, state):
            self._due = state.global_step

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Along the way, and where training starts."""
        self._note(state)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Where nothing is held out."""
        self._note(state)

    def _note(self, state: TrainerState) -> None:
        if self._due != state.global_step:
            return
        self._due = None
        model: Any = self.trainer.model
        Trainer.log(self.trainer, moved(model, self._norms))  # not TRL's, see `Forgetting`


def _planned(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether a checkpoint or an evaluation stands at this step by the run's own arguments."""
    step = state.global_step
    return any(
        strategy == IntervalStrategy.EPOCH
        or (strategy == IntervalStrategy.STEPS and every and (step % every == 0 or step == state.max_steps))
        for strategy, every in ((args.save_strategy, state.save_steps), (args.eval_strategy, state.eval_steps))
    )


def moved(model: nn.Module, norms: dict[str, Tensor] | None = None) -> dict[str, float]:
    """How far the active adapter has moved its modules, by name; empty where it adapts none.

    Args:
        model: with an adapter.
        norms: ‖W‖ of each row, by module, as far as it is known; what is computed is added.
    """
    name = active_name(require_state(model), None)
    norms = {} if norms is None else norms
    found = [_of(layer, name, path, norms) for path, layer in adapter_layers(model, name).items()]
    if not found:
        return {}
    home = found[0][0].device
    angles, changes = ([value.to(home) for value in values if value is not None] for values in zip(*found, strict=True))
    means = [torch.stack(values).nanmean() for values in (angles, changes) if values]
    return dict(zip((DIRECTION, MAGNITUDE), torch.stack(means).tolist(), strict=False))


def _of(layer: AdapterLayer, name: str, path: str, norms: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Mean angle, in degrees, and of DoRA mean change of the magnitude, of one module; rows of zeros have neither."""
    adapter: Any = layer.adapters[name]
    with torch.no_grad():
        weight = layer.base_weight
        if path not in norms:
            norms[path] = weight.norm_squared().sqrt()
        norm = norms[path]
        a_RI, b_OR = (factor.to(norm.device, norm.dtype) for factor in adapter.factors())
        alive = norm > 0
        angles = row_angles(norm, *update_products(weight.times_a(a_RI), a_RI, b_OR, adapter.scale))
        angle = torch.rad2deg(angles).where(alive, torch.nan).nanmean()
        if adapter.magnitude is None:
            return angle, None
        change = (adapter.magnitude.to(norm.device, norm.dtype).abs() / norm - 1).abs()
        return angle, change.where(alive, torch.nan).nanmean()
