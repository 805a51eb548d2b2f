"""Rows of single tokens in an adapter's file (PEFT's trainable tokens).

base_model.model.<path>.token_adapter.trainable_tokens_delta    (N, O): the rows themselves, not what is added
adapter_config.json: trainable_token_indices    token ids, or name of the module -> token ids
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from theodora.paths import matches

DELTA = "token_adapter.trainable_tokens_delta"
BASE_COPY = ".token_adapter.base_layer."


@dataclass(frozen=True)
class RowTensors:
    """The rows that a file holds for one module."""

    ids: tuple[int, ...]
    rows: Tensor
    """(N, O)."""

    def same_as(self, other: RowTensors | None) -> bool:
        """Whether both are the same rows of the same tokens."""
        return other is not None and self.ids == other.ids and torch.equal(self.rows, other.rows)

    def put_into(self, w_VO: Tensor) -> Tensor:
        """The whole weight with these rows, (V, O)."""
        ids = torch.tensor(self.ids, device=w_VO.device)
        return w_VO.index_copy(0, ids, self.rows.to(w_VO))


def file_rows(
    deltas: Mapping[str, Tensor], indices: Mapping[str, Sequence[int]] | Sequence[int]
) -> tuple[dict[str, RowTensors], list[str]]:
    """Module path -> rows, from the tensors of a file and what its configuration says of them; and what is wrong."""
    rows: dict[str, RowTensors] = {}
    problems: list[str] = []
    for path, tensor in deltas.items():
        ids = tuple(_ids_of(path, indices))
        if not ids:
            problems.append(f"{path}: holds rows of tokens that trainable_token_indices does not name")
        elif tensor.ndim != 2 or len(tensor) != len(ids):
            problems.append(f"{path}: rows {tuple(tensor.shape)}; expected {len(ids)}, one for each token")
        elif len(set(ids)) < len(ids):
            problems.append(f"{path}: trainable_token_indices names a token twice")
        else:
            rows[path] = RowTensors(ids, tensor)
    if indices and not deltas:
        problems.append("trainable_token_indices is set, but the file holds no rows of tokens")
    return rows, problems


def _ids_of(path: str, indices: Mapping[str, Sequence[int]] | Sequence[int]) -> Sequence[int]:
    if not isinstance(indices, Mapping):
        return indices
    return next((ids for name, ids in indices.items() if matches((name,), path)), ())
