"""The state before an MLP is made again from what is kept, to the bit, and kept where that could be wrong."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from formula import DEVICE
from steps import IDS, adapted, expected, needs_triton, same, step
from theodora.fastpath.accelerate import speed_up_model
from theodora.kernels import fused, gated_mlp, rms_norm
from theodora.kernels.operators import interpreted

pytestmark = needs_triton


@pytest.fixture
def made(monkeypatch):
    """Counts the states that were made again."""
    count = [0]
    for module in (fused, gated_mlp):

        def counted(*args, own=module._output_onto):
            count[0] += 1
            return own(*args)

        monkeypatch.setattr(module, "_output_onto", counted)
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_gradients_are_those_of_a_kept_state_to_the_bit(family, dtype, made, monkeypatch):
    if dtype == torch.bfloat16 and interpreted():
        pytest.skip("Triton's interpreter cuts off where torch rounds")
    model = adapted(family, blocks=3, dtype=dtype)
    speed_up_model(model)
    found = step(model)
    # States of three blocks, and the last norm's: h'₀, which the first norm with a gradient reads, is kept, and what
    # comes fourth behind it.
    assert made[0] == 4
    monkeypatch.setattr(rms_norm, "remade", lambda x: None)
    kept = step(model)
    assert made[0] == 4
    for name, value in kept.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("way", [True, False])
def test_nobody_holds_the_state(way, monkeypatch):
    if not way:
        monkeypatch.setattr(rms_norm, "remade", lambda x: None)
    model, states = adapted(blocks=2), []
    speed_up_model(model)
    norm = model.model.layers[1].post_attention_layernorm
    own = rms_norm.fast_forward

    def watched(module, style, x, original):
        if module is norm:
            states.append(weakref.ref(x.untyped_storage()))
        return own(module, style, x, original)

    monkeypatch.setattr("theodora.fastpath.norm.fast_forward", watched)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    gc.collect()
    assert (states[0]() is None) == way
    loss.backward()


class Between(nn.Module):
    def __init__(self, layer, change):
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, *args, **kwargs):
        states, *rest = self.layer(*args, **kwargs)
        return self.change(states), *rest


@pytest.mark.parametrize(
    ("change", "states"),
    [
        (lambda x: x, 3),
        (lambda x: 2 * x, 2),
        (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), 2),
        (lambda x: x[:, :1], 2),
    ],
    ids=["nothing", "a scale", "a copy", "a part"],
)
def test_what_stands_between_a_layer_and_the_sum_is_not_passed_over(change, states, made):
    model = adapted(blocks=2)
    block = model.model.layers[1]
    block.self_attn = Between(block.self_attn, change)
    wanted = expected(model)
    speed_up_model(model)
    same(step(model), wanted)
    assert made[0] == states


def test_hooks_on_what_is_saved_keep_it(made):
    model = adapted(blocks=2)
    wanted = expected(model)
    speed_up_model(model)
    with save_on_cpu():
        same(step(model), wanted)
    assert made[0] == 0


def test_the_last_norm_asks_nothing_of_a_block_that_hooks_have_taken_from(made):
    """As where blocks are checkpointed and the norm behind them is not: what they saved may be read once only."""
    model, own = adapted(blocks=2), type(adapted().model.layers[0]).forward
    wanted = expected(model)
    speed_up_model(model)

    def taken(block, *args, **kwargs):
        with save_on_cpu():
            return own(block, *args, **kwargs)

    for block in model.model.layers:
        block.forward = taken.__get__(block)
    same(step(model), wanted)
    assert made[0] == 0


@pytest.mark.parametrize(
    ("parts", "states"), [(["layers.1"], 4), (["layers.0", "layers.1", "layers.2", "layers.3"], 0),
                          (["layers.1.mlp", "layers.2.self_attn"], 6), (["layers.1.post_attention_layernorm"], 5)],
    ids=["a block", "all blocks", "modules", "a norm"],
)  # fmt: skip
def test_what_is_checkpointed_is_left_alone(parts, states, made):
    model = adapted(blocks=4)
    model.enable_input_require_grads()
    wanted = expected(model)
    speed_up_model(model)
    for part in parts:
        module = model.model.get_submodule(part)
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    same(step(model), wanted)
    assert made[0] == states


def test_half_precision_added_to_float32_is_not_made_again(made):
    model = adapted(blocks=2)
    speed_up_model(model)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = step(model)
    assert made[0] == 0
    assert all(bool(value.isfinite().all()) for value in found.values())
