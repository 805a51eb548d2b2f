"""Notes on tensors: what made a tensor, told to a later step over a model's own code that stands in between.

| note | on | written by | read by | void |
|---|---|---|---|---|
| norm | an RMSNorm's output | rms_norm.fast_forward | fused.NormedInput.of | once it was written to |
| output | the (T, O) that models see views of | fused.adapted_linears | fastpath/attention: rotary's input | likewise |
| turned | what rotary embeddings return | fastpath/attention | fastpath/attention: attention's input | likewise |

A note is an attribute of the very tensor, and nothing else in Theodora puts attributes on tensors. What a module in
between computes is another tensor without a note, and so is a view (except that `output_of` looks up a view of a whole
output): their readers take the usual way. That a tensor was written to shows in its version, which tensors of inference
mode do not have, and so get no notes. An `Output` goes on being looked at after it was read, and may be void later.

Legend: T tokens, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from theodora.kernels.residual import Remade

_NORM, _OUTPUT, _TURNED = "_theodora_norm", "_theodora_output", "_theodora_turned"

Remake = Callable[[], Tensor]
"""Makes a tensor once more."""


class Norm(NamedTuple):
    """How an RMSNorm made its output: y = x ⊙ r ⊙ (offset + weight)."""

    x_TI: Tensor | Remade
    """x, or the way to it."""
    rstd_T: Tensor
    """r = 1/√(mean(x²) + eps), float32 or float64."""
    weight_I: Tensor
    offset: float


class Output:
    """One output of a layer, and whether it is still what it was."""

    __slots__ = ("_read", "_version", "y_TO")

    def __init__(self, y_TO: Tensor, *, read_by_rotary: bool) -> None:
        # Not y itself, which holds this: they would keep each other alive. The version is that of both.
        self.y_TO, self._version = y_TO.detach(), y_TO._version
        self._read = not read_by_rotary

    def was_read(self) -> None:
        """Rotary embeddings that write to nothing have read it."""
        self._read = True

    @property
    def known(self) -> bool:
        """Whether nobody can have written to it."""
        return self._read and _unwritten(self.y_TO, self._version)


def note_norm(y: Tensor, norm: Norm) -> None:
    """Say how an RMSNorm made y, so that a layer that reads y need not keep it."""
    _write(y, _NORM, norm)


def norm_of(y: Tensor) -> Norm | None:
    """How an RMSNorm made y, if it did."""
    return _read(y, _NORM)


def note_output(y_TO: Tensor, output: Output) -> None:
    """Let whoever reads (a view of) y find its record."""
    _write(y_TO, _OUTPUT, output)


def output_of(view: Tensor) -> Output | None:
    """The record of the output that this is a view of, all of it."""
    base = view._base
    if base is None or view.numel() != base.numel():
        return None
    return _read(base, _OUTPUT)


def note_turned(turned: Tensor, again: Remake) -> None:
    """Say how to make a tensor again that was turned by rotary embeddings."""
    _write(turned, _TURNED, again)


def turned_again(tensor: Tensor) -> Remake | None:
    """How to make the tensor again, if it was turned."""
    return _read(tensor, _TURNED)


def _write(tensor: Tensor, name: str, note: Any) -> None:
    setattr(tensor, name, (note, tensor._version))


def _read(tensor: Tensor, name: str) -> Any:
    """The note, unless the tensor was written to since."""
    written: tuple[Any, int] | None = getattr(tensor, name, None)
    return written[0] if written is not None and _unwritten(tensor, written[1]) else None


def _unwritten(tensor: Tensor, version: int) -> bool:
    """Whether nobody has written to it since it had this version, as far as autograd sees."""
    return tensor._version == version
