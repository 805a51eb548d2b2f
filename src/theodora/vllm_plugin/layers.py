"""vLLM's linear layers with LoRA, and a scale for each output row and slot: y = g ⊙ (x Wᵀ + s (x Aᵀ) Bᵀ) + bias.

Every slot has its g (float32) in one tensor of the layer, with a row of ones at the end for tokens without an adapter;
each token takes the row of its slot. Sizes and addresses never change, so CUDA graphs replay right whatever is loaded
later. Under tensor parallelism a layer holds g of its own output rows, cut as vLLM cuts B; where the input is cut
(row-parallel layers) ‖W + s·B·A‖² is summed over the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from theodora.functional import CANCELLED, dora_norm, dora_scale, factored_norm_squared, row_norm_squared

_ROW_NORMS = "theodora_row_norm_sq"
_UNIT_ROWS = 1024  # unit vectors that are multiplied at a time, to read a packed weight back


def note_row_norms(layer: Any) -> None:
    """Keep ‖W‖² of each output row with a layer whose weight is about to be packed away."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.device.type == "cpu" and weight.ndim == 2 and weight.numel():
        setattr(layer, _ROW_NORMS, row_norm_squared(weight.detach()))


def with_dora(classes: Sequence[type]) -> tuple[type, ...]:
    """vLLM's LoRA layer classes, in their order, those for whole linear layers with DoRA."""
    from vllm.lora import layers

    plain = (
        layers.ColumnParallelLinearWithLoRA,
        layers.MergedColumnParallelLinearWithLoRA,
        layers.MergedColumnParallelLinearVariableSliceWithLoRA,
        layers.QKVParallelLinearWithLoRA,
        layers.MergedQKVParallelLinearWithLoRA,
        layers.RowParallelLinearWithLoRA,
        layers.ReplicatedLinearWithLoRA,
    )
    missing = [cls.__name__ for cls in plain if cls not in classes]
    if missing:
        raise AttributeError(f"vLLM's list of LoRA layers lacks {', '.join(missing)}")
    made = {cls: type(cls.__name__.replace("WithLoRA", "WithDora"), (DoraLayer, cls), {}) for cls in plain}
    return tuple(made.get(cls, cls) for cls in classes)


class DoraLayer:
    """Mixed into vLLM's linear layers with LoRA, before them."""

    # vLLM's, of the class that this is mixed into.
    base_layer: Any
    punica_wrapper: Any
    lora_a_stacked: tuple[Tensor, ...]
    lora_b_stacked: tuple[Tensor, ...]
    output_slices: tuple[int, ...]
    n_slices: int
    tp_size: int
    device: Any

    dora_scales: Tensor
    """g of every slot, (slots + 1, O), float32; ones where there is no DoRA."""
    dora_unproved: str | None
    """Why it serves no DoRA, and leaves everything to vLLM's own forward pass; None: it was tried, and is right."""

    def create_lora_weights(self, max_loras: int, *args: Any, **kwargs: Any) -> None:
        """As vLLM does, and make the scales."""
        # vLLM 0.32's operators for the CPU look tokens without an adapter up in slot -1. Where the last slot was taken,
        # they got its adapter; one more slot, never taken, is there for them.
        spare = 1 if torch.device(self.device).type == "cpu" else 0
        super().create_lora_weights(max_loras + spare, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        self.dora_plain = self._has_plain_forward()
        self.dora_unproved = "it was not tried when the model was loaded"
        self.dora_scales = torch.ones(
            max_loras + 1, sum(self.output_slices), dtype=torch.float32, device=self.lora_b_stacked[0].device
        )

    def reset_lora(self, index: int) -> None:
        """As vLLM does, and put ones into the slot's scales."""
        super().reset_lora(index)  # pyright: ignore[reportAttributeAccessIssue]
        self.dora_scales[index] = 1

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """g ⊙ (x Wᵀ + s (x Aᵀ) Bᵀ) + bias, each token with its own adapter's."""
        if not self.dora_plain or self.dora_unproved is not None:
            return super().apply(x, bias)  # pyright: ignore[reportAttributeAccessIssue]
        z = self.base_layer.quant_method.apply(self.base_layer, x, None)
        z = self._apply_lora_to_output(x, z)  # pyright: ignore[reportAttributeAccessIssue]
        slots = self.dora_scales.shape[0] - 1
        # Static buffers, both; what a padded batch leaves behind its tokens may be anything.
        slot_T = self.punica_wrapper._token_lora_indices[: z.flatten(0, -2).shape[0]]
        slot_T = torch.where((slot_T < 0) | (slot_T > slots), slots, slot_T)
        y = (z * self.dora_scales[slot_T].view(z.shape)).to(z.dtype)
        return y if bias is None else y + bias.to(y.dtype)

    def unfit(self) -> str | None:
        """Why this layer cannot serve DoRA, if it cannot."""
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        method = getattr(self.base_layer, "quant_method", None)
        if type(method) is not UnquantizedLinearMethod:
            return (
                f"its base weight is quantised ({type(method).__name__}), and ‖W + s·B·A‖ of what the adapter was "
                "trained on is not to be had from it: serve the unquantised base"
            )
        if not self.dora_plain:
            return f"{type(self.base_layer).__name__} computes its output in its own way"
        if self.dora_unproved is not None:
            return f"the plug-in could not prove that it serves DoRA right in this vLLM: {self.dora_unproved}"
        return None

    def compute_scales(self, index: int, magnitudes: Tensor | list[Tensor | None], lora_id: int) -> list[Tensor | None]:
        """g of each slice of this layer (of this rank's part of it), float32, for the A and B that lie in a slot.

        Args:
            index: the slot.
            magnitudes: m of the whole layer, or of each of the layers packed into it, None for those not adapted.
            lora_id: the adapter's number in vLLM, the same on all ranks.

        Raises:
            RuntimeError: another rank is loading another adapter.
        """
        scales: list[Tensor | None] = []
        start = 0
        for number, (rows, m) in enumerate(zip(self.output_slices, self._local(magnitudes), strict=True)):
            if m is None:
                scales.append(None)
            else:
                norm = self.adapted_norm(slice(start, start + rows), number, index, lora_id)
                scales.append(dora_scale(m.to(norm), norm))
            start += rows
        return scales

    def set_scales(self, index: int, scales: Sequence[Tensor | None]) -> None:
        """Write g into a slot."""
        start = 0
        for rows, g in zip(self.output_slices, scales, strict=True):
            self.dora_scales[index, start : start + rows] = 1 if g is None else g.to(self.dora_scales)
            start += rows

    def _local(self, magnitudes: Tensor | list[Tensor | None]) -> list[Tensor | None]:
        """m of each slice, this rank's rows: cut as B is, which has the same rows."""
        self_: Any = self
        columns: Any
        if isinstance(magnitudes, Tensor):
            columns = magnitudes[:, None]
            if self.n_slices > 1:  # one adapter over several slices
                columns = list(columns.split(list(self.base_layer.output_sizes)))
        else:
            columns = [None if m is None else m[:, None] for m in magnitudes]
            if len(columns) != self.n_slices:
                columns = self_.expand_packed_lora(columns, columns)[1]
        if self.tp_size > 1:
            columns = self_.slice_lora_b(columns)
        columns = [columns] if isinstance(columns, Tensor) else columns
        return [None if column is None else column[:, 0] for column in columns]

    def adapted_norm(self, rows: slice, number: int, index: int, lora_id: int) -> Tensor:
        """‖W + s·B·A‖ of some output rows, float32; s is in B already. Of a row-parallel layer: over all ranks.

        Args:
            rows: of this rank's part of W.
            number: of the slice that they are.
            index: the slot.
            lora_id: the adapter's number in vLLM.

        Raises:
            RuntimeError: another rank is loading another adapter.
        """
        a, b = self.lora_a_stacked[number][index, 0].float(), self.lora_b_stacked[number][index, 0].float()
        weight = self.base_layer.weight
        norm = dora_norm(weight[rows], a, b, 1.0) if weight.numel() else self._packed_norm(rows, a, b)
        return self.over_all_ranks(norm, lora_id)

    def over_all_ranks(self, norm: Tensor, lora_id: int) -> Tensor:
        """The norm of whole rows, from that of this rank's part of them: where the input is cut, each has one.

        Raises:
            RuntimeError: another rank is loading another adapter.
        """
        if self.tp_size == 1:
            return norm
        from vllm.distributed import tensor_model_parallel_all_reduce
        from vllm.model_executor.layers.linear import RowParallelLinear

        if isinstance(self.base_layer, RowParallelLinear):
            sent = torch.cat([norm.square(), norm.new_tensor([lora_id, lora_id**2])]).float()
            *norm_sq, ids, squares = tensor_model_parallel_all_reduce(sent).split([len(norm), 1, 1])
            if float(ids) != self.tp_size * lora_id or float(squares) != self.tp_size * lora_id**2:
                raise RuntimeError(
                    f"Adapter {lora_id} is loaded here while another rank loads another: their norms were mixed up"
                )
            norm = norm_sq[0].sqrt()
        return norm

    def _packed_norm(self, rows: slice, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        """The same where W is packed away: W Aᵀ is what the layer gives for A as its input."""
        w_a = self._through_base(a_RI).T[rows]
        norm_sq, terms = factored_norm_squared(getattr(self.base_layer, _ROW_NORMS)[rows], w_a, a_RI, b_OR, 1.0)
        lost = norm_sq < CANCELLED * terms
        if bool(lost.any()):
            w = self._read_back(torch.arange(rows.start, rows.stop)[lost])
            norm_sq[lost] = (w.double() + b_OR[lost].double() @ a_RI.double()).square().sum(1).float()
        return norm_sq.clamp_min(0).sqrt()

    def rows_of_base(self, rows: Tensor) -> Tensor:
        """Some rows of W, (O, I), as it is stored or read back."""
        weight = self.base_layer.weight
        return weight[rows] if weight.numel() else self._read_back(rows)

    def _read_back(self, rows: Tensor) -> Tensor:
        """Rows of a packed W, (O, I): the layer's outputs for unit vectors are its columns."""
        size = self.lora_a_stacked[0].shape[-1]
        columns: list[Tensor] = []
        for at in torch.arange(size).split(_UNIT_ROWS):
            columns.append(self._through_base((at[:, None] == torch.arange(size)).float()).T[rows])
        return torch.cat(columns, dim=1)

    def _through_base(self, x_TI: Tensor) -> Tensor:
        dtype = self.lora_a_stacked[0].dtype
        return self.base_layer.quant_method.apply(self.base_layer, x_TI.to(dtype), None).float()

    def _has_plain_forward(self) -> bool:
        """Whether the wrapped layer is one of vLLM's own and does no more than multiply."""
        from vllm.model_executor.custom_op import maybe_get_oot_by_class
        from vllm.model_executor.layers import linear

        own = (
            linear.ColumnParallelLinear,
            linear.MergedColumnParallelLinear,
            linear.QKVParallelLinear,
            linear.RowParallelLinear,
            linear.ReplicatedLinear,
        )
        return type(self.base_layer) in {maybe_get_oot_by_class(cls) for cls in own}
