"""Layers that serve many adapters at once: each token of a batch goes through the slot that its request was given.

A module is `slotted` in place, as `adapt` does it, when the first adapter that touches it arrives. It holds the slots'
tensors; which token goes where is said once per batch, for all layers, in a `Routing` that they share.

Shapes: T tokens, I in features, O out features, R rank, S slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from theodora import kernels
from theodora.autocast import autocast_dtype, without_autocast
from theodora.functional import dora_scale, wide_dtype
from theodora.kernels.base_weight import BaseWeight, dora_norms
from theodora.kernels.parts import SlottedWeights
from theodora.kernels.routed import Routes, routed_together, routes
from theodora.layers.adapt import cannot_adapt
from theodora.layers.base import AdapterLayer
from theodora.layers.base_weights import CONVOLUTION
from theodora.layers.kinds import is_conv1d, is_linear
from theodora.layers.swap import swap_class

if TYPE_CHECKING:
    from theodora.serve.slotted_group import SlottedGroup


@dataclass(frozen=True)
class SlotTensors:
    """What one adapter puts into one module's slot."""

    a_RI: Tensor
    """A, in the dtype of the module's products."""
    b_RO: Tensor
    """s·B, transposed, in the same dtype."""
    g_O: Tensor | None
    """m / ‖W + s·B·A‖, float32; None for LoRA."""

    @property
    def rank(self) -> int:
        """R."""
        return self.a_RI.shape[0]

    def tensors(self) -> list[Tensor]:
        """Those that there are."""
        return [t for t in (self.a_RI, self.b_RO, self.g_O) if t is not None]

    def map(self, change: Any) -> SlotTensors:
        """The same with `change` applied to each tensor."""
        return SlotTensors(change(self.a_RI), change(self.b_RO), None if self.g_O is None else change(self.g_O))


class Routing:
    """Where the tokens of the batch at hand go; shared by all slotted layers of a model."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.tokens: Routes | None = None
        """Of all tokens; None outside a batch, where every token is the base model's."""
        self.kept: Routes | None = None
        """Of the tokens that the output head sees, if it sees only those."""

    def set(self, slots_T: Tensor, kept_K: Tensor | None = None) -> None:
        """Route a batch: the slot of each token, and which tokens the output head sees."""
        self.tokens = routes(slots_T, self.slots)
        self.kept = self.tokens if kept_K is None else routes(slots_T[kept_K], self.slots)

    def clear(self) -> None:
        """End the batch."""
        self.tokens = self.kept = None


class SlottedLayer(AdapterLayer):
    """Mixed in before the module's own class by `slot`."""

    prefix = "Slotted"

    routing: Routing
    is_head: bool
    """Whether it is the output head, which may see some of the tokens only."""

    def begin_slots(self, routing: Routing, rank: int, is_head: bool) -> None:
        """Set up S empty slots of the given rank."""
        self.begin()
        self.routing, self.is_head = routing, is_head
        self._a_SRI = self._b_SRO = self._g_SO = None
        self.set_rank(rank)

    def end(self) -> None:
        """Undo `slot`."""
        super().end()
        for name in ("routing", "is_head", "_a_SRI", "_b_SRO", "_g_SO"):
            delattr(self, name)

    def set_rank(self, rank: int) -> None:
        """Make room for adapters of this rank."""
        (outputs, inputs), slots = self.current_weight.shape, self.routing.slots
        a = self._new(slots, rank, inputs)
        b = self._new(slots, rank, outputs)
        if self._a_SRI is not None and self._b_SRO is not None:
            held = self._a_SRI.shape[1]
            a[:, :held], b[:, :held] = self._a_SRI, self._b_SRO
        if self._g_SO is None and a.is_cuda:  # a CUDA graph keeps what it was captured with
            self._g_SO = self._ones()
        self._a_SRI, self._b_SRO = a, b  # last, when nothing can fail any more

    @property
    def rank(self) -> int:
        """The largest rank there is room for."""
        assert self._a_SRI is not None
        return self._a_SRI.shape[1]

    @property
    def product_dtype(self) -> torch.dtype:
        """Of the module's inputs and outputs."""
        return self.current_weight.dtype

    def fill(self, slot: int, tensors: SlotTensors | None) -> None:
        """Put an adapter into a slot, or empty it."""
        a, b = self._a_SRI, self._b_SRO
        assert a is not None
        assert b is not None
        if tensors is None:
            a[slot].zero_()
            b[slot].zero_()
        else:
            a[slot, : tensors.rank].copy_(tensors.a_RI, non_blocking=True)
            b[slot, : tensors.rank].copy_(tensors.b_RO, non_blocking=True)
            if tensors.rank < self.rank:
                a[slot, tensors.rank :].zero_()
                b[slot, tensors.rank :].zero_()
            if a.is_cuda and tensors.a_RI.is_cuda:  # they may be freed before this stream has read them
                for tensor in tensors.tensors():
                    tensor.record_stream(torch.cuda.current_stream(a.device))
        if tensors is not None and tensors.g_O is not None:
            if self._g_SO is None:
                self._g_SO = self._ones()
            self._g_SO[slot].copy_(tensors.g_O, non_blocking=True)
        elif self._g_SO is not None:
            self._g_SO[slot].fill_(1)

    def _routes(self) -> Routes | None:
        return self.routing.kept if self.is_head else self.routing.tokens

    def _ones(self) -> Tensor:
        shape = self.routing.slots, self.current_weight.shape[0]
        return torch.ones(*shape, dtype=wide_dtype(self.product_dtype), device=self.current_weight.device)

    def _new(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=self.product_dtype, device=self.current_weight.device)

    _a_SRI: Tensor | None
    _b_SRO: Tensor | None
    _g_SO: Tensor | None


def prepare_slots(
    layers: Sequence[SlottedLayer],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    magnitudes: Sequence[Tensor] | None,
    scale: float,
) -> list[SlotTensors]:
    """What an adapter puts into a slot of each of several layers; g is computed here, once, from the wide factors.

    Args:
        layers: N of one shape and dtype.
        a: A of each, (R, I).
        b: B of each, (O, R).
        magnitudes: m of each, (O,); None for LoRA.
        scale: s of all.

    Returns:
        tensors on the layers' device; those of one kind share memory.
    """
    device, dtype = layers[0].current_weight.device, layers[0].product_dtype
    wide, g_NO = wide_dtype(dtype), None
    with torch.inference_mode(False), torch.no_grad():
        # (copies in any case: on a CPU the tensors could be the file itself, mapped, which others may write to)
        a_NRI, b_NOR = (torch.stack(list(ts)).to(device, wide) for ts in (a, b))
        if magnitudes is not None:
            norm_NO = _norms(layers, a_NRI, b_NOR, scale)
            g_NO = dora_scale(torch.stack(list(magnitudes)).to(device, wide), norm_NO)
            # An infinite norm would make a row of zeros, and nobody would know why.
            g_NO = torch.where(norm_NO.isfinite(), g_NO, torch.nan)
        # s goes in before rounding, so that it costs no precision.
        a_NRI, b_NRO = a_NRI.to(dtype), (scale * b_NOR).mT.to(dtype).contiguous()
        gs = [None] * len(layers) if g_NO is None else g_NO
        return [SlotTensors(*found) for found in zip(a_NRI, b_NRO, gs, strict=True)]


def _norms(layers: Sequence[SlottedLayer], a_NRI: Tensor, b_NOR: Tensor, scale: float) -> Tensor:
    """‖W + s·B·A‖ of each output row of each layer, (N, O)."""
    if len(layers) == 1 or not kernels.fast():
        return torch.stack([layer.new_norm(a, b, scale) for layer, a, b in zip(layers, a_NRI, b_NOR, strict=True)])
    norm_sq_NO = torch.stack([layer.weight_norm_squared() for layer in layers])
    return dora_norms([layer.current_weight for layer in layers], a_NRI, b_NOR, scale, norm_sq_NO)


class SlottedLinear(SlottedLayer):
    """y = g[slot] ⊙ (x Wᵀ + (x A[slot]ᵀ) (sB)[slot]) + bias, (…, T, O)."""

    group: SlottedGroup | None
    """Layers that read the same x."""

    def begin_slots(self, routing: Routing, rank: int, is_head: bool) -> None:
        """Set up S empty slots of the given rank."""
        self.group = None
        super().begin_slots(routing, rank, is_head)

    def end(self) -> None:
        """Undo `slot`."""
        super().end()
        del self.group

    def forward(self, x: Tensor) -> Tensor:
        """The product of each token with its own adapter; the module's own outside a batch."""
        to = self._routes()
        if to is None:
            return super().forward(x)
        dtype = autocast_dtype(x)
        if dtype is None:
            y = None if self.group is None else self.group.output(self, x, to)
            if y is not None:
                return y.view(*x.shape[:-1], y.shape[-1])
            return self._routed(x, to, self.current_weight, self.slotted_weights())
        with without_autocast(x.device):
            return self._routed(x.to(dtype), to, self.current_weight.to(dtype), self.slotted_weights().to(dtype))

    def _routed(self, x: Tensor, to: Routes, weight: BaseWeight, slots: SlottedWeights) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        (y,) = routed_together([weight.product(flat)], flat, [slots], to)
        return y.view(*x.shape[:-1], y.shape[-1])

    def slotted_weights(self) -> SlottedWeights:
        """What the slots hold, as the kernels take it."""
        assert self._a_SRI is not None
        assert self._b_SRO is not None
        return SlottedWeights(self._a_SRI, self._b_SRO, self._g_SO, self.bias)


class SlottedConv1D(SlottedLinear):
    """GPT-2's `Conv1D`: the same product from a transposed weight."""

    stored_transposed = True


class SlottedEmbedding(SlottedLayer):
    """Rows g[slot] ⊙ (W[token] + (sB)[slot] A[slot][token]), (…, T, O)."""

    stored_transposed = True

    def forward(self, input: Tensor) -> Tensor:
        """The row of each token with its own adapter; the module's own outside a batch."""
        rows = super().forward(input)
        to = self._routes()
        if to is None:
            return rows
        a, b, g = self._a_SRI, self._b_SRO, self._g_SO
        assert a is not None
        assert b is not None
        slots = to.slots_T
        a_rows = a[slots, :, input.reshape(-1)]
        if hasattr(self, "embed_scale"):  # the rows come scaled, and so must the update
            own: Any = self
            a_rows = a_rows * torch.as_tensor(own.embed_scale).to(rows)
        with without_autocast(input.device):
            y = rows.reshape(-1, rows.shape[-1]) + torch.bmm(a_rows[:, None], b[slots])[:, 0]
        if g is not None:
            y = (y * g[slots]).to(rows.dtype)
        return y.view_as(rows)


def slot(module: nn.Module, routing: Routing, rank: int, is_head: bool = False) -> SlottedLayer:
    """Turn `module` into a slotted layer in place; one that is gets room for the rank.

    Raises:
        TypeError: the module cannot be adapted (see `cannot_adapt`).
    """
    if isinstance(module, SlottedLayer):
        if module.rank < rank:
            module.set_rank(rank)
        return module
    if (reason := cannot_adapt(module)) is not None:
        raise TypeError(reason)
    if isinstance(module, CONVOLUTION):
        raise TypeError("convolutions are not supported in batches of several adapters; merge the adapter instead")
    kind = SlottedLinear if is_linear(module) else SlottedConv1D if is_conv1d(module) else SlottedEmbedding
    swap_class(module, kind)
    assert isinstance(module, SlottedLayer)
    try:
        module.begin_slots(routing, rank, is_head)
    except BaseException:  # no memory, say: what has no slots must not be asked for them
        module.end()
        raise
    return module
