"""What an experts module does between its two products, recognised by what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from theodora.kernels.experts import Between
from theodora.kernels.gated import ACTIVATIONS, activate
from theodora.kernels.parts import Gate

KNOWN = "_theodora_gate"
"""Where a module keeps what was found out."""
_FEATURES = 5


def gate_of(experts: Any) -> Gate | Between | None:
    """The gate as our kernels compute it, or else the module's own code; None if nobody may run that on its own.

    Which of them is found out once for each module, on numbers of a CPU.
    """
    if getattr(experts, "has_post_expert_norm", False):
        return None
    settings = (getattr(experts, "limit", None), getattr(experts, "alpha", None), getattr(experts, "act_fn", None))
    known = experts.__dict__.get(KNOWN)
    if known is None or known[0] != settings:
        known = experts.__dict__[KNOWN] = (settings, _recognised(experts, *settings[:2]))
    if known[1] is not None:
        return known[1]
    act = settings[2]
    if isinstance(act, nn.Module) and any(p.requires_grad for p in act.parameters()):
        return None
    return experts._apply_gate if experts.has_gate else experts.act_fn


def _recognised(experts: Any, limit: Any, alpha: Any) -> Gate | None:
    if not experts.has_gate:
        return None
    # Beyond any limit, and on both sides of it, gate and up apart from one another.
    y = torch.randn(64, 2 * _FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 6
    try:
        with torch.no_grad():
            own = experts._apply_gate(y)
    except Exception:  # it needs more than numbers: then its own code runs
        return None
    numbers = [float(n) if isinstance(n, int | float) else 1.0 for n in (alpha, limit)]
    for in_turns in (False, True):
        for activation in ACTIVATIONS:
            for scale in dict.fromkeys((1.0, numbers[0])):
                for limited in (False, True) if isinstance(limit, int | float) else (False,):
                    for offset in (0.0, 1.0):
                        most = numbers[1] if limited else 0.0
                        gate = Gate(activation, in_turns, scale, most, limited, offset)
                        found = apply(gate, y)
                        if own.shape == found.shape and torch.allclose(own, found, rtol=1e-9, atol=1e-12):
                            return gate
    return None


def apply(gate: Gate, y: torch.Tensor) -> torch.Tensor:
    """h, (S, I), of gate and up, (S, 2·I), in plain torch."""
    one, other = (y[:, ::2], y[:, 1::2]) if gate.in_turns else y.chunk(2, dim=1)
    if gate.limited:
        one, other = one.clamp(max=gate.limit), other.clamp(-gate.limit, gate.limit)
    return activate(one * gate.alpha, gate.activation) / gate.alpha * (other + gate.offset)
