"""What all adapted modules share: their weight, named adapters, the norm, merging.

Shapes: I in features, O out features, R rank, V vocabulary. An `AdapterLayer` sees its weight as (O, I), however the
module stores it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from theodora import kernels
from theodora.functional import dora_norm, merged_weight, wide_dtype
from theodora.kernels.base_weight import BaseWeight
from theodora.kernels.recompute import once_in_a_block
from theodora.kernels.sharded_weight import forget_shard, is_sharded, put_back, replace_shard
from theodora.layers import libraries, packed
from theodora.layers.base_weights import stored_transposed, weight_in
from theodora.layers.float8 import move
from theodora.layers.low_rank import LowRank
from theodora.layers.norm_cache import DecodeTensors, InferenceTensors, NormCache
from theodora.layers.swap import Swapped, check_reachable, swap_back


class AdapterLayer(Swapped):
    """Mixed in before the module's own class by `adapt`; the class's `forward` stays reachable through `super()`."""

    prefix = "Adapted"
    stored_transposed: ClassVar[bool] = False
    """Whether the module stores its weight as (I, O)."""

    weight: nn.Parameter
    """As the module stores it; while an adapter is merged, the merged one."""
    bias: nn.Parameter | None
    adapters: nn.ModuleDict
    active_adapter: str | None
    merged_adapter: str | None
    norm_cache: NormCache
    # While merged. In a tuple, because nn.Module would register a bare Parameter.
    _set_aside: tuple[nn.Parameter] | None

    def begin(self) -> None:
        """Set up an adapter layer without adapters; its class's `__init__` has run long ago."""
        packed.begin(self)
        self.adapters = nn.ModuleDict().train(self.training)
        self.active_adapter = self.merged_adapter = self._set_aside = None
        self.norm_cache = NormCache()

    def end(self) -> None:
        """Undo `adapt`: the module is of its own class again, and its adapters are gone.

        Raises:
            ConfigError: another library has put a class of its own on top; nothing was changed.
        """
        check_reachable([("this module", self)], AdapterLayer)
        self.unmerge()
        for name in ("adapters", "active_adapter", "merged_adapter", "norm_cache", "_set_aside"):
            delattr(self, name)
        swap_back(self, AdapterLayer)
        packed.end(self)

    # The weight

    parameter_name: str = "weight"
    """Of the base weight, where it is a parameter of `holder`."""

    @property
    def holder(self) -> nn.Module:
        """The module whose weight it is, and whose class was changed."""
        return self

    def put_weight(self, parameter: nn.Parameter) -> None:
        """Let the module compute with another parameter."""
        self.weight = parameter

    @property
    def current_weight(self) -> BaseWeight:
        """What the module multiplies by: the merged weight while an adapter is merged, else the base weight."""
        tensor = self._parameters.get("weight")
        tensor = libraries.held_weight(self) if tensor is None else tensor
        return weight_in(self, tensor, self.stored_transposed)

    @property
    def base_weight(self) -> BaseWeight:
        """The base weight, also while an adapter is merged."""
        return weight_in(self, self.base_parameter, self.stored_transposed)

    @property
    def base_parameter(self) -> nn.Parameter:
        """The base weight as the module stores it, also while an adapter is merged."""
        return self.weight if self._set_aside is None else self._set_aside[0]

    def as_stored(self, w_OI: Tensor) -> Tensor:
        """A view of a matrix (O, I) in the shape in which the module stores its weight."""
        return w_OI.mT if self.stored_transposed else w_OI

    # Its adapters

    def add_adapter(self, name: str, adapter: LowRank) -> None:
        """Hold `adapter` under `name`, inactive until asked for."""
        self.norm_cache.invalidate()
        self.adapters[name] = adapter.train(self.training)

    @property
    def active(self) -> LowRank | None:
        """The adapter that `forward` uses: none while disabled, and none while one is merged."""
        name = self.active_adapter
        if name is None or self.merged_adapter is not None or name not in self.adapters:
            return None
        return self.adapters[name]  # pyright: ignore[reportReturnType]

    # The norm

    def norm(self, adapter: LowRank, one_token: bool = False) -> Tensor:
        """‖W + s·B·A‖ of each output row, (O,).

        Where gradients flow it is computed anew in every forward pass, from the ‖W‖² computed once.
        """
        ready = None if torch.is_grad_enabled() else self.inference_tensors(adapter, one_token)
        if ready is None or ready.norm_O is None:
            return self.new_norm(*adapter.factors(), adapter.scale)
        return ready.norm_O

    def new_norm(self, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        """‖W + s·B·A‖ of each output row, (O,), float32 or float64, computed now."""
        weight, w_norm_sq = self.current_weight, self.weight_norm_squared()
        return once_in_a_block(("norm", id(self)), lambda: norm_of(weight, a_RI, b_OR, scale, w_norm_sq))

    def weight_norm_squared(self) -> Tensor:
        """‖W‖² of each output row, (O,): computed once for each frozen weight."""
        weight = self.current_weight
        compute = partial(_number_a_row, weight) if weight.device.type == "meta" else weight.norm_squared
        return self.norm_cache.weight_norm_squared(weight, compute)

    def inference_tensors(self, adapter: LowRank, one_token: bool) -> InferenceTensors | None:
        """What a pass without gradients need not compute again, see `NormCache.get`."""
        compute = partial(self._for_inference, adapter)
        return self.norm_cache.get(self.active_adapter, self.current_weight, adapter, compute, one_token)

    def renew_inference_tensors(self) -> None:
        """After a write to an adapter's tensors: see `NormCache.renew`."""
        adapter = self.active
        if adapter is None:
            self.norm_cache.invalidate()
            return
        compute = partial(self._for_inference, adapter)
        self.norm_cache.renew(self.active_adapter, self.current_weight, adapter, compute)

    def _for_inference(self, adapter: LowRank) -> tuple[Tensor | None, DecodeTensors | None]:
        norm = None if adapter.magnitude is None else self.new_norm(*adapter.factors(), adapter.scale)
        return norm, self._decode_tensors(adapter, norm)

    def _decode_tensors(self, adapter: LowRank, norm_O: Tensor | None) -> DecodeTensors | None:
        """What `theodora.kernels.decode` reads of the adapter, if it can run this layer."""
        return None

    # Merging

    def merged_weight(self, name: str) -> Tensor:
        """The dense weight of base and adapter together, (O, I), float32 or float64, without gradient."""
        adapter: Any = self.adapters[name]
        with torch.no_grad():
            a, b = adapter.factors()
            return merged_weight(self.current_weight.dense(), a, b, adapter.scale, adapter.magnitude)

    def merge(self, name: str) -> None:
        """Put the merged weight in place of the base weight, which is set aside, bit for bit, for `unmerge`.

        A new Parameter takes the place, so that a weight tied to this one is left as it was. A sharded one keeps its
        place, because `fully_shard` gathers what it knows, and every process has to call this.
        """
        merged, base = self.merged_weight(name).to(self.base_weight.dtype), self.weight
        self.norm_cache.invalidate()
        if is_sharded(base):
            base = replace_shard(base, self.as_stored(merged))
            self._set_aside, self.merged_adapter = (base,), name
            return
        self.put_weight(nn.Parameter(self.as_stored(merged).contiguous(), requires_grad=False))
        self._set_aside, self.merged_adapter = (base,), name

    def unmerge(self) -> None:
        """Put the very base weight back."""
        if self._set_aside is not None and is_sharded(self.weight):
            put_back(self.weight, self.base_parameter)
        elif self._set_aside is not None:
            self.put_weight(self.base_parameter)
        self.norm_cache.invalidate()
        self._set_aside = self.merged_adapter = None

    # As a module

    def train(self, mode: bool = True):  # noqa: D102
        self.norm_cache.invalidate()
        self.norm_cache.look_at(self.current_weight)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True):
        self.norm_cache.invalidate(weight=True)
        forget_shard(self)
        if self._set_aside is not None and not libraries.moved(self.base_parameter, fn):
            # The Parameter itself stays, because another module may be tied to it.
            self.base_parameter.data = move(fn, self.base_parameter.data)
        super()._apply(fn, recurse)
        libraries.follow(self)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.norm_cache.invalidate()
        super()._load_from_state_dict(*args, **kwargs)


def norm_of(weight: BaseWeight, a_RI: Tensor, b_OR: Tensor, scale: float, w_norm_sq_O: Tensor) -> Tensor:
    """‖W + s·B·A‖ of each output row, (O,), as an adapted layer of this weight computes it; `w_norm_sq_O` is ‖W‖²."""
    if not kernels.fast():
        return dora_norm(weight.dense(), a_RI, b_OR, scale, w_norm_sq_O)
    with torch.no_grad():
        return weight.dora_norm(a_RI.detach(), b_OR.detach(), scale, w_norm_sq_O)


def base_weight(module: nn.Module) -> BaseWeight:
    """The base weight of a module that is adapted or can be, also while an adapter is merged."""
    if isinstance(module, AdapterLayer):
        return module.base_weight
    transposed, tensor = stored_transposed(module), libraries.held_weight(module)
    assert transposed is not None
    assert isinstance(tensor, Tensor)
    return weight_in(module, tensor, transposed)


def start_norm(module: nn.Module, adapter: LowRank) -> Tensor:
    """‖W + s·B·A‖ of each output row, (O,), to the bit as the module will compute it once it is adapted.

    A magnitude that starts here makes g exactly 1, for as long as the update is zero or what it was.
    """
    weight = base_weight(module)
    if weight.device.type == "meta":
        return _number_a_row(weight)
    with torch.no_grad():
        return norm_of(weight, *adapter.factors(), adapter.scale, weight.norm_squared())


def _number_a_row(weight: BaseWeight) -> Tensor:
    """What a norm is on paper, (O,), without going through all pieces of W."""
    return torch.empty(weight.shape[:-1], dtype=wide_dtype(weight.dtype), device="meta")
