"""How far a merged model is from what was trained, where the base was quantised then: each layer, and the predictions.

"What was trained" is the formula in float64 on the dequantised weights, whichever weights the adapter is merged onto.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from theodora.errors import CheckpointError
from theodora.files.adapter import AdapterFile
from theodora.files.base_model import BaseCheckpoint
from theodora.merging.logits import (
    LogitsReport,
    compare_logits,
    merged_values,
    probe_rows,
    stored_values,
    streamed_logits,
)
from theodora.merging.onto import Start
from theodora.merging.plan import MergePlan, OutputTensor, plan_merge
from theodora.merging.requantised import LayerError, exact_weight, layer_error

_NO_EFFECT = 1e-6
"""Nats: below it an adapter changes next to nothing, and shares of its effect say nothing."""


class Drift:
    """Collects it while a merge is written.

    Args:
        start: which weights it is merged onto.
        base: those.
        plan: of the merge.
        trained: the weights of the training; None if there are no others than the base's own, or not at hand.
        plan_trained: the adapter's plan for them.
        missing: why they are not at hand.
    """

    def __init__(
        self,
        start: Start,
        base: BaseCheckpoint,
        plan: MergePlan,
        trained: BaseCheckpoint | None = None,
        plan_trained: MergePlan | None = None,
        missing: str | None = None,
    ) -> None:
        self.measures = start.method is not None and missing is None and (trained is not None or start.quantised)
        self.layers: list[LayerError] = []
        self._start, self._missing = start, missing
        self._base, self._plan = (base, plan) if trained is None or plan_trained is None else (trained, plan_trained)
        self._outputs = {output.place: output for output in self._plan.outputs}
        self._dora = False

    @classmethod
    def of(
        cls, start: Start, base: BaseCheckpoint, plan: MergePlan, file: AdapterFile, *, trust_remote_code: bool
    ) -> Drift:
        """What there is to compare a merge with."""
        try:
            trained = start.open_trained(trust_remote_code=trust_remote_code, heads=file.heads)
            return cls(
                start,
                base,
                plan,
                trained,
                None if trained is None else plan_merge(trained, file, None, other_base=True),
            )
        except CheckpointError as error:
            return cls(start, base, plan, missing=str(error))

    def add(self, output: OutputTensor, written: Tensor) -> None:
        """Note a tensor that is written as it is."""
        wanted = self._outputs.get(output.place)
        if not self.measures or output.change is None or output.parameter is None or wanted is None:
            return
        update = output.change.low_rank
        if update is None:
            return
        self._dora |= update.magnitude is not None
        trained = self._base.read(wanted.source.key)
        exact = exact_weight(wanted, trained)
        path = (output.place or output.parameter).removesuffix(".weight")
        self.layers.append(layer_error(path, trained, exact, written, transposed=output.transposed))

    def worst_first(self) -> list[LayerError]:
        """All layers."""
        return sorted(self.layers, key=lambda layer: -layer.error)

    def notes(self) -> list[str]:
        """What there is to say of the layers."""
        if self._missing is not None:
            return [
                f"How far this is from what was trained was not measured: the weights of the training "
                f"({self._start.method}) are not to be had here. {self._missing}"
            ]
        layers = self.worst_first()
        if self._start.onto != "original" or not layers:
            return []
        apart = _mean(layer.norms for layer in layers)
        norms = f"The norms of their rows differ by {apart:.2%}."
        if self._dora:
            norms = f"DoRA's rows keep the norms that were trained (within {apart:.0e}); only their directions differ."
        return [
            f"The adapter was trained on weights in {self._start.method}. Merged onto the original ones, its layers "
            f"are {_mean(x.error for x in layers):.1%} from what was trained (worst: {layers[0].path}, "
            f"{layers[0].error:.1%}). " + norms
        ]

    def logits(
        self, written: Path, bounded: bool, max_loss: float, *, trust_remote_code: bool
    ) -> tuple[LogitsReport | None, list[str]]:
        """Compare the predictions; or a note on why they cannot be.

        Args:
            written: the folder of the merged model, whole but for its name.
            bounded: whether more loss than `max_loss` is refused.
            max_loss: of the adapter's effect.
            trust_remote_code: run Python code that comes with the model.

        Raises:
            CheckpointError: it is.
        """
        try:
            merged = BaseCheckpoint(written, trust_remote_code=trust_remote_code, dequantise=True)
            vocabulary = getattr(self._base.model.config.get_text_config(), "vocab_size", None)
            if vocabulary is None:
                raise CheckpointError("the model's config.json has no vocab_size")
            ids = probe_rows(written, vocabulary, trust_remote_code=trust_remote_code)
            report = compare_logits(
                streamed_logits(self._base, merged_values(self._base, self._plan), ids),
                streamed_logits(merged, stored_values(merged), ids),
                streamed_logits(self._base, stored_values(self._base), ids),
            )
        except CheckpointError as error:
            return None, [f"The predictions were not compared: {error}"]
        if bounded and report.kl_effect > _NO_EFFECT and not report.loss <= max_loss:
            raise CheckpointError(
                f"Quantised again ({self._start.method}), the merged model is {100 * report.loss:.3g} % as far from "
                f"base and adapter as the base alone is (mean KL {report.kl_mean:.2g} of {report.kl_effect:.2g} nats); "
                f"{100 * max_loss:.3g} % is allowed. Nothing was written. Merge with --onto dequantised or onto the "
                "original weights, or allow more with --max-loss."
            )
        return report, []


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan
