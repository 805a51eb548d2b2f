"""Models with sinks on the fast path are the same models: logits, gradients, windows, masks and packed rows."""

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from formula import DEVICE, error
from theodora import AdapterConfig, accelerate, inject_adapter
from theodora.fastpath import sinks
from theodora.fastpath.masks import whole_rows
from theodora.kernels.sink_attention import sink_attention_reference

GPU = DEVICE == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
ROUNDING = 5e-2 if GPU else 1e-5


def tiny(**options):
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    kinds = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    model = GptOssForCausalLM(GptOssConfig(**sizes, **heads, **{**kinds, **options})).to(DEVICE, DTYPE)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
        for name in ("q_proj", "k_proj"):  # scores that differ
            torch.nn.init.normal_(getattr(layer.self_attn, name).weight, std=0.5)
    return model.train()


@pytest.fixture
def calls(monkeypatch):
    """The windows and bounds that ours was asked for; without a GPU it stands in plain torch."""
    made = []

    def attention(*args):
        made.append((args[5], args[6] if len(args) > 6 else None))
        return (sinks_attention if GPU else sink_attention_reference)(*args)

    sinks_attention = sinks.sink_attention
    monkeypatch.setattr(sinks, "sink_attention", attention)
    if not GPU:
        monkeypatch.setattr(sinks, "takes", lambda *_: True)
    return made


def outcome(model, ids, **others):
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False, **others).logits
    logits.float().square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(found, expected):
    assert len(found) == len(expected)
    return all(error(one, other.double()) < ROUNDING for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("trained", ["adapter", "everything"])
def test_whole_rows(trained, calls):
    model, ids = tiny(), torch.randint(3, 128, (3, 12), device=DEVICE)
    if trained == "adapter":
        inject_adapter(model, AdapterConfig(method="dora", rank=2, targets=["q_proj", "v_proj"]))
    expected = outcome(model, ids)
    assert trained == "adapter" or model.model.layers[0].self_attn.sinks.grad.abs().sum() > 0
    accelerate(model)
    with whole_rows():
        found = outcome(model, ids)
    assert calls == [(5, None), (None, None)]
    assert same(found, expected)
