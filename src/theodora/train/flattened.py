"""The rows of a batch as one row, filled up to one of a few lengths: no padding is computed, and a CUDA graph fits.

Rows differ in length, so a batch that is padded to its longest row hardly ever has the shape of another, and its
kernels are launched one by one. Flattened, what a batch asks of the GPU depends on its number of tokens alone, which
varies little: a few lengths fit all. How many are worth it is a matter of what they cost (`choose`). Attention keeps
the rows apart by their bounds (see `packed_rows.py`).

Legend: B rows, T tokens of the batch, N learned tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from theodora.kernels.cross_entropy import IGNORED
from theodora.train.fused_loss import LEARNED, Learned, select_learned

_MULTIPLE = 64  # of T and N: what the tiles of products are made for
_BATCHES = 512  # drawn, to see how long batches are
_MOST = 12  # shapes; graphs share the memory of the largest, but each is captured by itself
_ROWS_AT_ONCE = 1000
# Of a GPU of today, where only the order of magnitude counts: what products reach, and how long the host takes to
# launch a layer's kernels, forwards and backwards, and to capture them.
_FLOPS, _SECONDS_A_LAYER, _SECONDS_A_CAPTURE = 4e14, 0.016, 0.1


@dataclass(frozen=True)
class Shape:
    """What batches are filled up to."""

    tokens: int
    """T."""
    learned: int
    """N, of which the loss is computed."""


@dataclass(frozen=True)
class Costs:
    """Of a run, in seconds, roughly."""

    token: float
    """Of a token that is computed for nothing."""
    shape: float
    """Of one more shape: its first batches, which run as they are, and the capture."""
    batches: int
    """Number of batches."""

    @classmethod
    def of(cls, parameters: int, layers: int, batches: int) -> Costs:
        """Costs of a model with so many parameters in matrix products, in so many layers."""
        return cls(4 * parameters / _FLOPS, _SECONDS_A_CAPTURE + _SECONDS_A_LAYER * layers, batches)


def lengths_of(rows: Dataset) -> tuple[Tensor, Tensor]:
    """Tokens of each row, and learned tokens (the first is not: nothing stands before it to predict it from), int64."""
    lengths: list[Tensor] = []
    learned: list[Tensor] = []
    for batch in rows.with_format("arrow").iter(_ROWS_AT_ONCE):
        labels: Any = batch["labels"].combine_chunks()  # pyright: ignore[reportArgumentType, reportCallIssue]
        each = torch.tensor(labels.value_lengths().to_numpy(zero_copy_only=False), dtype=torch.int64)
        flags = torch.tensor(labels.flatten().to_numpy(zero_copy_only=False)) != IGNORED
        ends = each.cumsum(0)
        flags[(ends - each)[each > 0]] = False
        before = F.pad(flags.cumsum(0), (1, 0))
        lengths.append(each)
        learned.append(before[ends] - before[ends - each])
    return torch.cat(lengths), torch.cat(learned)


def choose(lengths: Tensor, learned: Tensor, batch: int, costs: Costs) -> list[Shape]:
    """The shapes with which a run takes least time, shortest first.

    Args:
        lengths: tokens of each row, int64.
        learned: learned tokens of each row, int64.
        batch: rows of a batch, B.
        costs: of the run.
    """
    drawn = _drawn(lengths, learned, min(batch, len(lengths)))
    shapes: list[Shape] = []
    for tokens in _cheapest([t for t, _ in drawn], costs):
        shorter = shapes[-1].tokens if shapes else 0
        most = max(n for t, n in drawn if shorter < t <= tokens)
        shapes.append(Shape(tokens, min(tokens, _rounded(most))))
    return shapes


class Flatten:
    """A collator that makes one row of a batch's rows, filled up to a shape, and tells what `SelectLearned` tells."""

    def __init__(
        self,
        collate: Callable[[list[Any]], dict[str, Tensor]],
        shapes: Sequence[Shape],
        batch: int,
        with_real: bool = False,
    ) -> None:
        """Take what batches are made by, and what to make of them.

        Args:
            collate: makes one row of rows: input_ids, labels and position_ids, (1, T).
            shapes: those to fill up to, shortest first. A batch that fits into none stays as long as it is.
            batch: rows of a batch, at most.
            with_real: whether to tell which tokens are real.
        """
        self.collate, self.shapes, self.batch, self.with_real = collate, shapes, batch, with_real

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """The batch of these rows."""
        flat = self.collate(rows)
        ids, labels, positions = flat["input_ids"], flat["labels"], flat["position_ids"]
        tokens, learned = labels.shape[1], int((labels != IGNORED).sum())
        shape = next((s for s in self.shapes if tokens <= s.tokens and learned <= s.learned), None)
        length = tokens if shape is None else shape.tokens
        added = length - tokens
        # No more positions than the longest row has: the model may have an embedding of each.
        counted = torch.arange(added) % int(positions.max() + 1)
        labels = F.pad(labels, (0, added), value=IGNORED)
        bounds = self._bounds((positions[0] == 0).nonzero().squeeze(1), tokens, length)
        targets, chosen = select_learned(labels, None if shape is None else shape.learned)
        return {
            "input_ids": F.pad(ids, (0, added)),
            "labels": labels,
            "position_ids": torch.cat([positions, counted[None]], dim=1),
            LEARNED: Learned(
                targets=targets,
                positions=chosen,
                tokens=tokens,
                maskless=False,
                packed=True,
                bounds=bounds,
                longest=int(bounds.diff().max()),
                real=(torch.arange(length) < tokens)[None] if self.with_real else None,
            ),
        }

    def _bounds(self, starts: Tensor, tokens: int, length: int) -> Tensor:
        """Where each row begins, then what fills up, then rows of no token in the place of those that a short batch
        lacks: always as many, int32."""
        missing = max(0, self.batch - len(starts))
        return torch.cat([starts, starts.new_tensor([tokens] + [length] * (missing + 1))]).to(torch.int32)


def _rounded(count: int) -> int:
    return max(1, -(-count // _MULTIPLE)) * _MULTIPLE


def _drawn(lengths: Tensor, learned: Tensor, batch: int) -> list[tuple[int, int]]:
    """(T, N) of batches of rows in random orders, as epochs take them."""
    draw, count = torch.Generator().manual_seed(0), len(lengths)
    whole = count // batch  # batches of an epoch
    orders = [torch.randperm(count, generator=draw)[: whole * batch] for _ in range(math.ceil(_BATCHES / whole))]
    picked = torch.cat(orders).view(-1, batch)[:_BATCHES]
    return [(t, n) for t, n in torch.stack([lengths, learned])[:, picked].sum(2).T.tolist()]


def _cheapest(drawn: Sequence[int], costs: Costs) -> list[int]:
    """Lengths to fill up to, given those of some batches: by dynamic programming over where each of them begins."""
    sizes = sorted({_rounded(t) for t in drawn})
    by_size = [[t for t in drawn if _rounded(t) == size] for size in sizes]
    counts, sums = ([0, *accumulate(map(measure, by_size))] for measure in (len, sum))

    def cost(begin: int, end: int) -> float:
        """Of filling all batches of these sizes up to the largest of them."""
        added = sizes[end - 1] * (counts[end] - counts[begin]) - (sums[end] - sums[begin])
        return added / len(drawn) * costs.batches * costs.token + costs.shape

    ends = range(len(sizes) + 1)
    # For each number of lengths and of sizes: the least cost, and where the last length's sizes begin.
    best: list[list[tuple[float, int]]] = [[(0.0 if end == 0 else math.inf, 0) for end in ends]]
    for _ in range(min(_MOST, len(sizes))):
        before = best[-1]
        best.append(
            [min(((before[b][0] + cost(b, end), b) for b in range(end)), default=(math.inf, 0)) for end in ends]
        )
    number = min(range(1, len(best)), key=lambda n: best[n][-1][0])
    chosen, end = list[int](), len(sizes)
    for n in range(number, 0, -1):
        chosen.append(sizes[end - 1])
        end = best[n][end][1]
    return chosen[::-1]
