"""Rows of single tokens that an adapter brings in place of the base's: of an embedding, and of an output head.

PEFT calls them trainable tokens. The rows of all other tokens stay the base's, so that a new token costs one row rather
than a copy of the embedding. Where embedding and head share a weight, they share the rows, too.

Shapes: N tokens with rows of their own, O features, V vocabulary, T tokens of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theodora.layers.base import AdapterLayer
from theodora.layers.base_weights import FLOATS
from theodora.layers.kinds import is_embedding, is_linear
from theodora.layers.swap import Swapped, check_reachable, swap_back, swap_class


class TokenRows(nn.Module):
    """One adapter's rows of one weight: `ids` (N,), and `rows` (N, O), which replace the base's."""

    ids: Tensor

    def __init__(self, ids_N: Tensor, rows_NO: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids", ids_N, persistent=False)
        self.rows = nn.Parameter(rows_NO)

    def extra_repr(self) -> str:
        """How many rows, as `print(model)` shows it."""
        return f"{len(self.ids)} rows"

    def put_into(self, w_VO: Tensor) -> Tensor:
        """The whole weight with these rows, (V, O), in its dtype; differentiable in the rows."""
        return w_VO.index_copy(0, self.ids, self.rows.to(w_VO))


class TokenRowsLayer(Swapped):
    """An embedding or output head in which adapters have rows of their own; its base weight stays as it is."""

    prefix = "TokenRows"
    weight: nn.Parameter
    token_rows: nn.ModuleDict
    active_rows: str | None
    rows_merged: bool
    # While merged. In a tuple, because nn.Module would register a bare Parameter.
    _set_aside: tuple[nn.Parameter] | None

    def begin(self) -> None:
        """Set up a layer without rows; its class's `__init__` has run long ago."""
        self.token_rows = nn.ModuleDict()
        self.active_rows, self.rows_merged, self._set_aside = None, False, None

    def end(self) -> None:
        """Undo `add_rows`: the module is of its own class again, and its rows are gone.

        Raises:
            ConfigError: another library has put a class of its own on top; nothing was changed.
        """
        check_reachable([("this module", self)], TokenRowsLayer)
        self.unmerge_rows()
        for name in ("token_rows", "active_rows", "rows_merged", "_set_aside"):
            delattr(self, name)
        swap_back(self, TokenRowsLayer)

    @property
    def base_parameter(self) -> nn.Parameter:
        """The base weight, also while rows are merged."""
        return self.weight if self._set_aside is None else self._set_aside[0]

    @property
    def active_token_rows(self) -> TokenRows | None:
        """The rows that `forward` uses: none while the adapter is off or merged."""
        name = self.active_rows
        if name is None or self.rows_merged or name not in self.token_rows:
            return None
        return self.token_rows[name]  # pyright: ignore[reportReturnType]

    def merge_rows(self, weight: nn.Parameter) -> None:
        """Use `weight` in place of the base weight, which is set aside for `unmerge_rows`."""
        base, self.weight = self.weight, weight
        self._set_aside, self.rows_merged = (base,), True

    def unmerge_rows(self) -> None:
        """Put the very base weight back."""
        if self._set_aside is not None:
            self.weight = self.base_parameter
        self._set_aside, self.rows_merged = None, False

    def _apply(self, fn: Any, recurse: bool = True):
        if self._set_aside is not None:
            self.base_parameter.data = fn(self.base_parameter.data)
        return super()._apply(fn, recurse)


class EmbeddingWithRows(TokenRowsLayer):
    """Token ids (…) to rows (…, O)."""

    def forward(self, input: Tensor) -> Tensor:
        """The lookup, with the adapter's own rows where its tokens stand."""
        looked_up = super().forward(input)
        own = self.active_token_rows
        if own is None:
            return looked_up
        # place[i] is where the row of the i-th of the sorted ids stands.
        ids, place = own.ids.sort()
        at = torch.searchsorted(ids, input.contiguous()).clamp(max=len(ids) - 1)
        rows = F.embedding(place[at], own.rows.to(self.weight.dtype))
        if hasattr(self, "embed_scale"):
            rows = rows * torch.as_tensor(self.embed_scale).to(rows)
        return torch.where((ids[at] == input)[..., None], rows.to(looked_up.dtype), looked_up)


class HeadWithRows(TokenRowsLayer):
    """States (…, I) to logits (…, V)."""

    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """The logits, with those of the adapter's tokens from its own rows."""
        logits = super().forward(x)
        own = self.active_token_rows
        if own is None:
            return logits
        bias = None if self.bias is None else self.bias[own.ids]
        return logits.index_copy(-1, own.ids, F.linear(x, own.rows.to(self.weight.dtype), bias).to(logits.dtype))


def is_adapted(module: Any) -> bool:
    """Whether an adapter may change what `module` does: whoever reads its weight would pass the adapter by."""
    return isinstance(module, AdapterLayer | TokenRowsLayer)


def unmerged_weight(module: Any) -> Any:
    """The module's own weight, also while something is merged into it; by it modules are known to be tied."""
    return module.base_parameter if isinstance(module, AdapterLayer | TokenRowsLayer) else module.weight


def cannot_have_rows(module: nn.Module) -> str | None:
    """Why tokens cannot have rows of their own in `module`, or None if they can."""
    if isinstance(module, TokenRowsLayer):
        return None
    kind = type(module).__name__
    if isinstance(module, AdapterLayer):
        return "an adapter of low rank stands there already; a weight has one or the other"
    if not (is_embedding(module) or is_linear(module)):
        return f"{kind} is no plain embedding or linear layer"
    if "forward" in module.__dict__:
        return f"this {kind}'s forward method was replaced (by an offloading hook, say), and would pass the rows by"
    weight = module.weight
    if not isinstance(weight, Tensor) or type(weight.data) is not Tensor or weight.dtype not in FLOATS:
        return f"its weight is quantised or special ({type(weight).__name__}, {getattr(weight, 'dtype', 'no dtype')})"
    return None


def add_rows(module: nn.Module, name: str, rows: TokenRows) -> None:
    """Let `module` hold `rows` under `name`, inactive until asked for."""
    if not isinstance(module, TokenRowsLayer):
        swap_class(module, EmbeddingWithRows if isinstance(module, nn.Embedding) else HeadWithRows)
        assert isinstance(module, TokenRowsLayer)
        module.begin()
    module.token_rows[name] = rows


def drop_rows(layer: TokenRowsLayer, name: str) -> None:
    """Undo `add_rows`; without any rows the module is of its own class again."""
    if name in layer.token_rows:
        del layer.token_rows[name]
    if not len(layer.token_rows):
        layer.end()
