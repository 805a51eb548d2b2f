"""What a step has made of the weights, known before they are saved over good ones.

A step is taken on the loss of its rows before it, and only the next step's loss tells what it did: too late for a
checkpoint in between, and never for the last step. So before anything is saved the rows of the last step run once more,
forward alone, on the weights that would be saved; these and the optimizer's state must be finite, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from transformers import Trainer

from theodora.errors import bullet_list
from theodora.files.finite import not_finite
from theodora.train.callbacks import Diverged
from theodora.train.full import tensors_of_run
from theodora.train.processes import Processes

_SHOWN = 12


class Outcome:
    """Looks at the weights that a step has left.

    Args:
        trainer: whose model and optimizer are looked at.
        processes: which all have to find the same.
        loss_now: the loss of a batch on the weights of now, if there is memory for it.
        max_loss: the loss from which on the weights count as ruined; None for no bound.
        hint: what may help, for the message.
    """

    def __init__(
        self,
        trainer: Trainer,
        processes: Processes,
        loss_now: Callable[[dict[str, Any]], Tensor | None],
        max_loss: float | None,
        hint: str = "",
    ) -> None:
        self.trainer, self.processes, self.max_loss, self.hint = trainer, processes, max_loss, hint
        self._loss_now = loss_now
        self._noted: dict[str, Any] | None = None
        self._taken: dict[str, Any] | None = None
        self._good_at = 0

    def note(self, batch: dict[str, Any]) -> None:
        """Remember rows of the step at hand."""
        self._noted = batch

    def take(self) -> None:
        """The optimizer takes the step at hand."""
        self._taken = self._noted

    def check(self) -> None:
        """Look at the weights as they are, once for each step; every process calls this.

        Raises:
            Diverged: they are of no use, and nothing of them was saved.
        """
        step = self.trainer.state.global_step
        if not step or self._good_at == step:
            return
        bad = not_finite(self._saved())
        reason = f"{bad[0]} is not finite" if bad else self._reason()
        if self.processes.any(reason is not None):
            reason = reason or "the loss is not finite in another process"
            raise Diverged(
                f"Training diverged: {reason} after step {step}, and nothing of that was saved. {self.hint}"
                + (bullet_list(bad[:_SHOWN]) if len(bad) > 1 else ""),
                step,
                reason,
                in_doubt=None,
            )
        self._good_at = step

    def _saved(self) -> Iterator[tuple[str, Tensor]]:
        """What would be saved of this process: the tensors that are trained, and the optimizer's state."""
        for name, tensor in tensors_of_run(self.trainer.accelerator.unwrap_model(self.trainer.model)).items():
            yield name, getattr(tensor, "to_local", lambda tensor=tensor: tensor)()  # a process' share of it
        states: Any = getattr(self.trainer.optimizer, "state", None) or {}
        for state in states.values():
            for name, value in state.items() if isinstance(state, dict) else ():
                if isinstance(value, Tensor) and value.is_floating_point():
                    yield f"the optimizer's {name} of a tensor of {tuple(value.shape)}", value

    def _reason(self) -> str | None:
        loss = None if self._taken is None else self._loss_now(self._taken)
        if loss is None:
            return None
        value = float(loss)
        if not math.isfinite(value):
            return f"loss is {value} on its own rows"
        if self.max_loss is not None and value > self.max_loss:
            return f"loss is {value:.4g} on its own rows, more than max_loss ({self.max_loss:.4g}),"
        return None
