"""What in a batch is not finite: marked token by token, told request by request.

One `Watch` goes with one cache of keys and values. What is written there stays finite (`kernels.finite`), so that no
request reads another's NaN: not from the same batch, and not from a page that was another's before.

N sequences, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from theodora.errors import TheodoraError
from theodora.kernels.finite import keep_finite

if TYPE_CHECKING:
    from theodora.serve.requests import Request


class OutputNotFinite(TheodoraError):
    """What the model computed for one request is no finite number, so that there is nothing to tell."""

    @classmethod
    def of(cls, request: Request, dtype: torch.dtype) -> OutputNotFinite:
        """The error of one request to a model of a dtype."""
        who = "The base model's output" if request.adapter is None else f"The output of {request.adapter.name!r}"
        return cls(
            f"{who} is not finite: it is NaN, or too large for {str(dtype).removeprefix('torch.')}. Other requests are "
            "not touched by it; another prompt may have an answer."
        )


class Watch:
    """The tokens of the batch at hand whose keys or values were not finite.

    Everything stays on the device, and in the same memory, so that it works within a CUDA graph.

    Args:
        most_tokens: tokens that a batch may have.
        device: where the model is.
    """

    def __init__(self, most_tokens: int, device: torch.device) -> None:
        self._not_finite_T = torch.zeros(most_tokens, dtype=torch.int32, device=device)
        self._starts: Tensor | None = None
        self._tokens = 0

    def begin(self, starts: Tensor, tokens: int) -> None:
        """A batch begins: where its sequences start (N + 1), and how many tokens there are, padding included."""
        self._starts, self._tokens = starts, tokens
        self._not_finite_T[:tokens].zero_()

    def keep_finite(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, (1, H, T, D) each, as they may be written where others read."""
        return keep_finite(key, value, self._not_finite_T)

    def not_finite(self) -> Tensor:
        """Which sequences have a token that was not finite, (N,) bool."""
        assert self._starts is not None
        counts = torch.zeros(self._tokens + 1, dtype=torch.int64, device=self._not_finite_T.device)
        torch.cumsum(self._not_finite_T[: self._tokens], 0, out=counts[1:])
        return counts[self._starts.long()].diff() > 0


def mask_with_infinity(mask: Any) -> None:
    """Put -inf, in place, where a mask of half precision has its largest negative number.

    That is -65504 in float16, and scores are summed up in float32: a key of another request, finite and large, would
    outweigh it.

    Args:
        mask: what is added to scores; or one for each kind of layer; or None.
    """
    for part in mask.values() if isinstance(mask, dict) else [mask]:
        if isinstance(part, Tensor) and part.dtype == torch.float16:
            part.masked_fill_(part < 0, -torch.inf)
