"""Did training reach every tensor it should have? Elsewhere "trained as something else" goes unnoticed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from theodora.errors import TheodoraError, bullet_list


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """A hash of the bits of each tensor."""
    return {name: int(torch.hash_tensor(tensor.detach()).item()) for name, tensor in tensors.items()}


def check_moved(
    tensors: Mapping[str, nn.Parameter],
    before: Mapping[str, int],
    updates: int,
    after: Mapping[str, int] | None = None,
) -> list[str]:
    """Check that training moved the tensors and left them finite.

    A single tensor may rest: an expert that no token was routed to has no gradient. When all tensors of one kind rest
    (all `lm_head.lora_B`, say), the loss does not depend on them, and that is an error.

    Args:
        tensors: name -> trained tensor.
        before: their fingerprints before training.
        updates: optimizer steps at a learning rate above 0.
        after: their fingerprints when training ended, if they have been changed since.

    Returns:
        Names of single tensors that rest.

    Raises:
        TheodoraError: naming the tensors that are not finite, or the kinds that rest.
    """
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise TheodoraError("Training has diverged; these tensors hold NaN or infinite values:" + bullet_list(bad[:12]))
    # B starts at zero, so A has no gradient until B has moved.
    due = [name for name in tensors if updates >= (2 if name.endswith("lora_A") else 1)]
    after = after or fingerprints({name: tensors[name] for name in due})
    resting = [name for name in due if after[name] == before[name]]
    kinds = _kinds(due)
    frozen = [kind for kind, names in _kinds(resting).items() if len(names) == len(kinds[kind])]
    if frozen:
        raise TheodoraError(
            f"Training left these tensors frozen in all {updates} steps, so the adapter is not what was asked for:"
            + bullet_list(frozen)
            + "\nIs the learning rate far too small, or does the loss bypass these modules?"
        )
    return resting


def _kinds(names: Iterable[str]) -> dict[str, list[str]]:
    """`model.layers.3.self_attn.q_proj.lora_B` -> `q_proj.lora_B`."""
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[".".join(name.split(".")[-2:])].append(name)
    return kinds
