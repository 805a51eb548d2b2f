"""Magnitudes of q, k and v learn from what attention keeps, and from nothing else where that could be wrong."""

import gc
import sys
import weakref

import pytest
import torch
from torch.autograd.graph import save_on_cpu
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from formula import DEVICE
from steps import IDS, adapted, calls_of, expected, moved, needs_triton, same, step
from theodora import AdapterConfig, inject_adapter
from theodora.adapters.state import trained_tensors
from theodora.fastpath import attention as attention_file
from theodora.fastpath.accelerate import restore_model, speed_up_model
from theodora.fastpath.attention import keep_attention
from theodora.kernels import fused, rotary
from theodora.layers.linear import GROUP
from tiny import tiny_model

pytestmark = needs_triton


@pytest.fixture
def from_outputs(monkeypatch):
    """Counts the layers whose gradients came from outputs."""
    return calls_of(monkeypatch, fused, "compose_backward_from_output")


def attention(model):
    return model.model.layers[0].self_attn


@pytest.mark.parametrize(("family", "layers"), [("llama", 6), ("mistral", 6), ("gemma", 6), ("qwen2", 0)])
def test_outputs_stand_in_where_there_is_no_bias(family, layers, from_outputs):
    model = adapted(family, blocks=2)
    wanted = expected(model)
    speed_up_model(model)
    same(step(model), wanted)
    assert from_outputs[0] == layers


def test_only_layers_with_an_adapter_count(from_outputs):
    model = adapted(targets=["q_proj", "v_proj"])
    wanted = expected(model)
    speed_up_model(model)
    same(step(model), wanted)
    assert from_outputs[0] == 2


@pytest.mark.parametrize(("family", "settings"), [("qwen3", {}), ("olmo", {"clip_qkv": 0.5})])
def test_outputs_that_are_not_turned_as_they_are(family, settings, from_outputs):
    """Qwen3 turns normed copies, OLMo clamps q, k and v where they lie; the first step has to find out."""
    model = moved(inject_adapter(tiny_model(family, num_hidden_layers=1, **settings).to(DEVICE), AdapterConfig(rank=3)))
    wanted = expected(model)
    speed_up_model(model)
    for _ in range(2):
        same(step(model), wanted)
    assert from_outputs[0] == 0
    assert not attention(model).q_proj.__dict__[GROUP].shared.possible


def test_rows_whose_magnitude_is_zero(from_outputs):
    model = adapted()
    with torch.no_grad():
        for name, tensor in trained_tensors(model).items():
            if "magnitude" in name and ("q_proj" in name or "v_proj" in name):
                tensor[[0, 2]] = 0
    wanted = expected(model)
    speed_up_model(model)
    same(step(model), wanted)
    assert from_outputs[0] == 3


@pytest.mark.parametrize("factor", [1e-2, 1e-5, 1e-9])
def test_rows_whose_magnitude_is_small(factor, from_outputs):
    """Turning mixes a row with its partner: what was turned could not tell them apart any more."""
    model = adapted()
    with torch.no_grad():
        for name, tensor in trained_tensors(model).items():
            if "magnitude" in name and ("q_proj" in name or "k_proj" in name):
                tensor[0] *= factor
    wanted = expected(model)
    speed_up_model(model)
    found = step(model)
    same(found, wanted)
    magnitudes = [name for name in wanted if "magnitude" in name and ("q_proj" in name or "k_proj" in name)]
    for name in magnitudes:
        torch.testing.assert_close(found[name][0], wanted[name][0], rtol=1e-3, atol=1e-9)
    assert len(magnitudes) == 2
    assert from_outputs[0] == 3


def test_attention_keeps_nothing_that_was_turned(from_outputs, monkeypatch):
    """q and k are there once while the graph is, and are turned again in the backward pass."""
    turned, turns, own = [], [0], attention_file.turn

    def counted(*args):
        turns[0] += 1
        turned.append(weakref.ref(y := own(*args)))
        return y

    model = adapted()
    wanted = expected(model)
    speed_up_model(model)
    monkeypatch.setattr(attention_file, "turn", counted)
    monkeypatch.setattr(rotary, "turn", counted)
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    assert turns[0] == 2  # q and k
    assert [t for t in turned if t() is not None] == []
    loss.backward()
    assert turns[0] == 6 or DEVICE == "cuda"  # forward, again, and back (torch's slow attention keeps other tensors)
    same({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}, wanted)


def test_what_was_turned_and_then_written_to_is_kept(from_outputs, monkeypatch):
    """As a model does that scales its queries in place."""
    model = adapted()
    speed_up_model(model)
    file = sys.modules[type(attention(model)).__module__]
    own = file.apply_rotary_pos_emb

    def scaled(*args, **kwargs):
        q, k = own(*args, **kwargs)
        return q.mul_(2), k

    monkeypatch.setattr(file, "apply_rotary_pos_emb", scaled)
    same(step(model), expected(model))
    assert from_outputs[0] == 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_as_before_once_undone(attention):
    model = adapted()
    model.config._attn_implementation = attention
    keep_attention.cache_clear()
    gc.collect()  # models of other tests, which count as users until then
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    speed_up_model(model)
    wanted = expected(model)
    same(step(model), wanted)
    restore_model(model)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    same(step(model), wanted)


@pytest.mark.parametrize("where", ["q_proj", "k_proj", "v_proj"])
def test_a_hook_that_writes_in_place(where, from_outputs):
    model = adapted()
    for block in model.model.layers:
        getattr(block.self_attn, where).register_forward_hook(lambda module, inputs, y: y.mul_(2))
    wanted = expected(model)
    speed_up_model(model)
    for _ in range(2):
        same(step(model), wanted)


def test_an_output_that_a_stranger_wrote_to_is_not_trusted(from_outputs, monkeypatch):
    """As a patched attention does that turns q and k in place by a kernel of its own, which autograd does not see."""
    model = adapted()
    speed_up_model(model)
    file = sys.modules[type(attention(model)).__module__]
    own = file.apply_rotary_pos_emb.__wrapped__

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, turn):
            ctx.turn = turn
            x.data.copy_(turn(x.detach()))
            return x.view_as(x)

        @staticmethod
        def backward(ctx, dy):
            with torch.enable_grad():
                x = torch.zeros_like(dy).requires_grad_()
                return torch.autograd.grad(ctx.turn(x), x, dy)[0], None

    def stranger(q, k, cos, sin, *args, **kwargs):
        return tuple(InPlace.apply(x, lambda t: own(t, t, cos, sin)[0]) for x in (q, k))

    monkeypatch.setattr(file, "apply_rotary_pos_emb", stranger)
    found = step(model)
    monkeypatch.undo()
    same(found, expected(model))
    assert from_outputs[0] == 0


def test_saved_tensors_that_travel(from_outputs):
    """Copies made when they were saved are from before q and k were turned."""
    model = adapted()
    wanted = expected(model)
    speed_up_model(model)
    with save_on_cpu():
        found = step(model)
    same(found, wanted)
    assert from_outputs[0] == 0


def test_an_output_nobody_used(from_outputs):
    model = adapted()
    speed_up_model(model)
    layer, x = attention(model), torch.randn(2, 5, model.config.hidden_size, device=DEVICE)
    found = {}
    for name, fast in (("fast", True), ("slow", False)):
        if not fast:
            restore_model(model)
        model.zero_grad()
        q, k, _ = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
        (q.sum() + k.square().sum()).backward()
        found[name] = {
            n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None and "v_proj" not in n
        }
    same(found["fast"], found["slow"])
    assert from_outputs[0] == 0
