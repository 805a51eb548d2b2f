"""When a batch does not fit into the GPU's memory: the same step in smaller pieces.

transformers has `auto_find_batch_size` for this. It begins the run again with batches nine tenths as large, on whatever
the weights have become, and leaves accumulation as it is: fewer rows in each step, another course of training, and not
a word about it. Here the optimizer step at hand begins anew, each of its batches in two passes. Every pass divides its
loss by the tokens of the whole step, so the sum of the gradients is the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from theodora.adapters.quantized import quantization_of
from theodora.adapters.state import adapter_layers
from theodora.config import TrainConfig
from theodora.data.packing import packed_batch
from theodora.layers import base_weight
from theodora.train.fused_loss import LEARNED, SelectLearned
from theodora.train.in_step import InStep, first_line, let_go
from theodora.train.pairs import DIVERGENCE, OF_SEQUENCES, OF_TOKENS, ROWS, TOGETHER, count_of
from theodora.train.processes import OtherFailed
from theodora.train.progress import as_size

Inputs = dict[str, Any]
_NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Of a weight, with its share of the scales and of theirs."""
_OF_ANOTHER = "in another process"
_NO_SMALLER = "Another process has run out of memory with a batch that cannot be halved."
_REAL = "real"
"""Of `Learned`, among the tensors of a batch while it is cut."""
_KEPT = (TOGETHER, DIVERGENCE)
"""What all parts of a batch have."""
_FEW = 8
"""Tokens of a pass that is run for other processes alone."""


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
        self.parts = 1
        """Those of the batch at hand, which may have too few rows for so many."""
        self.advice = ""
        """A sentence: what would let the batch fit as it is."""
        self.in_step: InStep | None = None
        """Runs the passes of several processes with sharded weights, which halve together; others do so each by itself.
        """
        self._batches: list[Inputs] = []

    def __call__(self, inputs: Inputs, *args: Any) -> Tensor:
        """Run a batch; if memory runs out, run the whole step as far as it has come again, in smaller pieces."""
        self._batches.append(dict(inputs))
        loss, message = self._tried([inputs], *args)
        while loss is None:
            # (_tried has left its except block, because the error's traceback holds on to the tensors of that pass.)
            if not self._can_halve(message is not None):
                raise torch.OutOfMemoryError(message) if message is not None else OtherFailed(_NO_SMALLER)
            self.count *= 2
            self.say(
                f"Out of memory ({message or _OF_ANOTHER}) Each batch now takes {self.count} passes of a "
                f"{'half' if self.count == 2 else f'{self.count}th'} of its rows, as if gradient_accumulation_steps "
                f"were {self.count} times as many: the same steps, more slowly. {self.advice}".rstrip()
            )
            self.start_over()
            let_go()
            loss, message = self._tried(self._batches, *args)
        return loss

    def end_step(self) -> None:
        """The optimizer takes the step."""
        self._batches = []

    def _tried(self, batches: list[Inputs], *args: Any) -> tuple[Tensor | None, str | None]:
        """The last batch's loss; None if memory has run out, and why, if it has done so here."""
        if self.in_step is not None:
            return self._tried_in_step(self.in_step, batches, *args)
        try:
            return [self._in_pieces(batch, *args) for batch in batches][-1], None
        except torch.OutOfMemoryError as error:
            return None, first_line(error)

    def _in_pieces(self, inputs: Inputs, *args: Any) -> Tensor:
        if self.count == 1:
            return self.run(inputs, *args)
        pieces = split(inputs, self.count)
        self.parts = len(pieces)
        losses = [self.run(dict(piece), *args) for piece in pieces]
        return torch.stack(losses).sum()

    def _tried_in_step(self, in_step: InStep, batches: list[Inputs], *args: Any) -> tuple[Tensor | None, str | None]:
        """The same with as many passes in every process, whatever rows it has, and wherever memory runs out."""
        message, losses = None, []
        for batch in batches:
            pieces, losses = split(batch, self.count), []
            self.parts = len(pieces)
            for number in range(self.count):
                idle = message is not None or number >= len(pieces)
                piece = few_of(batch) if idle else pieces[number]
                loss, found = in_step(lambda piece: self.run(piece, *args), piece, idle=idle)
                message = message or found
                if loss is not None and not idle:
                    losses.append(loss)
        if in_step.processes.highest(int(message is not None)):
            return None, message
        return torch.stack(losses).sum(), None

    def _can_halve(self, ran_out: bool) -> bool:
        """Whether there are smaller pieces; of several processes in step, in all that have run out of memory."""
        can = any(len(split(batch, 2 * self.count)) > self.count for batch in self._batches)
        return can if self.in_step is None else not self.in_step.processes.highest(int(ran_out and not can))


def memory_advice(config: TrainConfig, model: PreTrainedModel) -> str:
    """What a run could say that leaves more memory for its batch: a sentence, or nothing.

    Args:
        config: with every choice made.
        model: with its adapter, whose frozen weights tell what there is to save.
    """
    ways: list[str] = []
    if config.trains_all:
        ways.append("an adapter (--method dora), which keeps no optimizer's state of frozen weights")
    elif quantization_of(model) is None:
        sizes = [
            base_weight(layer).shape for layer in adapter_layers(model).values() if not isinstance(layer, nn.Embedding)
        ]
        saved = sum(map(math.prod, sizes)) * (model.dtype.itemsize - _NF4_BYTES)
        ways.append(f"--quantize nf4, the frozen weights in a quarter ({as_size(saved)} less)")
    if not config.gradient_checkpointing:
        ways.append("--gradient-checkpointing, activations computed twice (about a third slower)")
    return f"What makes room: {'; '.join(ways)}." if ways else ""


def said_of_pieces(counts: list[int]) -> list[str]:
    """What a run's end says of the passes that each batch took, in each process."""
    most = max(counts)
    if most == 1:
        return []
    where = "" if min(counts) == most else f" in process {', '.join(str(n) for n, c in enumerate(counts) if c == most)}"
    return [f"for want of memory each batch took {most} passes{where}"]


def split(inputs: Inputs, pieces: int) -> list[Inputs]:
    """A batch as `pieces` batches that have its rows between them; fewer where it has fewer rows."""
    ids, together = inputs["input_ids"], inputs.get(TOGETHER, 1)
    real = inputs.get(LEARNED, {}).get("real")
    whole = inputs if real is None else {**inputs, _REAL: real}
    if ids.shape[0] > 1:
        parts = [
            _rows(whole, slice(rows.start * together, rows.stop * together))
            for rows in _slices(ids.shape[0] // together, pieces)
        ]
    else:
        parts = _documents(whole, pieces)
    if len(parts) == 1:
        return [inputs]
    parts = [_told_anew(part, inputs) for part in parts]
    if TOGETHER in inputs:
        total = inputs[ROWS]
        for part in parts:
            total -= (few := min(total, _rows_learned(part, together)))
            part[ROWS] = few
    if LEARNED in inputs:
        left = inputs[LEARNED]["tokens"]  # to which what fills up the last part does not belong
        for part in parts:
            left -= (own := min(left, part[LEARNED]["tokens"]))
            part[LEARNED]["tokens"] = own
    return parts


def in_parts(run: Callable[[Inputs], Tensor], batch: Inputs) -> list[Tensor]:
    """What is computed of a batch: of all of it, or of its halves where memory does not last for it."""
    try:
        return [run(batch)]
    except torch.OutOfMemoryError:
        parts = split(batch, 2)
        if len(parts) == 1:
            raise
    # Outside the handler, which holds what did not fit.
    return [result for part in parts for result in in_parts(run, part)]


def few_of(inputs: Inputs) -> Inputs:
    """A few tokens of a batch, of which nothing is learned."""
    shape = inputs["input_ids"].shape
    part = {
        name: value[:1, :_FEW] if isinstance(value, Tensor) and value.shape == shape else value
        for name, value in inputs.items()
        if name != LEARNED
    }
    whole = packed_batch([part["input_ids"][0]])  # whose bounds of sequences are others
    part |= {name: value for name, value in whole.items() if name in part and name != "attention_mask"}
    few = _told_anew({**part, "labels": torch.full_like(part["labels"], -100)}, inputs)
    if LEARNED in few and few[LEARNED]["real"] is not None:
        few[LEARNED]["real"] = torch.ones_like(few[LEARNED]["real"])  # a mean over no token would be none
    return few


def _told_anew(part: Inputs, inputs: Inputs) -> Inputs:
    """A part of a batch with what the host is to know of it, if it was told so of the whole."""
    if LEARNED not in inputs:
        return part
    told = inputs[LEARNED]
    device, with_bounds, with_real = told["targets"].device, told["bounds"] is not None, told["real"] is not None
    real, part = part.get(_REAL), _without(part, _REAL)
    part = SelectLearned(lambda _: part, with_bounds=with_bounds, with_real=with_real)([])
    if real is not None:  # what fills up the whole fills up a part
        part[LEARNED]["real"] = real
    part[LEARNED] |= {name: value.to(device) for name, value in part[LEARNED].items() if isinstance(value, Tensor)}
    if "sequences" in inputs[LEARNED]:
        count = part[LEARNED]["sequences"] = count_of(part, inputs.get(TOGETHER, 1))
        for name in {*OF_SEQUENCES} & part.keys():  # zeros for what fills up
            part[name] = F.pad(part[name], (0, count - len(part[name])))
    return part


def _rows_learned(part: Inputs, together: int) -> int:
    """How many rows of a part that was padded, or made of one row, have something to learn."""
    learned = part["labels"] != -100
    if learned.shape[0] > 1 or "position_ids" not in part:
        return int(learned.any(1).view(-1, together).any(1).sum())
    number = (part["position_ids"][0] == 0).cumsum(0) - 1
    return len((number[learned[0]] // together).unique())


def _without(inputs: Inputs, name: str) -> Inputs:
    return {other: value for other, value in inputs.items() if other != name}


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
    every, starts = starts, starts[:: inputs.get(TOGETHER, 1)]
    length = positions.shape[1]
    real = int(inputs[_REAL].sum()) if _REAL in inputs else length
    starts = [start for start in starts if start < real]  # no part is of nothing but what fills the row up
    bounds = sorted({0, *(min(starts, key=lambda s: abs(s - real * n / pieces)) for n in range(1, pieces) if starts)})
    spans = [slice(begin, end) for begin, end in zip(bounds, [*bounds[1:], length], strict=True)]
    if len(spans) == 1:
        return [inputs]
    parts: list[Inputs] = []
    for span in spans:
        names = ("input_ids", "labels", "position_ids", _REAL, *OF_TOKENS)
        part = {name: inputs[name][:, span] for name in names if name in inputs}
        own = [n for n in (positions[0, span] == 0).nonzero().squeeze(1).tolist() if n] + [span.stop - span.start]
        whole = packed_batch([*part["input_ids"][0].tensor_split(own[:-1])])
        first, last = (sum(start < bound for start in every) for bound in (span.start, span.stop))
        part |= {name: inputs[name][first:last] for name in {*OF_SEQUENCES} & inputs.keys()}
        kept = {name: inputs[name] for name in _KEPT if name in inputs}
        parts.append({**{name: value for name, value in whole.items() if name in inputs}, **part, **kept})
    return parts
