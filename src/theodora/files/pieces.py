"""Parameters of experts as checkpoints store them: fused, one by one, or turned.

    experts.gate_up_proj                (E, O, I)     in the loaded model
    experts.3.gate_proj.weight          (O/2, I)      in the files of most models; Mixtral's are w1, w2 and w3
    experts.3.up_proj.weight            (O/2, I)

transformers declares how it makes one of the other as it loads (`conversion_mapping.py`). Each stored tensor is some
output rows of some experts, so that what an adapter does to it can be computed from it alone.

Shapes: E experts, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    dot_natural_key,
)


@dataclass(frozen=True)
class Piece:
    """What one stored tensor holds of a parameter (E, O, I)."""

    parameter: str
    rows: slice | Tensor
    """Which of the output rows, in this order."""
    expert: int | None = None
    """Whose; None: of all experts."""
    transposed: bool = False
    """Whether it is stored (I, O), or (E, I, O)."""

    @property
    def at(self) -> tuple[int | slice, slice | Tensor]:
        """Where that is in the parameter, and in what goes by its rows, (E, O)."""
        return (slice(None) if self.expert is None else self.expert, self.rows)

    def row(self, expert: int, output: int) -> tuple[int, ...] | None:
        """Where the tensor, not transposed, holds an output row of an expert; None if it does not."""
        if isinstance(self.rows, slice):
            found = [output - self.rows.start] if self.rows.start <= output < self.rows.stop else []
        else:
            found = (self.rows == output).nonzero().flatten().tolist()
        if not found or self.expert not in (None, expert):
            return None
        return (expert, found[0]) if self.expert is None else (found[0],)

    def put_into(self, whole_EOI: Tensor, stored: Tensor) -> None:
        """Write a stored tensor into its place in the parameter."""
        whole_EOI[self.at] = stored.mT if self.transposed else stored


def pieces_of(
    parameter: str,
    whole: Sequence[int],
    stored: Mapping[str, tuple[str, Sequence[int]]],
    converter: WeightConverter,
) -> dict[str, Piece]:
    """Key → what it holds of a parameter; nothing where it is converted in ways that are not known here.

    Args:
        parameter: its name in the model.
        whole: its shape, (E, O, I).
        stored: key → which of the converter's source patterns it matches, and its shape.
        converter: what makes the parameter of them.
    """
    if len(whole) != 3:
        return {}
    first, *more = converter.operations
    if isinstance(first, MergeModulelist) and first.dim == 0:
        return _one_by_one(parameter, whole, stored, converter, more)
    if len(stored) != len(converter.source_patterns):
        return {}
    if isinstance(first, Concatenate) and not more:
        return _beside(parameter, whole, stored, converter, first)
    (key, (_, shape)) = next(iter(stored.items()))
    if isinstance(first, Transpose) and not more and {first.dim0, first.dim1} == {1, 2}:
        turned = not (first.check_dims and tuple(shape) == tuple(whole))
        return _whole({key: Piece(parameter, slice(0, whole[1]), transposed=turned)}, stored, whole)
    if isinstance(first, Interleave) and not more and first.dim == 1 and whole[1] % 2 == 0:
        (order,) = first.convert({"": torch.arange(whole[1]).view(1, -1, 1)}, [""], [""]).values()
        return _whole({key: Piece(parameter, order.flatten().argsort())}, stored, whole)
    return {}


def _one_by_one(
    parameter: str,
    whole: Sequence[int],
    stored: Mapping[str, tuple[str, Sequence[int]]],
    converter: WeightConverter,
    more: Sequence[object],
) -> dict[str, Piece]:
    """A tensor for each expert, or one for its gate and one for its up."""
    joined = len(more) == 1 and isinstance(more[0], Concatenate) and more[0].dim == 1
    if more and not joined:
        return {}
    pieces: dict[str, Piece] = {}
    start = 0
    for pattern in converter.source_patterns:
        keys = sorted((key for key, (own, _) in stored.items() if own == pattern), key=dot_natural_key)
        if not keys:
            continue
        size = stored[keys[0]][1][0]
        pieces |= {key: Piece(parameter, slice(start, start + size), expert) for expert, key in enumerate(keys)}
        start += size
    return _whole(pieces, stored, whole)


def _beside(
    parameter: str,
    whole: Sequence[int],
    stored: Mapping[str, tuple[str, Sequence[int]]],
    converter: WeightConverter,
    joined: Concatenate,
) -> dict[str, Piece]:
    """All experts' gates in one tensor, all their ups in another."""
    if joined.dim != 1:
        return {}
    pieces: dict[str, Piece] = {}
    start = 0
    for key in sorted(stored, key=lambda key: converter.source_patterns.index(stored[key][0])):
        size = stored[key][1][1] if len(stored[key][1]) == 3 else 0
        pieces[key] = Piece(parameter, slice(start, start + size))
        start += size
    return _whole(pieces, stored, whole)


def _whole(
    pieces: dict[str, Piece], stored: Mapping[str, tuple[str, Sequence[int]]], whole: Sequence[int]
) -> dict[str, Piece]:
    """The pieces, if they make up the parameter: each row of each expert once, and shaped as they ought to be."""
    experts, outputs, inputs = whole
    held = torch.zeros(experts, outputs, dtype=torch.int64)
    for key, piece in pieces.items():
        rows = len(range(outputs)[piece.rows]) if isinstance(piece.rows, slice) else len(piece.rows)
        own = (rows, inputs)[:: -1 if piece.transposed else 1]
        if tuple(stored[key][1]) != ((experts, *own) if piece.expert is None else own):
            return {}
        if piece.expert is not None and piece.expert >= experts:
            return {}
        held[piece.at] += 1
    return pieces if bool((held == 1).all()) else {}
