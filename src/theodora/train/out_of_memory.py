"""When a batch does not fit into the GPU's memory: the same step in smaller pieces.

transformers has `auto_find_batch_size` for this. It begins the run again with batches nine tenths as large, on whatever
the weights have become, and leaves accumulation as it is: fewer rows in each step, another course of training, and not
a word about it. Here the optimizer step at hand begins anew, each of its batches in two passes. Every pass divides its
loss by the tokens of the whole step, so the sum of the gradients is the same.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from theodora.adapters.quantized import quantization_of
from theodora.adapters.state import adapter_layers
from theodora.config import TrainConfig
from theodora.data.packing import packed_batch
from theodora.layers import base_weight
from theodora.train.fused_loss import LEARNED, SelectLearned
from theodora.train.progress import as_size

Inputs = dict[str, Any]
_NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Of a weight, with its share of the scales and of theirs."""


class Pieces:
    """Runs the batches of a step, in as many pieces as memory asks for.

    Args:
        run: the forward and backward pass of a batch -> its share of the step's loss.
        start_over: forgets the gradients and metrics of the step at hand, and lets go of memory.
        say: tells the user.
    """

    def __init__(
        self, run: Callable[..., Tensor], start_over: Callable[[], None], say: Callable[[str], None] = print
    ) -> None:
        self.run, self.start_over, self.say = run, start_over, say
        self.count = 1
        """Pieces of each batch."""
        self.advice = ""
        """A sentence: what would let the batch fit as it is."""
        self.halves = True
        """Whether to halve; several processes would have to do so together."""
        self._batches: list[Inputs] = []

    def __call__(self, inputs: Inputs, *args: Any) -> Tensor:
        """Run a batch; if memory runs out, run the whole step as far as it has come again, in smaller pieces."""
        self._batches.append(dict(inputs))
        try:
            return self._in_pieces(inputs, *args)
        except torch.OutOfMemoryError as error:
            message = (str(error).splitlines() or ["out of memory"])[0]
        # Outside the except block, because the error's traceback holds on to the tensors of the pass that failed.
        while self.halves and any(len(split(batch, 2 * self.count)) > self.count for batch in self._batches):
            self.count *= 2
            self.say(
                f"Out of memory ({message}) Each batch now takes {self.count} passes of a "
                f"{'half' if self.count == 2 else f'{self.count}th'} of its rows, as if gradient_accumulation_steps "
                f"were {self.count} times as many: the same steps, more slowly. {self.advice}".rstrip()
            )
            self.start_over()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            try:
                return [self._in_pieces(batch, *args) for batch in self._batches][-1]
            except torch.OutOfMemoryError as error:
                message = (str(error).splitlines() or ["out of memory"])[0]
        raise torch.OutOfMemoryError(message)

    def end_step(self) -> None:
        """The optimizer takes the step."""
        self._batches = []

    def _in_pieces(self, inputs: Inputs, *args: Any) -> Tensor:
        if self.count == 1:
            return self.run(inputs, *args)
        losses = [self.run(dict(piece), *args) for piece in split(inputs, self.count)]
        return torch.stack(losses).sum()


def memory_advice(config: TrainConfig, model: PreTrainedModel) -> str:
    """What a run could say that leaves more memory for its batch: a sentence, or nothing.

    Args:
        config: with every choice made.
        model: with its adapter, whose frozen weights tell what there is to save.
    """
    ways: list[str] = []
    if quantization_of(model) is None:
        sizes = [
            base_weight(layer).shape for layer in adapter_layers(model).values() if not isinstance(layer, nn.Embedding)
        ]
        saved = sum(map(math.prod, sizes)) * (model.dtype.itemsize - _NF4_BYTES)
        ways.append(f"--quantize nf4, the frozen weights in a quarter ({as_size(saved)} less)")
    if not config.gradient_checkpointing:
        ways.append("--gradient-checkpointing, activations computed twice (about a third slower)")
    return f"What makes room: {'; '.join(ways)}." if ways else ""


def split(inputs: Inputs, pieces: int) -> list[Inputs]:
    """A batch as `pieces` batches that have its rows between them; fewer where it has fewer rows."""
    ids = inputs["input_ids"]
    if ids.shape[0] > 1:
        parts = [_rows(inputs, rows) for rows in _slices(ids.shape[0], pieces)]
    else:
        parts = _documents(inputs, pieces)
    if len(parts) > 1 and LEARNED in inputs:
        device, with_bounds = inputs[LEARNED]["targets"].device, inputs[LEARNED]["bounds"] is not None
        parts = [SelectLearned(lambda _, part=part: part, with_bounds=with_bounds)([]) for part in parts]
        for part in parts:
            part[LEARNED] |= {
                name: value.to(device) for name, value in part[LEARNED].items() if isinstance(value, Tensor)
            }
    return parts


def _slices(length: int, pieces: int) -> list[slice]:
    bounds = [length * n // min(pieces, length) for n in range(min(pieces, length) + 1)]
    return [slice(begin, end) for begin, end in itertools.pairwise(bounds)]


def _rows(inputs: Inputs, rows: slice) -> Inputs:
    size = inputs["input_ids"].shape[0]
    return {
        name: value[rows] if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size else value
        for name, value in inputs.items()
        if name != LEARNED
    }


def _documents(inputs: Inputs, pieces: int) -> list[Inputs]:
    """The documents of one packed row, in as many rows."""
    positions = inputs.get("position_ids")
    if positions is None or "attention_mask" in inputs:
        return [inputs]
    # Only where nothing is learned across the bound.
    starts = ((positions[0] == 0) & (inputs["labels"][0] == -100)).nonzero().squeeze(1).tolist()
    length = positions.shape[1]
    bounds = sorted({0, *(min(starts, key=lambda s: abs(s - length * n / pieces)) for n in range(1, pieces) if starts)})
    spans = [slice(begin, end) for begin, end in zip(bounds, [*bounds[1:], length], strict=True)]
    if len(spans) == 1:
        return [inputs]
    parts: list[Inputs] = []
    for span in spans:
        part = {name: inputs[name][:, span] for name in ("input_ids", "labels", "position_ids")}
        own = [n for n in (positions[0, span] == 0).nonzero().squeeze(1).tolist() if n] + [span.stop - span.start]
        whole = packed_batch([*part["input_ids"][0].tensor_split(own[:-1])])
        parts.append({**{name: value for name, value in whole.items() if name in inputs}, **part})
    return parts
