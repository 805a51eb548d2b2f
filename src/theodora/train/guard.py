"""Steps that must not be taken: their loss or gradient is not finite, or their loss has exploded.

The batch is written aside for inspection. On a CPU, and with `on_nan: skip`, the host looks at each step before the
optimizer takes it. Elsewhere with `on_nan: stop` it does not wait for the device: it looks a step or two later, and
always before anything is saved.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from theodora.errors import TheodoraError
from theodora.files.atomic import atomic_write
from theodora.train.callbacks import Diverged, read_metrics
from theodora.train.deferred_metrics import DeferredMetrics
from theodora.train.fused_loss import LEARNED

_UNDER_WAY = 2  # steps that the host may be ahead of what it looks at
_SKIPS_IN_A_ROW = 10  # after which nothing will get better


class StepGuard:
    """Looks at the loss and gradient norm of each step.

    Args:
        file: where the rows of bad batches go, one JSON object a line.
        policy: `stop` or `skip`.
        max_loss: the loss from which on a step counts as exploded; None for no bound.
        decode: token ids -> text.
        waits: whether to look at a step before it is taken.
        looks_at_norm: whether the gradient's norm counts; in fp16 the loss scaler sees to it.
        hint: what may help, for the message.
    """

    def __init__(
        self,
        file: Path,
        policy: str,
        max_loss: float | None,
        decode: Callable[[list[int]], str],
        *,
        waits: bool,
        looks_at_norm: bool = True,
        hint: str = "",
    ) -> None:
        self.file, self.policy, self.max_loss, self.decode = file, policy, max_loss, decode
        self.waits, self.looks_at_norm, self.hint = waits or policy == "skip", looks_at_norm, hint
        self.skipped: list[int] = []
        self._in_a_row = 0
        self._batches: list[dict[str, Tensor]] = []
        self._losses: list[Tensor] = []
        self._under_way: deque[tuple[int, DeferredMetrics, list[dict[str, Tensor]]]] = deque()

    def note(self, inputs: dict[str, Any], loss: Tensor) -> None:
        """Remember a forward and backward pass of the step at hand: the batch, and its share of the step's loss."""
        names = ("input_ids", "labels", "attention_mask", "position_ids")
        batch = {name: inputs[name] for name in names if isinstance(inputs.get(name), Tensor)}
        if LEARNED in inputs and "attention_mask" not in batch and len(batch["input_ids"]) == 1:
            # What fills up a row of rows is none of the user's.
            batch = {name: value[:, : inputs[LEARNED]["tokens"]] for name, value in batch.items()}
        self._batches.append(batch)
        self._losses.append(loss.detach())

    def forget(self) -> None:
        """Forget the step at hand; it begins anew."""
        self._batches, self._losses = [], []

    def may_be_taken(self, step: int, grad_norm: Tensor | float | None, loss: Tensor | None = None) -> bool:
        """Look at a step, which ends here; whether the optimizer may take it.

        Args:
            step: its number.
            grad_norm: of its gradient; None where nobody computes it.
            loss: of several processes together, which decide alike; None: what was noted here.

        Raises:
            TheodoraError: the run is to stop over it, or over one before it.
        """
        if loss is None and self._losses:
            loss = torch.stack([loss.float() for loss in self._losses]).sum()
        if loss is not None:
            metrics = DeferredMetrics({"loss": [loss], "grad_norm": [] if grad_norm is None else [grad_norm]})
            self._under_way.append((step, metrics, self._batches))
        self.forget()
        return self.look(wait=self.waits)

    def look(self, wait: bool = True) -> bool:
        """Look at the steps whose metrics have come, or at all; whether all are good."""
        good = True
        while self._under_way:
            step, metrics, batches = self._under_way[0]
            if not (wait or metrics.ready() or len(self._under_way) > _UNDER_WAY):
                break
            self._under_way.popleft()
            values = {name: value[0] for name, value in metrics.read().items() if value}
            reason = self._reason(values)
            self._in_a_row = self._in_a_row + 1 if reason else 0
            if reason:
                good = False
                self._refuse(step, reason, values, batches)
        return good

    def _reason(self, values: dict[str, float]) -> str | None:
        for name in ("loss", "grad_norm") if self.looks_at_norm else ("loss",):
            if not math.isfinite(values.get(name, 0.0)):
                return f"{name} is {values[name]}"
        if self.max_loss is not None and values["loss"] > self.max_loss:
            return f"loss is {values['loss']:.4g}, more than max_loss ({self.max_loss:.4g}),"
        return None

    def _refuse(self, step: int, reason: str, values: dict[str, float], batches: Sequence[dict[str, Tensor]]) -> None:
        self._write(step, reason, values, batches)
        if self.policy == "stop":
            raise Diverged(
                f"Training diverged: {reason} at step {step}. {self.hint} on_nan: skip leaves such steps out. The rows "
                f"of this one are in {self.file}.",
                step,
                reason,
                in_doubt=step - 1,
            )
        self.skipped.append(step)
        if self._in_a_row >= _SKIPS_IN_A_ROW:
            raise TheodoraError(
                f"Training diverged: {reason} at step {step}, and the {_SKIPS_IN_A_ROW - 1} steps before it had to be "
                f"skipped, too. {self.hint} Their rows are in {self.file}."
            )

    def _write(self, step: int, reason: str, values: dict[str, float], batches: Sequence[dict[str, Tensor]]) -> None:
        """Add the rows of a step to the file. Those of later steps are from before a resume, and go."""
        lines = [line for line in read_metrics(self.file) if line["step"] < step]
        told = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        for number, batch in enumerate(batches):
            for row, (ids, learned) in enumerate(rows_of(batch)):
                what = {"step": step, "reason": reason.rstrip(","), **told, "micro_batch": number, "row": row}
                texts = {"text": self.decode(ids), "learned_text": self.decode(learned)}
                lines.append({**what, **texts, "input_ids": ids})
        with atomic_write(self.file) as file:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.write_text(text, encoding="utf-8", errors="backslashreplace")


def rows_of(batch: dict[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """The token ids of each row of a batch, packed ones too, without padding; and those of them that are learned."""
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    masks = batch["attention_mask"].tolist() if "attention_mask" in batch else [[1] * len(row) for row in ids]
    positions = batch["position_ids"].tolist() if "position_ids" in batch else [[1] * len(row) for row in ids]
    rows: list[tuple[list[int], list[int]]] = []
    for row in zip(ids, labels, masks, positions, strict=True):
        rows.append(([], []))
        for token, label, real, position in zip(*row, strict=True):
            if position == 0 and rows[-1][0]:
                rows.append(([], []))
            if real:
                rows[-1][0].append(token)
            if real and label != -100:
                rows[-1][1].append(label)
    return rows
