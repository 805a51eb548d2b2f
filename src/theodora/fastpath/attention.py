"""Attention in models: rotary embeddings by our kernel, and one copy of q and k instead of two.

Attention modules call `apply_rotary_pos_emb` of the file they stand in, and then the attention function of
transformers' registry. There are no hooks, so both are replaced for the whole process, as long as any attention module
is on the fast path; what ours are not for goes to the originals. Where a packed row comes with the bounds of its
sequences, attention goes by them (`packed_attention.py`).

Turned q and k are new tensors, and torch's attention would keep them for its gradient. Where they are saved they are
replaced by the way to make them again: one pass over them in the backward pass, instead of their memory from the
forward pass on. Only what was turned from a layer's whole output is replaced, because DoRA keeps that output as well
(see `kernels/shared_outputs.py`); for anything else it would spare nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from theodora.fastpath.file_users import FileUser, use_file
from theodora.fastpath.packed_attention import attend
from theodora.kernels.notes import Remake, note_turned, output_of, turned_again
from theodora.kernels.operators import runs_triton
from theodora.kernels.rotary import rotate, rotate_reference, turn
from theodora.kernels.shared_outputs import saves_through_hooks
from theodora.patches import Attribute, Patch, Registered, Use

_ROTARY, _ATTENTION = "apply_rotary_pos_emb", "sdpa"
_USER = "_theodora_attention"


def _new_user(file: str) -> FileUser | None:
    """A user of the rotary embeddings in this file (a module's name), or None if they are of another kind."""
    module = sys.modules.get(file)
    if not hasattr(module, _ROTARY):
        return None
    rotary = _rotary_of(module)
    if not rotary.is_reached() and not _computes_the_usual(rotary.original()):
        return None
    return FileUser(_new_user, file, rotary.use(), _SDPA.use())


@functools.cache
def _rotary_of(file: ModuleType) -> Patch:
    return Patch(Attribute(file, _ROTARY), _dispatching)


def speed_up_rotary(module: nn.Module) -> bool:
    """Give the file of an attention module the faster function, if it is for its kind; say whether it has it now."""
    return use_file(module, _USER, _new_user)


def restore_rotary(module: nn.Module) -> None:
    """Undo `speed_up_rotary`: if no other module is on the fast path, the file and the registry get their own back."""
    module.__dict__.pop(_USER, None)


@functools.cache
def keep_attention() -> Use:
    """Give transformers' registry our attention for good, from the first packed row without a mask on.

    For good, because checkpointing runs a block once more in the backward pass, when nobody can say that it is over.
    """
    return _SDPA.use()


def _computes_the_usual(function: Callable[..., Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}  # whatever the defaults
    q, k = (torch.randn(1, heads, 3, 8, **options) for heads in (4, 2))
    angles = torch.randn(1, 3, 4, **options).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    try:
        turned = function(q.clone(), k.clone(), cos, sin)
    except Exception:  # whatever a stranger's function raises: it is another one
        return False
    expected = (rotate_reference(q, cos, sin), rotate_reference(k, cos, sin))
    return len(turned) == 2 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(turned, expected, strict=True))


def _dispatching(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
    @functools.wraps(original)
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        # (torch.compile need not know about the patch, and is asked first)
        if args or kwargs or torch.compiler.is_compiling() or not patch.on:
            return original(q, k, cos, sin, *args, **kwargs)
        if not (_fits(q, cos, sin) and _fits(k, cos, sin)):
            return original(q, k, cos, sin)
        turned = rotate(q, cos, sin), rotate(k, cos, sin)
        for before, after in zip((q, k), turned, strict=True):
            _note_turned(before, after, cos, sin)
        return turned

    return apply


def _fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if not runs_triton(x) or x.dim() != 4 or cos.dim() != 3 or cos.requires_grad or cos.shape != sin.shape:
        return False
    whole = cos.shape[1:] == x.shape[2:] and cos.shape[0] in (1, x.shape[0]) and x.shape[-1] % 2 == 0
    return whole and x.dtype == cos.dtype == sin.dtype


def _note_turned(before: Tensor, after: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Let attention find out how `after` was made, if it was made of a layer's whole output."""
    output = output_of(before)
    if output is None:
        return
    output.was_read()
    if not output.known:  # then DoRA keeps something else, and there would be nothing to spare
        return
    x = before.detach()

    def again() -> Tensor:
        if not output.known:
            raise RuntimeError("An output of q_proj or k_proj was modified in place after it had been turned")
        return turn(x, cos, sin, False)

    note_turned(after, again)


def _turning_again(original: Callable[..., Any], _: Patch) -> Callable[..., Any]:
    """Attention that keeps, of what was turned, the way to make it again; of anything else what `original` keeps."""

    @functools.wraps(original)
    def attention(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        # No tensor in here: it would stay as long as the graph, which keeps `pack`, which keeps `ways`.
        ways: dict[Any, Remake] = {}
        for tensor in (query, key):
            if (again := turned_again(tensor)) is not None:
                ways[_place(tensor)] = again
                ways[_place(tensor.transpose(1, 2)[0])] = lambda again=again: again().transpose(1, 2)[0]
        if not ways or not torch.is_grad_enabled() or torch.compiler.is_compiling() or saves_through_hooks():
            return attend(original, module, query, key, *args, **kwargs)

        def pack(tensor: Tensor) -> Tensor | Remake:
            return ways.get(_place(tensor)) or tensor.detach()

        with saved_tensors_hooks(pack, _unpack):
            return attend(original, module, query, key, *args, **kwargs)

    return attention


_SDPA = Patch(Registered(ALL_ATTENTION_FUNCTIONS, _ATTENTION), _turning_again)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, and how."""
    place = tensor.untyped_storage()._cdata if tensor.is_meta else 0  # pyright: ignore[reportPrivateUsage]
    return place, tensor.data_ptr(), tensor.shape, tensor.stride()


def _unpack(packed: Tensor | Remake) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed()
