"""States of the residual stream that are not kept, because what they were added up from is.

    h' = h + y,    y = g ⊙ (z + s·xa Bᵀ) + bias

A norm keeps h, DoRA's next output or down projection keeps z, and the norm after it would keep h': three tensors of a
size, of which two give the third, to the bit. So the second norm, and the layers that read its output, keep the way to
h' (`Remade`), and one pass in the backward makes it. The way may lead over a few states, each made once: of four states
one is kept, and DoRA keeps 32 MiB beyond the frozen model for each block of an 8B model at 8192 tokens, not 128. The
other way round, h' − h for y, would have h's rounding in it.

What was added up is read from autograd's graph: h' comes from an addition, one side of which is the very edge that the
norm before it read, and the other a layer's output, or a view of all of it. Whatever stands in between (dropout, a
scale, another kind of block) is another node, and h' is kept as ever; and so it is where it was written to.

Legend: T tokens, I features.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from theodora.kernels.shared_outputs import saves_through_hooks

_VIEWS = ("ViewBackward0", "UnsafeViewBackward0")
_LOCAL = threading.local()
_LONGEST = 3
"""States on the way to one: while blocks run backward, so many are there that would otherwise have been kept."""

Onto = Callable[[Any, Tensor], Tensor]
"""What a node of autograd's graph has as `output_onto`: gives residual + output once more, from what the node saved.

Beside it stands the output's dtype, as `output_dtype`. A node has it only where no hooks took what it saved.
"""


class Remade:
    """A state (T, I) that is made once more when its first reader asks, and let go by its last, the norm itself."""

    __slots__ = ("_norm", "_product", "_value", "depth", "dtype", "shape")

    def __init__(self, x: Tensor, norm: Any, product: Any) -> None:
        # Nodes of the graph that the reader's own node stands in: they live as long, and saved tensors know whether
        # somebody has written to them.
        self._norm, self._product, self._value = norm, product, None
        self.shape, self.dtype = x.shape, x.dtype
        self.depth: int = 1 if norm.remade is None else norm.remade.depth + 1
        """States that are made for this one, itself among them."""

    def get(self) -> Tensor:
        """The state."""
        if self._value is None:
            before = self._norm.saved_tensors[0] if self._norm.remade is None else self._norm.remade.get()
            self._value = self._product.output_onto(self._product, before.view(-1, before.shape[-1]))
        return self._value

    def take(self) -> Tensor:
        """The state, for the last time."""
        value, self._value = self.get(), None
        return value


def remade(x: Tensor) -> Remade | None:
    """How to make x, the input of a norm, once more, if the norm before it and a layer keep what it is the sum of."""
    norm: Any = getattr(_LOCAL, "norm", lambda: None)()
    node: Any = x.grad_fn
    if norm is None or node is None or node.name() != "AddBackward0" or x._version or saves_through_hooks():
        return None
    edges: list[Any] = list(node.next_functions)
    before = norm.next_functions[0]
    if before not in edges or node._saved_alpha != 1:
        return None
    edges.remove(before)
    product, output = edges[0]
    while product is not None and product.name() in _VIEWS:
        product, output = product.next_functions[0]
    if product is None or output or not getattr(product, "output_onto", None) or product.output_dtype != x.dtype:
        return None  # (under autocast half precision may be added to float32)
    kept: Tensor | Remade = norm.saved_tensors[0] if norm.remade is None else norm.remade
    long = isinstance(kept, Remade) and kept.depth >= _LONGEST
    return None if long or kept.shape != x.shape or kept.dtype != x.dtype else Remade(x, norm, product)


def read_by_norm(node: Any) -> None:
    """Let `remade` find the node of a norm that has just read the residual stream, which it has saved first."""
    # What hooks have taken (checkpointing, offloading) may be asked for once only, by the node itself.
    _LOCAL.norm = (lambda: None) if saves_through_hooks() else weakref.ref(node)
