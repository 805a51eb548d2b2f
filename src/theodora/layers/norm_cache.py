"""What a layer with a frozen weight computes once and keeps, and how it notices that this is out of date.

    norm_sq = cache.weight_norm_squared(weight, compute)             ‖W‖², in every pass
    tensors = cache.get(name, weight, adapter, compute, one_token)   ‖W + s·B·A‖, and what decoding reads: without
                                                                     gradients only

The layer invalidates its cache at `train()`, `eval()`, moves, loading and merging, and all caches let go of what
depends on an adapter when an optimizer steps. Other writes to a tensor leave a new version behind, except those through
`.data`: these show in the values alone, and a look at the values makes the host wait for the GPU. So a pass over
several tokens (a prompt, an evaluation) looks, and the steps of one token that follow it do not. Where many prompts are
answered together a step of each is a pass over several tokens: there one look at each layer is enough, the first one
(`looked_at_once`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from theodora.functional import wide_dtype
from theodora.kernels.base_weight import BaseWeight
from theodora.kernels.sharded_weight import here
from theodora.layers.low_rank import LowRank

# None of these is frozen: torch.compile would guard on every field of a frozen dataclass.


@dataclass(eq=False)
class DecodeTensors:
    """What `theodora.kernels.decode` reads of an adapter, in the dtypes that it wants."""

    a_RI: Tensor
    b_OR: Tensor
    """s·B."""
    g_O: Tensor | None
    """m / ‖W + s·B·A‖; None for LoRA."""

    def rewrite(self, new: DecodeTensors) -> DecodeTensors:
        """`new` in the memory where these lie: a recorded CUDA graph reads them there."""
        g = None if self.g_O is None or new.g_O is None else _rewritten(self.g_O, new.g_O)
        return DecodeTensors(_rewritten(self.a_RI, new.a_RI), _rewritten(self.b_OR, new.b_OR), g)


@dataclass(eq=False)
class InferenceTensors:
    """What passes without gradients need not compute again, of one layer and adapter."""

    name: str | None
    """The adapter's."""
    stamp: Stamp
    """Of the tensors that it was computed from."""
    content: list[int] | None
    """Of the same tensors; None for LoRA, which has no norm: its factors are made anew instead."""
    norm_O: Tensor | None
    decode: DecodeTensors | None
    """None where the kernel cannot run the layer."""
    looked: object = None
    """The `looked_at_once` within which the values were looked at."""


@dataclass(eq=False)
class _WeightNorm:
    stamp: Stamp
    content: list[int]
    norm_sq_O: Tensor
    looked: object = None
    """As `InferenceTensors.looked`."""


Compute = Callable[[], tuple[Tensor | None, DecodeTensors | None]]
"""‖W + s·B·A‖ (None for LoRA) and what decoding reads (None where it cannot)."""


class NormCache:
    """What one layer keeps. Copies of the layer begin with an empty one: their tensors are others."""

    def __init__(self) -> None:
        self._weight_norm: _WeightNorm | None = None
        self._inference: InferenceTensors | None = None

    def __reduce__(self) -> Any:
        return NormCache, ()

    def weight_norm_squared(
        self, weight: BaseWeight, compute: Callable[[], Tensor], *, rounding: object = None, look: bool = False
    ) -> Tensor:
        """‖W‖² of each output row, (O,): computed once for each frozen weight.

        torch.compile cannot see whether it is out of date: there it is what earlier passes have left.

        Args:
            weight: W.
            compute: gives ‖W‖².
            rounding: what `compute` depends on beside the weight (the dtype that it computes in, say).
            look: whether to look at the values, too.
        """
        known = self._weight_norm
        if torch.compiler.is_compiling():
            return compute() if known is None else known.norm_sq_O
        tensors, block, held = weight.watched(), _ONCE.get(), _HELD.get()
        old = None if held is None else held.weights.get(self)
        if old is not None and known is not old:
            known = None
        if known is not None and look and block is not None and known.looked is block:
            look = False
        if known is None or not known.stamp.fits(tensors, rounding) or (look and known.content != content(*tensors)):
            with torch.inference_mode(False), torch.no_grad():
                norm_sq = compute() if old is None else _rewritten(old.norm_sq_O, compute())
                known = self._weight_norm = _WeightNorm(Stamp(tensors, rounding), content(*tensors), norm_sq)
            look = True  # at what it was computed from
        if held is not None:
            held.weights[self] = known
        if look:
            known.looked = block
        return known.norm_sq_O

    def get(
        self, name: str | None, weight: BaseWeight, adapter: LowRank, compute: Compute, one_token: bool
    ) -> InferenceTensors | None:
        """What a pass without gradients need not compute again; computed here where it is missing or out of date.

        torch.compile can compute nothing, nor look at values or versions: there it is what earlier passes have left,
        for steps of one token, or None.

        Args:
            name: the adapter's.
            weight: W.
            adapter: what the layer runs with.
            compute: gives what is missing.
            one_token: whether the pass is over one token of each sequence.
        """
        known = self._inference
        if torch.compiler.is_compiling():
            return known if one_token and known is not None and known.name == name else None
        tensors, values, held = _tensors(weight, adapter), None, _HELD.get()
        old = None if held is None else held.layers.get(self)
        if old is not None and known is not old:
            known = None
        current = known if known is not None and known.stamp.fits(tensors, adapter.scale) else None
        block = _ONCE.get()
        if held is not None and current is not None:
            held.layers[self] = current
        if current is not None and (one_token or (block is not None and current.looked is block)):
            return current
        if adapter.magnitude is not None:
            values = content(*tensors, adapter.start_A, adapter.start_B)
            if current is not None and current.content == values:
                current.looked = block
                return current
            self.look_at(weight)
        with torch.inference_mode(False), torch.no_grad():
            norm, decode = compute()
            read = current if held is None else old
            if read is not None and read.decode is not None and decode is not None:
                decode = read.decode.rewrite(decode)
            if old is not None and old.norm_O is not None and norm is not None:
                norm = _rewritten(old.norm_O, norm)
        # (Not read again from the cache, which another thread may have invalidated meanwhile.)
        known = self._inference = InferenceTensors(name, Stamp(tensors, adapter.scale), values, norm, decode, block)
        if held is not None:
            held.layers[self] = known
        _IN_USE.add(self)
        return known

    def renew(self, name: str | None, weight: BaseWeight, adapter: LowRank | None, compute: Compute) -> None:
        """After a write to an adapter's tensors: compute what `get` gives anew, in the memory where it lies.

        Compiled code and recorded CUDA graphs read it there, and cannot see that it is out of date.
        """
        known = self._inference
        if known is None or adapter is None or known.name != name:
            self.invalidate()
            return
        tensors = _tensors(weight, adapter)
        with torch.inference_mode(False), torch.no_grad():
            norm, decode = compute()
            if known.norm_O is not None and norm is not None:
                known.norm_O.copy_(norm)
            if known.decode is not None and decode is not None:
                known.decode = known.decode.rewrite(decode)
            known.stamp = Stamp(tensors, adapter.scale)
            if known.content is not None:
                known.content = content(*tensors, adapter.start_A, adapter.start_B)

    def look_at(self, weight: BaseWeight) -> None:
        """Forget ‖W‖² if the values of W have changed."""
        if self._weight_norm is not None and self._weight_norm.content != content(*weight.watched()):
            self._weight_norm = None

    def invalidate(self, *, weight: bool = False) -> None:
        """Forget what depends on an adapter; and what is known of the `weight`, if that may have changed, too."""
        self._inference = None
        if weight:
            self._weight_norm = None


_PACKED = 1 << 18
"""Numbers beyond which a vector is part of a packed weight: norms and magnitudes are shorter."""
_ONCE: ContextVar[object] = ContextVar("theodora_looked_at_once", default=None)


class Held:
    """What CUDA graphs read of layers that were recorded in one `looked_at_once` and run again in another.

    Whatever happened to the weights and to the layers' caches in between: what has to be made anew is made in the same
    memory, by the first pass.
    """

    def __init__(self) -> None:
        self.layers: WeakKeyDictionary[NormCache, InferenceTensors] = WeakKeyDictionary()
        self.weights: WeakKeyDictionary[NormCache, _WeightNorm] = WeakKeyDictionary()


_HELD: ContextVar[Held | None] = ContextVar("theodora_held", default=None)


@contextmanager
def looked_at_once(held: Held | None = None) -> Iterator[None]:
    """While it lasts, nobody writes to a weight through `.data`: the values of each layer are looked at once.

    Without the wait for the device that a look is, passes can be recorded in CUDA graphs; with `held` these can be run
    again in another such block that is given the same.
    """
    once, before = _ONCE.set(object()), _HELD.set(held)
    try:
        yield
    finally:
        _ONCE.reset(once)
        _HELD.reset(before)


class Stamp:
    """Tells tensors from others, and from the same ones after a write that leaves a version behind."""

    def __init__(self, tensors: tuple[Tensor | None, ...], value: object = None) -> None:
        # While its memory is referred to, no other's can take its number: a tensor made in each pass
        # (`torch.nn.utils.parametrize`) may have its precursor's id and address. A reference to the tensor itself would
        # say the same, but `torch.utils.swap_tensors`, which some moves and loads go by, refuses tensors that have one.
        self._memory = [StorageWeakRef(here(t).untyped_storage()) for t in tensors if t is not None]
        self._states = [_state(t) for t in tensors if t is not None]
        self._value = value

    def fits(self, tensors: tuple[Tensor | None, ...], value: object = None) -> bool:
        """Whether these are the same, and have not been written to."""
        return self._value == value and self._states == [_state(t) for t in tensors if t is not None]


def _tensors(weight: BaseWeight, adapter: LowRank) -> tuple[Tensor | None, ...]:
    return *weight.watched(), adapter.lora_A, adapter.lora_B, adapter.magnitude


def _state(tensor: Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    if (part := here(tensor)) is not tensor:  # what is written to all parts leaves its version on the DTensor alone
        tensor, version = part, (version, part._version)
    memory = tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
    return memory, tensor.data_ptr(), tensor.shape, tensor.stride(), version, tensor.dtype


def content(*tensors: Tensor | None) -> list[int]:
    """What tells small tensors, and some 64 values of large matrices (512 of those of experts), from changed ones; one
    wait for the device.

    Bits xored, and the sum: a change of all signs, or of zeros into one number, leaves an even number's xor as it was.
    """
    hashes: list[Tensor] = []
    for tensor in tensors:
        if tensor is None or tensor.is_meta:  # (has no content)
            continue
        t = here(tensor).detach()
        if t.numel() == 0:  # as of a short tensor that is cut over many processes
            continue
        if t.dim() == 2 and min(t.shape) > 256:
            few = t[:: t.shape[0] // 8, :: t.shape[1] // 8]
        elif t.dim() == 3 and min(t.shape[1:]) > 256:
            few = t[:: max(1, t.shape[0] // 8), :: t.shape[1] // 8, :: t.shape[2] // 8]
        elif t.numel() > _PACKED and 1 in (t.dim(), *t.shape):
            few = t.flatten()[:: t.numel() // 64]
        else:
            few = t
        wide = few.to(wide_dtype(t.dtype))
        hashes += [torch.hash_tensor(wide), torch.hash_tensor(wide.sum())]
    return torch.stack(hashes).tolist() if hashes else []


def one_token_each(x: Tensor) -> bool:
    """Whether x, (…, T, I), is a step of one token of each sequence."""
    return x.dim() > 1 and x.shape[-2] == 1


def _rewritten(old: Tensor, new: Tensor) -> Tensor:
    """`new` in the memory of `old`."""
    return new if old.data_ptr() == new.data_ptr() else old.copy_(new)


_IN_USE: WeakSet[NormCache] = WeakSet()
"""Caches that hold something of an adapter."""


def _forget_adapters(*_: Any) -> None:
    while _IN_USE:
        _IN_USE.pop().invalidate()


register_optimizer_step_post_hook(_forget_adapters)
