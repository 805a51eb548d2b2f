"""A frozen weight that FSDP2's `fully_shard` has cut over processes: what lies here of it, and the whole one of a pass.

Between passes the module's parameter is a DTensor, of which this process holds some rows (`ShardedWeight`). While its
block runs, forward and backward, `fully_shard` puts a whole tensor in its place, whose memory it frees afterwards and
takes anew, elsewhere, for the next pass (`GatheredWeight`). Whatever is kept about the weight is therefore told by the
rows that lie here, which stay where they are.

Methods that need the rows of others say so: every process has to call them.

Shapes: I in features, O out features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from theodora.errors import ConfigError
from theodora.functional import row_norm_squared, wide_dtype
from theodora.kernels.base_weight import BaseWeight, PlainWeight
from theodora.kernels.library_weight import LibraryWeight
from theodora.kernels.packed import Packed

_SHARD = "_theodora_shard"
_MANAGED = "_is_fsdp_managed_module"  # what `fully_shard` writes on each module whose parameters it looks after


def is_sharded(tensor: Any) -> TypeGuard[Any]:
    """Whether it is a DTensor, of which a part lies here. (Asking for the class would import torch.distributed.)"""
    return isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")


def here(tensor: Tensor) -> Tensor:
    """What lies in this process: the part of a sharded tensor, or the tensor itself."""
    # (`to_local` is a step of autograd, and this runs in each pass)
    return tensor._local_tensor if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on the device where its processes meet; another one itself.

    Every process calls this.
    """
    return _joined(tensor, _moved(tensor), tensor.placements, tensor.shape) if is_sharded(tensor) else tensor


def managed(module: nn.Module) -> bool:
    """Whether `fully_shard` gathers and frees the module's parameters."""
    return _MANAGED in module.__dict__


def managed_weight(
    module: nn.Module, tensor: Tensor, transposed: bool, library: Callable[[nn.Module, Tensor], LibraryWeight | None]
) -> BaseWeight | None:
    """`tensor`, the weight of a `managed` module, as it is now; None if it is of a kind that is not sharded.

    Args:
        module: the module.
        tensor: its weight.
        transposed: whether that is (I, O).
        library: gives a weight that another library has quantised, if it is one.
    """
    if is_sharded(tensor):
        if tensor is module.__dict__["_parameters"].get("weight"):  # not what a merged weight has set aside
            module.__dict__[_SHARD] = tensor
        if type(here(tensor)) is not Tensor:
            return None
        if (packed := library(module, nn.Parameter(here(tensor), requires_grad=False))) is not None:
            return ShardedLibraryWeight(packed, tensor)
        return ShardedWeight(tensor, transposed)
    if (packed := library(module, tensor)) is not None:
        return GatheredLibraryWeight(packed, shard_of(module))
    return GatheredWeight(tensor, transposed, shard_of(module)) if type(tensor.data) is Tensor else None


def shard_of(module: nn.Module) -> Any:
    """The DTensor that is the module's weight between passes, where it is known; else None."""
    known = module.__dict__.get(_SHARD)
    if known is None and managed(module):
        known = module.__dict__[_SHARD] = _found_shard(module)
    return known


def forget_shard(module: nn.Module) -> None:
    """After a move: the weight may be another DTensor."""
    module.__dict__.pop(_SHARD, None)


@contextmanager
def whole_here(module: nn.Module) -> Iterator[None]:
    """Within the block the module's own parameters are whole, so that it runs by itself; every process enters it."""
    parameters: dict[str, Any] = module.__dict__["_parameters"]
    sharded = {name: tensor for name, tensor in parameters.items() if is_sharded(tensor)}
    for name, tensor in sharded.items():
        parameters[name] = nn.Parameter(whole(tensor.detach()), requires_grad=False)
    try:
        yield
    finally:
        parameters.update(sharded)


def reshard(model: nn.Module) -> None:
    """Let all weights of a sharded model be DTensors, as between passes; those of the root stay gathered otherwise."""
    for module in model.modules():
        if managed(module) and hasattr(module, "reshard"):
            module.reshard()  # pyright: ignore[reportCallIssue]


def replace_shard(sharded: nn.Parameter, tensor: Tensor) -> nn.Parameter:
    """Write this process's part of `tensor`, the same whole one in every process, into the sharded parameter.

    Returns:
        What stood there before, sharded alike.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    like: Any = sharded
    mesh, placements, own = like.device_mesh, like.placements, here(sharded)
    with torch.no_grad():
        before = DTensor.from_local(
            own.detach().clone(), mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        # (without a source: nothing is sent, since every process has the whole)
        own.copy_(here(distribute_tensor(tensor.contiguous(), mesh, placements, src_data_rank=None)))
    return nn.Parameter(before, requires_grad=False)


def put_back(sharded: nn.Parameter, before: nn.Parameter) -> None:
    """Undo `replace_shard`, bit for bit; nothing is sent."""
    with torch.no_grad():
        here(sharded).copy_(here(before))


def _found_shard(module: nn.Module) -> Any:
    """What `fully_shard` holds for the weight: the first pass may come before anybody has seen the DTensor.

    Its record of a parameter is reachable from the module by the hook for loading alone (read in torch 2.11 and 2.13).
    """
    for hook in module.__dict__.get("_load_state_dict_post_hooks", {}).values():
        for cell in getattr(hook, "__closure__", None) or ():
            record: Any = cell.cell_contents
            if getattr(getattr(record, "_module_info", None), "param_name", None) == "weight":
                return getattr(record, "sharded_param", None)
    return None


@dataclass(frozen=True, slots=True, eq=False)
class GatheredWeight(PlainWeight):
    """The whole weight while its block runs: a plain tensor, whose memory is another one in the next pass."""

    captures = False
    lies_still = False

    shard: Any = None
    """The DTensor that it is gathered from, if that is known."""

    def watched(self) -> tuple[Tensor, ...]:
        """The DTensor, which a change of the weight shows in."""
        return (self.tensor,) if self.shard is None else (self.shard,)


@dataclass(frozen=True, slots=True, eq=False)
class ShardedWeight(BaseWeight):
    """The weight between passes: a DTensor."""

    stored = "plain"
    captures = False
    lies_still = False

    tensor: Any
    """The DTensor, (O, I), or (I, O)."""
    transposed: bool = False
    """Whether it is (I, O)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I), of the whole."""
        first, second = self.tensor.shape
        return (second, first) if self.transposed else (first, second)

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """Where its products run, which need not be where its rows lie."""
        lies, meets = here(self.tensor).device, self.tensor.device_mesh.device_type
        return lies if lies.type == meets else torch.empty(0, device=meets).device

    def takes(self, dtype: torch.dtype) -> bool:
        """Only its own."""
        return dtype == self.dtype

    def to(self, dtype: torch.dtype) -> BaseWeight:
        """Rounded."""
        return self if dtype == self.dtype else ShardedWeight(self.tensor.to(dtype), self.transposed)

    def product(self, x_TI: Tensor, bias_O: Tensor | None = None, shared: Any = None) -> Tensor:
        """There is none.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "This layer's weight is sharded over processes (fully_shard) and whole only while the model runs: call the "
            "model in every process instead of one of its layers, or unshard() the layer's block first."
        )

    def product_backward(self, dz_TO: Tensor, onto: Tensor | None = None) -> Tensor:
        """There is none, as for `product`."""
        return self.product(dz_TO)

    def rows(self, at: slice | Tensor = slice(None)) -> Tensor:
        """Of the gathered weight: every process calls this."""
        return PlainWeight(self.dense()).rows(at)

    def norm_squared(self) -> Tensor:
        """Of the rows that lie here, or of their parts, added up; every process calls this."""
        placements = self._placements_of_rows()
        if placements is None:
            return row_norm_squared(self.dense())
        part = _moved(self.tensor)
        norm_sq = row_norm_squared(part.T if self.transposed else part) if part.numel() else None
        if norm_sq is None:  # nothing of it lies here
            size = 0 if any(placement.is_shard() for placement in placements) else self.shape[0]
            norm_sq = part.new_zeros(size, dtype=wide_dtype(self.dtype))
        return _joined(self.tensor, norm_sq, placements, (self.shape[0],))

    def times_a(self, a_RI: Tensor) -> Tensor:
        """Of the rows that lie here, put together; every process calls this."""
        placements = self._placements_of_rows()
        if placements is None or any(placement.is_partial() for placement in placements):
            return PlainWeight(self.dense()).times_a(a_RI)
        return _joined(
            self.tensor, PlainWeight(_moved(self.tensor)).times_a(a_RI), placements, (self.shape[0], a_RI.shape[0])
        )

    def _placements_of_rows(self) -> tuple[Any, ...] | None:
        """How a number for each output row is spread; None where the weight is cut in another way than in slices."""
        from torch.distributed.tensor import Partial, Replicate, Shard

        spread: list[Any] = []
        for placement in self.tensor.placements:
            if type(placement) not in (Shard, Replicate):
                return None
            if isinstance(placement, Shard):  # of whole rows, or of a part of each
                rows = (placement.dim == 0) != self.transposed
                spread.append(Shard(0) if rows else Partial("sum"))
            else:
                spread.append(placement)
        return tuple(spread)

    def split(self, outputs: int) -> list[BaseWeight]:
        """Of the gathered weight: every process calls this."""
        return PlainWeight(self.dense()).split(outputs)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Gathered: every process calls this."""
        tensor = whole(self.tensor.detach())
        tensor = tensor.T if self.transposed else tensor
        return tensor if dtype is None else tensor.to(dtype)

    def plain(self) -> Tensor | None:
        """None."""
        return None

    def tensors(self) -> tuple[Tensor, ...]:
        """The DTensor."""
        return (self.tensor,)

    def maker(self) -> Callable[..., BaseWeight]:
        """Of the DTensor."""
        return partial(ShardedWeight, transposed=self.transposed)


class GatheredLibraryWeight(LibraryWeight):
    """A whole weight that another library has quantised, while its block runs: as `GatheredWeight`."""

    __slots__ = ("_shard",)

    captures = False  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]
    lies_still = False

    def __init__(self, packed: LibraryWeight, shard: Any) -> None:
        """Of what the library's module holds.

        Args:
            packed: the weight.
            shard: the DTensor that its packed numbers are gathered from, if that is known.
        """
        super().__init__(packed.format, *packed.tensors())
        self._shard = shard

    def watched(self) -> tuple[Tensor, ...]:
        """The DTensor in the place of the packed numbers."""
        packed, *rest = super().watched()
        return (packed if self._shard is None else self._shard, *rest)


class ShardedLibraryWeight(LibraryWeight):
    """A weight that another library has quantised, between passes: its packed numbers are a DTensor.

    Its scales are whole in every process. Whatever reads its numbers gathers them: every process has to call it.
    """

    __slots__ = ("_shard",)

    captures = False  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]
    lies_still = False

    def __init__(self, part: LibraryWeight, shard: Any) -> None:
        """Of what the library's module holds.

        Args:
            part: the weight, of whose packed numbers only those that lie here are there.
            shard: the DTensor of the packed numbers.
        """
        super().__init__(part.format, *part.tensors())
        self._shard = shard

    def _whole(self) -> LibraryWeight:
        packed = whole(self._shard.detach()).view(self._tensors[0].dtype)
        return LibraryWeight(self.format, packed, *self._tensors[1:])

    def product(self, x_TI: Tensor, bias_O: Tensor | None = None, shared: Any = None) -> Tensor:
        """There is none, as for `ShardedWeight`.

        Raises:
            ConfigError: always.
        """
        return ShardedWeight(self._shard).product(x_TI)

    def product_backward(self, dz_TO: Tensor, onto: Tensor | None = None) -> Tensor:
        """There is none, as for `product`."""
        return self.product(dz_TO)

    def rows(self, at: slice | Tensor = slice(None)) -> Tensor:
        """Of the gathered weight."""
        return self._whole().rows(at)

    def norm_squared(self) -> Tensor:
        """Of the gathered weight."""
        return self._whole().norm_squared()

    def times_a(self, a_RI: Tensor) -> Tensor:
        """Of the gathered weight."""
        return self._whole().times_a(a_RI)

    def dora_norm(self, a_RI: Tensor, b_OR: Tensor, scale: float, w_norm_sq_O: Tensor) -> Tensor:
        """Of the gathered weight."""
        return self._whole().dora_norm(a_RI, b_OR, scale, w_norm_sq_O)

    def packed(self) -> Packed | None:
        """None."""
        return None

    def split(self, outputs: int) -> list[BaseWeight]:
        """Of the gathered weight."""
        return self._whole().split(outputs)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Of the gathered weight."""
        return self._whole().dense(dtype)

    def watched(self) -> tuple[Tensor, ...]:
        """The DTensor in the place of the packed numbers."""
        return (self._shard, *super().watched()[1:])


def _moved(tensor: Any) -> Tensor:
    """What lies here of a DTensor, on the device where the processes meet: offloaded parts lie elsewhere."""
    return here(tensor).detach().to(tensor.device_mesh.device_type)


def _joined(like: Any, part: Tensor, placements: Any, shape: Any) -> Tensor:
    """The whole tensor of `shape` of which each process of a DTensor has a part."""
    from torch.distributed.tensor import DTensor

    stride = [1]
    for size in reversed(shape[1:]):
        stride.insert(0, stride[0] * size)
    spread = DTensor.from_local(
        part, like.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )
    return spread.full_tensor()
