"""What all adapted modules share: named adapters, switching, the norm, merging.

Shapes: I in features, O out features, R rank, V vocabulary. An `AdapterLayer` sees its weight as (O, I), however the
module stores it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from theodora import kernels
from theodora.functional import dora_norm, merged_weight, row_norm_squared
from theodora.kernels.base_weight import BaseWeight
from theodora.kernels.float8 import FLOAT8, dequantized
from theodora.kernels.recompute import once_in_a_block
from theodora.kernels.weight_norm import dora_norm as kernel_dora_norm
from theodora.layers.base_weights import weight_in
from theodora.layers.float8 import Float8Layer, move, weight_scale
from theodora.layers.kinds import is_conv1d, is_embedding
from theodora.layers.norm_cache import Kept, content, remember, versions
from theodora.layers.swap import Swapped


class LowRank(nn.Module):
    """One adapter of one module: A (R, I), B (O, R), the magnitude (O,) if it is DoRA, and the scale s.

    `start_A` and `start_B` are set where training starts from factors of the weight itself (PiSSA, OLoRA). The update
    is then s·(B·A − B₀·A₀), zero at the start, and the base weight stays as it is.

    Dropout is a module, which people and libraries find, switch and replace as they are used to.
    """

    magnitude: nn.Parameter | None
    start_A: Tensor | None
    start_B: Tensor | None
    dropout: nn.Module

    def __init__(
        self,
        a_RI: Tensor,
        b_OR: Tensor,
        magnitude_O: Tensor | None,
        scale: float,
        dropout: float = 0.0,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(a_RI)
        self.lora_B = nn.Parameter(b_OR)
        self.register_parameter("magnitude", None if magnitude_O is None else nn.Parameter(magnitude_O))
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("start_A", None if start is None else start[0])
        self.register_buffer("start_B", None if start is None else start[1])

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_A.shape[0]

    @property
    def start(self) -> tuple[Tensor, Tensor] | None:
        """The start factors."""
        return None if self.start_A is None or self.start_B is None else (self.start_A, self.start_B)

    @property
    def drops(self) -> bool:
        """Whether dropout changes the adapter's input now."""
        return drops(self.dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The whole update as two factors: A (R, I) and B (O, R), or (2R, I) and (O, 2R) with start factors."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], dim=1)

    def extra_repr(self) -> str:
        """Method, rank and scale, as `print(model)` shows them."""
        method = "LoRA" if self.magnitude is None else "DoRA"
        return f"{method}, rank={self.rank}, scale={self.scale:g}"


def drops(dropout: nn.Module) -> bool:
    """Whether a dropout module, of whatever kind, changes what goes through it now."""
    return dropout.training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) > 0


class AdapterLayer(Swapped):
    """Mixed in before the module's own class by `adapt`; the class's `forward` stays reachable through `super()`."""

    prefix = "Adapted"
    stored_transposed: ClassVar[bool] = False
    """Whether the module stores its weight as (I, O)."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    adapters: nn.ModuleDict
    active_adapter: str | None
    merged_adapter: str | None

    @property
    def current_weight(self) -> BaseWeight:
        """What `forward` multiplies by: the base weight, or while an adapter is merged the merged one."""
        return weight_in(self, self.weight, self.stored_transposed)

    @property
    def weight_OI(self) -> Tensor:
        """The base weight (merged, while an adapter is merged), (O, I); W8 where `weight_scale_O` is given."""
        return self.weight.T if self.stored_transposed else self.weight

    @property
    def weight_scale_O(self) -> Tensor | None:
        """The scale of each row of a float8 weight."""
        return weight_scale(self)

    @property
    def base_weight_OI(self) -> Tensor:
        """The base weight, (O, I), also while an adapter is merged; a float8 one widened to float32."""
        weight = self.weight if self._base_weight is None else self._base_weight[0]
        return _plain(self, weight.T if self.stored_transposed else weight)

    @property
    def active(self) -> LowRank | None:
        """The adapter that `forward` uses: none while disabled, and none while one is merged."""
        name = self.active_adapter
        if name is None or self.merged_adapter is not None or name not in self.adapters:
            return None
        return self.adapters[name]  # pyright: ignore[reportReturnType]

    def norm(self, adapter: LowRank, one_token: bool = False) -> Tensor:
        """‖W + s·B·A‖ of each output row, (O,).

        Where gradients flow it is computed anew in every forward pass, from the ‖W‖² computed once. Otherwise it is
        kept, see `kept`.
        """
        kept = None if torch.is_grad_enabled() else self.kept(adapter, one_token)
        if kept is None or kept.norm_O is None:
            return self.new_norm(*adapter.factors(), adapter.scale)
        return kept.norm_O

    def kept(self, adapter: LowRank, one_token: bool) -> Kept | None:
        """What a pass without gradients need not compute again; made here where it is missing or out of date.

        torch.compile can make nothing, nor look at values or versions: there it is what earlier passes have left, for
        steps of one token, or None.
        """
        kept = self._kept
        if torch.compiler.is_compiling():
            return kept if one_token and kept is not None and kept.name == self.active_adapter else None
        tensors = self.weight, adapter.lora_A, adapter.lora_B, adapter.magnitude
        found, norm = (*versions(*tensors), adapter.scale), None
        current = kept if kept is not None and kept.versions == found else None
        if current is not None and one_token:
            return current
        values = None
        if adapter.magnitude is not None:
            values = content(*tensors, adapter.start_A, adapter.start_B)
            if current is not None and current.content == values:
                return current
            self._forget_a_changed_weight()
        with torch.inference_mode(False), torch.no_grad():
            if adapter.magnitude is not None:
                norm = self.new_norm(*adapter.factors(), adapter.scale)
            decode = self._decode_tensors(adapter, norm)
        if current is not None and current.decode is not None and decode is not None:
            # A recorded CUDA graph reads them where they are.
            decode = tuple(_rewritten(old, new) for old, new in zip(current.decode, decode, strict=True))
        return remember(self, Kept(self.active_adapter, found, values, norm, decode))

    def renew_kept(self) -> None:
        """After a write to an adapter's tensors: compute what is kept anew, in the memory where it lies.

        Compiled code and recorded CUDA graphs read it there, and cannot see that it is out of date.
        """
        old, adapter = self._kept, self.active
        if old is None or adapter is None or old.name != self.active_adapter:
            self._kept = None
            return
        with torch.inference_mode(False), torch.no_grad():
            norm = None if adapter.magnitude is None else self.new_norm(*adapter.factors(), adapter.scale)
            decode = self._decode_tensors(adapter, norm)
            if old.norm_O is not None and norm is not None:
                old.norm_O.copy_(norm)
            if old.decode is not None and decode is not None:
                old.decode = tuple(_rewritten(*pair) for pair in zip(old.decode, decode, strict=True))
            tensors = self.weight, adapter.lora_A, adapter.lora_B, adapter.magnitude
            old.versions = (*versions(*tensors), adapter.scale)
            if old.content is not None:
                old.content = content(*tensors, adapter.start_A, adapter.start_B)

    def _decode_tensors(self, adapter: LowRank, norm_O: Tensor | None) -> tuple[Any, ...] | None:
        """What `theodora.kernels.decode` reads of the adapter, if it can run this layer."""
        return None

    def new_norm(self, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        """‖W + s·B·A‖ of each output row, (O,), float32 or float64, computed now."""
        w_norm_sq = self.weight_norm_squared()
        return once_in_a_block(("norm", id(self)), lambda: _norm(self, self.weight_OI, a_RI, b_OR, scale, w_norm_sq))

    def begin(self) -> None:
        """Set up an adapter layer without adapters; its class's `__init__` has run long ago."""
        self.adapters = nn.ModuleDict().train(self.training)
        self.active_adapter = self.merged_adapter = None
        self._kept = self._weight_norm_sq = self._base_weight = None

    def add_adapter(self, name: str, adapter: LowRank) -> None:
        """Hold `adapter` under `name`, inactive until asked for."""
        self._kept = None
        self.adapters[name] = adapter.train(self.training)

    def merged_weight(self, name: str) -> Tensor:
        """The dense weight of base and adapter together, (O, I), float32 or float64, without gradient."""
        adapter: Any = self.adapters[name]
        with torch.no_grad():
            a, b = adapter.factors()
            return merged_weight(_plain(self, self.weight_OI), a, b, adapter.scale, adapter.magnitude)

    def merge(self, name: str) -> None:
        """Put the merged weight in place of the base weight, which is kept aside, bit for bit, for `unmerge`.

        A new Parameter takes the place, so that a weight tied to this one is left as it was.
        """
        merged = self.merged_weight(name).to(base_dtype(self))
        self._kept = None
        self._base_weight = (self.weight,)
        self.weight = nn.Parameter(merged.T.contiguous() if self.stored_transposed else merged, requires_grad=False)
        self.merged_adapter = name

    def unmerge(self) -> None:
        """Put the very base weight back."""
        if self._base_weight is not None:
            (self.weight,) = self._base_weight
        self._kept = self._base_weight = self.merged_adapter = None

    def train(self, mode: bool = True):  # noqa: D102
        self._kept = None
        self._forget_a_changed_weight()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True):
        self._kept = self._weight_norm_sq = None
        if self._base_weight is not None:
            # The Parameter itself stays, because another module may be tied to it.
            self._base_weight[0].data = move(fn, self._base_weight[0].data)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(*args, **kwargs)

    def weight_norm_squared(self) -> Tensor:
        """‖W‖² of each output row, (O,): computed once for each frozen weight."""
        if torch.compiler.is_compiling():
            kept = self._weight_norm_sq
            return self._new_weight_norm_squared() if kept is None else kept[1]
        found = versions(self.weight)
        if self._weight_norm_sq is None or self._weight_norm_sq[0][0] != found:
            with torch.inference_mode(False), torch.no_grad():
                self._weight_norm_sq = (found, content(self.weight)), self._new_weight_norm_squared()
        return self._weight_norm_sq[1]

    def _new_weight_norm_squared(self) -> Tensor:
        return _weight_norm_squared(self, self.weight_OI)

    def _forget_a_changed_weight(self) -> None:
        if self._weight_norm_sq is not None and self._weight_norm_sq[0][1] != content(self.weight):
            self._weight_norm_sq = None

    def __getstate__(self) -> dict[str, Any]:
        # Caches are bound to tensors by address, so they do not travel.
        return {**self.__dict__, "_kept": None, "_weight_norm_sq": None}

    _kept: Kept | None
    # (what it depends on, value)
    _weight_norm_sq: tuple[Any, Tensor] | None
    # In a tuple, because nn.Module would register a bare Parameter.
    _base_weight: tuple[nn.Parameter] | None


def base_weight(module: nn.Module) -> Tensor:
    """The base weight of an adapted module, or of one that can be adapted, as (O, I); float8 widened to float32."""
    if isinstance(module, AdapterLayer):
        return module.base_weight_OI
    weight = module.weight
    assert isinstance(weight, Tensor)
    return _plain(module, weight.T if _is_transposed(module) else weight)


def start_norm(module: nn.Module, adapter: LowRank) -> Tensor:
    """‖W + s·B·A‖ of each output row, (O,), to the bit as the module will compute it once it is adapted.

    A magnitude that starts here makes g exactly 1, for as long as the update is zero or what it was.
    """
    weight, transposed = module.weight, _is_transposed(module)
    if isinstance(module, AdapterLayer):
        weight = module.weight if module._base_weight is None else module._base_weight[0]  # pyright: ignore[reportPrivateUsage]
        transposed = module.stored_transposed
    assert isinstance(weight, Tensor)
    w_OI = weight.T if transposed else weight
    with torch.no_grad():
        return _norm(module, w_OI, *adapter.factors(), adapter.scale, _weight_norm_squared(module, w_OI))


def base_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that the module's base weight is stored in, or was before it went into float8."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return module.plain_dtype if isinstance(module, Float8Layer) else weight.dtype


def _is_transposed(module: nn.Module) -> bool:
    """Whether a module that is not adapted stores its weight as (I, O)."""
    return is_conv1d(module) or is_embedding(module)


def _plain(module: nn.Module, w_OI: Tensor) -> Tensor:
    """`w_OI`, the module's weight, as the numbers it stands for."""
    if not isinstance(module, Float8Layer) or w_OI.dtype != FLOAT8:
        return w_OI
    return dequantized(w_OI, module.weight_scale, torch.float32)


def _norm(module: nn.Module, w_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float, w_norm_sq_O: Tensor) -> Tensor:
    """‖W + s·B·A‖ of each output row of the module's weight as it is stored, (O,)."""
    if not kernels.fast():
        return dora_norm(_plain(module, w_OI), a_RI, b_OR, scale, w_norm_sq_O)
    with torch.no_grad():
        row_scale = weight_scale(module) if w_OI.dtype == FLOAT8 else None
        return kernel_dora_norm(w_OI, a_RI.detach(), b_OR.detach(), scale, w_norm_sq_O, row_scale)


def _weight_norm_squared(module: nn.Module, w_OI: Tensor) -> Tensor:
    """‖W‖² of each row of the module's weight as it is stored, (O,)."""
    norm_sq, row_scale = row_norm_squared(w_OI), weight_scale(module) if w_OI.dtype == FLOAT8 else None
    return norm_sq if row_scale is None else norm_sq * row_scale.square()


def _rewritten(old: Any, new: Any) -> Any:
    """`new` in the memory of `old`."""
    return new if new is None or old.data_ptr() == new.data_ptr() else old.copy_(new)
