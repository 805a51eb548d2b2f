"""Attention in models: rotary embeddings by our kernel, and one copy of q and k instead of two.

Attention modules call `apply_rotary_pos_emb` of the file they stand in, and then the attention function of
transformers' registry. There are no hooks, so both are replaced, once in a process; what ours are not for goes to the
originals. Where a packed row comes with the bounds of its sequences, attention goes by them (`packed_attention.py`).

Turned q and k are new tensors, and torch's attention would keep them for its gradient. Where they are saved they are
replaced by the way to make them again: one pass over them in the backward pass, instead of their memory from the
forward pass on. Only what was turned from a layer's whole output is replaced, because DoRA keeps that output as well
(see `kernels/shared_outputs.py`); for anything else it would spare nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from theodora.fastpath.packed_attention import attend
from theodora.kernels.operators import runs_triton
from theodora.kernels.rotary import rotate, rotate_reference, turn
from theodora.kernels.shared_outputs import marked, saves_through_hooks

_ROTARY, _ATTENTION = "apply_rotary_pos_emb", "sdpa"
_TURNED = "_theodora_turned"

_Again = Callable[[], Tensor]


def speed_up_rotary(module: nn.Module) -> bool:
    """Give the file of an attention module the faster function, if it is for its kind; say whether it has it now."""
    file = sys.modules.get(type(module).__module__)
    original = getattr(file, _ROTARY, None)
    if original is None or "ttention" not in type(module).__name__:
        return False
    if hasattr(original, "__theodora__"):
        return True
    if not _computes_the_usual(original):
        return False
    setattr(file, _ROTARY, _dispatching(original))
    replace_attention()
    return True


def replace_attention() -> None:
    """Give transformers' registry our attention, if it has not got it yet."""
    if not hasattr(attention := ALL_ATTENTION_FUNCTIONS[_ATTENTION], "__theodora__"):
        ALL_ATTENTION_FUNCTIONS[_ATTENTION] = _turning_again(attention)


def restore_rotary(module: nn.Module) -> None:
    """Put the file's own function back, and transformers' own attention."""
    file = sys.modules.get(type(module).__module__)
    own = getattr(getattr(file, _ROTARY, None), "__theodora__", None)
    if own is not None:
        setattr(file, _ROTARY, own)
        if hasattr(ALL_ATTENTION_FUNCTIONS[_ATTENTION], "__theodora__"):
            del ALL_ATTENTION_FUNCTIONS[_ATTENTION]  # what was set hid the registry's own


def _computes_the_usual(function: Callable[..., Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}  # whatever the defaults
    q, k = (torch.randn(1, heads, 3, 8, **made) for heads in (4, 2))
    angles = torch.randn(1, 3, 4, **made).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    try:
        found = function(q.clone(), k.clone(), cos, sin)
    except Exception:  # whatever a stranger's function raises: it is another one
        return False
    expected = (rotate_reference(q, cos, sin), rotate_reference(k, cos, sin))
    return len(found) == 2 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def _dispatching(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or torch.compiler.is_compiling() or not (_fits(q, cos, sin) and _fits(k, cos, sin)):
            return original(q, k, cos, sin, *args, **kwargs)
        turned = rotate(q, cos, sin), rotate(k, cos, sin)
        for before, after in zip((q, k), turned, strict=True):
            _note_turned(before, after, cos, sin)
        return turned

    apply.__theodora__ = original  # pyright: ignore[reportAttributeAccessIssue]
    return apply


def _fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if not runs_triton(x) or x.dim() != 4 or cos.dim() != 3 or cos.requires_grad or cos.shape != sin.shape:
        return False
    whole = cos.shape[1:] == x.shape[2:] and cos.shape[0] in (1, x.shape[0]) and x.shape[-1] % 2 == 0
    return whole and x.dtype == cos.dtype == sin.dtype


def _note_turned(before: Tensor, after: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Let attention find out how `after` was made, if it was made of a layer's whole output."""
    output = marked(before)
    if output is None:
        return
    output.was_read()
    if not output.known:  # then DoRA keeps something else, and there would be nothing to spare
        return
    kept = before.detach()

    def again() -> Tensor:
        if not output.known:
            raise RuntimeError("An output of q_proj or k_proj was modified in place after it had been turned")
        return turn(kept, cos, sin, False)

    setattr(after, _TURNED, (again, after._version))


def _turning_again(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def attention(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        # No tensor in here: what is saved keeps `pack`, and that keeps these.
        ways: dict[Any, _Again] = {}
        for tensor in (query, key):
            if (again := _way(tensor)) is not None:
                ways[_place(tensor)] = again
                ways[_place(tensor.transpose(1, 2)[0])] = lambda again=again: again().transpose(1, 2)[0]
        if not ways or not torch.is_grad_enabled() or torch.compiler.is_compiling() or saves_through_hooks():
            return attend(original, module, query, key, *args, **kwargs)

        def pack(tensor: Tensor) -> Tensor | _Again:
            return ways.get(_place(tensor)) or tensor.detach()

        with saved_tensors_hooks(pack, _unpack):
            return attend(original, module, query, key, *args, **kwargs)

    attention.__theodora__ = original  # pyright: ignore[reportAttributeAccessIssue]
    return attention


def _way(tensor: Tensor) -> _Again | None:
    """How to make a tensor again that was turned, and not written to since."""
    # (tensors of inference mode have no version; they were not turned with gradients either)
    again, version = getattr(tensor, _TURNED, (None, None))
    return again if again is not None and version == tensor._version else None


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, and how."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _unpack(kept: Tensor | _Again) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept()
