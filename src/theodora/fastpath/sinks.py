"""Attention with sinks in models (gpt-oss and its like), by flash attention: see `theodora.kernels.sink_attention`.

transformers has no fused attention for sinks: these models run `eager_attention_forward` of the file they stand in,
with (T, T) scores of each head in memory, under a mask that is built from numbers of the host's in each pass. There is
no hook, so the function is replaced as that for rotary embeddings is (`attention.py`), wherever it computes attention
with sinks. Ours goes by what a mask says and not by the mask: inside `whole_rows` masks say it without being built
(`masks.Unbuilt`), and in a packed row with bounds. Under any other mask the model's own function runs.

Legend: B rows, H heads, T tokens, D features of a head.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from theodora import kernels
from theodora.autocast import without_autocast
from theodora.fastpath.file_users import FileUser, is_attention, use_file
from theodora.fastpath.masks import EAGER_MASKS, Causal, Unbuilt
from theodora.fastpath.packed_attention import FOREIGN, SEQUENCES, Maskless, Sequences
from theodora.kernels.sink_attention import sink_attention, sink_attention_reference, takes
from theodora.patches import Attribute, Patch

_EAGER = "eager_attention_forward"
_USER = "_theodora_sinks"


def _new_user(file: str) -> FileUser | None:
    """A user of the attention in this file (a module's name), or None if it knows no sinks."""
    module = sys.modules.get(file)
    if module is None or not hasattr(module, _EAGER):
        return None
    patch = _attention_of(module)
    if not patch.is_reached() and not _computes_sinks(patch.original()):
        return None
    return FileUser(_new_user, file, patch.use(), EAGER_MASKS.use())


@functools.cache
def _attention_of(file: ModuleType) -> Patch:
    return Patch(Attribute(file, _EAGER), _dispatching)


def speed_up_sinks(module: nn.Module) -> bool:
    """Give the file of an attention module with sinks the faster function; say whether it has it now."""
    return use_file(module, _USER, _new_user)


def restore_sinks(module: nn.Module) -> None:
    """Undo `speed_up_sinks`: if no other module is on the fast path, the file gets its own back."""
    module.__dict__.pop(_USER, None)


def has_fast_sinks(model: nn.Module) -> bool:
    """Whether attention of the model is on the fast path for sinks."""
    return any(_USER in module.__dict__ for module in model.modules())


def has_sinks(model: nn.Module) -> bool:
    """Whether attention of the model can be on the fast path for sinks."""
    files = {type(module).__module__ for module in model.modules() if is_attention(module)}
    return any(_new_user(file) is not None for file in files)


class _Probe(nn.Module):
    """An attention module as far as an attention function reads it."""

    num_key_value_groups = 2
    is_causal = True

    def __init__(self, sinks_H: Tensor) -> None:
        super().__init__()
        self.sinks = sinks_H
        self.eval()


def _computes_sinks(function: Callable[..., Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}  # whatever the defaults
    q, k, v = (torch.randn(1, heads, 5, 8, **options) for heads in (4, 2, 2))
    sinks = torch.randn(4, **options)
    hidden = torch.full((5, 5), -1e30, dtype=torch.float32, device="cpu").triu(1)[None, None]
    given = {"scaling": 0.3, "dropout": 0.0, "sliding_window": None, "s_aux": sinks}
    try:
        with torch.no_grad(), without_autocast(q.device):
            found = function(_Probe(sinks), q.clone(), k.clone(), v.clone(), hidden, **given)[0]
    except Exception:  # whatever a stranger's function raises: it is another one
        return False
    with without_autocast(q.device):
        expected = sink_attention_reference(q, k, v, sinks, 0.3)
    return found.shape == expected.shape and torch.allclose(found.float(), expected, atol=1e-5)


def _dispatching(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
    @functools.wraps(original)
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *args: Any, **options: Any
    ) -> Any:
        sequences: Sequences | None = options.pop(SEQUENCES, None)
        unbuilt = attention_mask if isinstance(attention_mask, Unbuilt) else None
        says = None if unbuilt is None else unbuilt.says
        if sequences is not None:
            return _in_sequences(module, query, key, value, says, sequences, **options), None
        Maskless.refuse()  # what `says` is of the whole row
        # (torch.compile need not know about the patch, and is asked first)
        ours = not torch.compiler.is_compiling() and patch.on and kernels.fast() and not args
        ours = ours and not _why_not(module, key, options) and not _wants_weights(module, options)
        if says is not None and ours and takes(query, key, value):
            return sink_attention(query, key, value, options["s_aux"], options["scaling"], says.window), None
        mask = attention_mask if unbuilt is None else unbuilt.built()
        return original(module, query, key, value, mask, *args, **options)

    return attention


def _in_sequences(
    module: Any, query: Tensor, key: Tensor, value: Tensor, says: Causal | None, sequences: Sequences, **options: Any
) -> Tensor:
    """Attention within the sequences of a packed row.

    Raises:
        RuntimeError: the sequences cannot be kept apart, and nothing else would.
    """
    why_not = _why_not(module, key, options)
    if says is None or why_not or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        why_not = why_not or "any other than causal attention within one row"
        raise RuntimeError(f"Attention with sinks in packed rows does not know {why_not}")
    Maskless.calls += 1
    return sink_attention(query, key, value, options["s_aux"], options["scaling"], says.window, *sequences)


def _why_not(module: Any, key: Tensor, options: dict[str, Any]) -> str | None:
    """What of a call is not computed here."""
    sinks = options.get("s_aux")
    foreign = [name for name in FOREIGN if name != "s_aux" and options.get(name) is not None]
    if foreign:
        return ", ".join(foreign)
    if options.get("dropout") and module.training:
        return "dropout of attention's weights"
    # (functions read the sinks from the one place or from the other)
    if not isinstance(sinks, Tensor) or sinks.dim() != 1 or getattr(module, "sinks", sinks) is not sinks:
        return "sinks of this kind"
    groups = getattr(module, "num_key_value_groups", None)
    if not isinstance(options.get("scaling"), float) or groups is None or sinks.shape[0] != key.shape[1] * groups:
        return "heads or scores of this kind"
    return None


def _wants_weights(module: Any, options: dict[str, Any]) -> bool:
    """Whether somebody has asked for attention's weights, which flash attention never has."""
    config = getattr(module, "config", None)
    return bool(options.get("output_attentions") or getattr(config, "output_attentions", False))
