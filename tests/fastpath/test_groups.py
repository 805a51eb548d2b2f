"""Layers that read the same x: one step for all of them, and nothing held once each has its output."""

import pytest
import torch

from formula import DEVICE
from steps import FAST, adapted, needs_triton
from theodora import kernels
from theodora.fastpath.accelerate import speed_up_model
from theodora.layers.linear import GROUP


@needs_triton
def test_one_step_computes_all_and_leaves_nothing(monkeypatch):
    attention = adapted().model.layers[0].self_attn
    speed_up_model(attention)
    group, steps, own = attention.q_proj.__dict__[GROUP], [], kernels.adapted_linears
    monkeypatch.setattr(kernels, "adapted_linears", lambda *args, **how: steps.append(how) or own(*args, **how))
    x = torch.randn(2, 3, 32, device=DEVICE)
    for batch in (1, 2):
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            layer(x)
        assert len(steps) == batch
        assert steps[-1]["stack"] is group.stack is not None
        assert group._ready == ((None,), {})


@needs_triton
@pytest.mark.parametrize(("tokens", "layers"), [(64, [1, 1, 1]), (65, [3])])
def test_few_tokens_without_gradients_are_decoded_layer_by_layer(tokens, layers, monkeypatch):
    attention = adapted().model.layers[0].self_attn
    speed_up_model(attention)
    steps, own = [], kernels.adapted_linears
    monkeypatch.setattr(
        kernels, "adapted_linears", lambda x, found, *a, **k: steps.append(len(found)) or own(x, found, *a, **k)
    )
    x = torch.randn(1, tokens, 32, device=DEVICE)
    with torch.no_grad():
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            layer(x)
    assert steps == layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_move_only_where_kernels_can_use_it(dtype):
    attention = adapted(dtype=dtype).model.layers[0].self_attn
    before = attention.k_proj.weight.data_ptr()
    speed_up_model(attention)
    moved = attention.k_proj.weight.data_ptr() != before
    assert moved is (FAST and dtype == torch.float32)
