"""What an adapted layer computes once and keeps while no gradients flow, and how it notices that it is out of date.

A layer forgets at `train()`, `eval()`, moves, loading and merging, and all layers do when an optimizer steps. Other
writes to a tensor leave a new version behind, except those through `.data`: these show in the values alone, and a look
at the values makes the host wait for the GPU. So a pass over several tokens (a prompt, an evaluation) looks, and the
steps of one token that follow it do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from theodora.functional import wide_dtype


@dataclass(eq=False)
class Kept:
    """Of one layer and adapter. (Not frozen: torch.compile would guard on every field of a frozen dataclass.)"""

    name: str | None
    """The adapter's."""
    versions: tuple[Any, ...]
    """Of the tensors, and the scale."""
    content: list[int] | None
    """None for LoRA, which has no norm: its factors are made anew instead."""
    norm_O: Tensor | None
    decode: tuple[Any, ...] | None
    """A, s·B and g as `theodora.kernels.decode` wants them, where it can run."""


def versions(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What changes when any of the tensors is replaced or written to."""
    return tuple(
        (id(t), t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in tensors if t is not None
    )


def content(*tensors: Tensor | None) -> list[int]:
    """What tells small tensors, and some 64 values of large matrices, from changed ones; one wait for the device.

    Bits xored, and the sum: a change of all signs, or of zeros into one number, leaves an even number's xor as it was.
    """
    hashes: list[Tensor] = []
    for tensor in tensors:
        if tensor is None:
            continue
        t = tensor.detach()
        large = t.dim() == 2 and min(t.shape) > 256
        few = t[:: t.shape[0] // 8, :: t.shape[1] // 8] if large else t
        wide = few.to(wide_dtype(t.dtype))
        hashes += [torch.hash_tensor(wide), torch.hash_tensor(wide.sum())]
    return torch.stack(hashes).tolist()


def one_token_each(x: Tensor) -> bool:
    """Whether x, (…, T, I), is a step of one token of each sequence."""
    return x.dim() > 1 and x.shape[-2] == 1


_keepers: WeakSet[nn.Module] = WeakSet()


def remember(layer: nn.Module, kept: Kept) -> Kept:
    """Keep `kept` on the layer until it forgets or an optimizer steps."""
    layer._kept = kept  # pyright: ignore[reportArgumentType]
    _keepers.add(layer)
    return kept


def _forget_all(*_: Any) -> None:
    while _keepers:
        layer = _keepers.pop()
        if "_kept" in layer.__dict__:  # an adapter layer still
            layer._kept = None  # pyright: ignore[reportArgumentType]


register_optimizer_step_post_hook(_forget_all)
