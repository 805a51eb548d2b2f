"""Layers that read the same x: one step for all of them, and nothing held once each has its output."""

import torch

from formula import DEVICE
from steps import adapted, needs_triton
from theodora import kernels
from theodora.adapters.accelerate import install
from theodora.layers.groups import GROUP


@needs_triton
def test_one_step_computes_all_and_leaves_nothing(monkeypatch):
    attention = adapted().model.layers[0].self_attn
    install(attention)
    group, steps, own = attention.q_proj.__dict__[GROUP], [], kernels.adapted_linears
    monkeypatch.setattr(kernels, "adapted_linears", lambda *args, **how: steps.append(how) or own(*args, **how))
    x = torch.randn(2, 3, 32, device=DEVICE)
    for batch in (1, 2):
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            layer(x)
        assert len(steps) == batch
        assert steps[-1]["stack"] is group.stack is not None
        assert group._ready == ((None,), {})
