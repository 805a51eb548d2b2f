"""What people and libraries see of PEFT's layers while `accelerate_peft` runs them: names, statuses, caches, bits."""

import copy
import io
import pickle

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import DoraCaching
from peft.tuners.lora.layer import Linear
from torch import nn

from theodora import ConfigError, accelerate_peft, kernels, restore_peft
from theodora.fastpath.peft_layer import FastPeftLinear
from tiny import tiny_model

IDS = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))


def peft_model(family="llama", *, dtype=torch.float32, moved=True, **config):
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": "all-linear", "fan_in_fan_out": family == "gpt2", "use_dora": True} | config
    model = get_peft_model(tiny_model(family, dtype=dtype), LoraConfig(**settings))
    if moved:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.add_(torch.randn(p.shape).to(p), alpha=0.05)
    return model


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


def logits(model):
    return model(input_ids=IDS).logits


def test_layers_keep_their_class_s_name():
    model = peft_model()
    shown, status = repr(model), model.get_layer_status()
    names = [(type(m).__name__, type(m).__qualname__, type(m).__module__) for m in layers_of(model)]
    accelerate_peft(model)
    assert "FastPeftLinear" not in repr(model)
    assert repr(layers_of(model)[0]).startswith("lora.Linear(")
    assert {one.module_type for one in model.get_layer_status()} == {"lora.Linear"}
    assert model.get_layer_status() == status
    assert [(type(m).__name__, type(m).__qualname__, type(m).__module__) for m in layers_of(model)] == names
    assert all(isinstance(layer, FastPeftLinear) for layer in layers_of(model))
    restore_peft(model)
    assert repr(model) == shown
    assert {type(layer) for layer in layers_of(model)} == {Linear}


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), "torch.save"])
def test_layers_of_another_name_are_copied(way):
    layer = accelerated_layer()
    if way == "torch.save":
        torch.save(layer, buffer := io.BytesIO())
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = way(layer)
    assert type(twin) is FastPeftLinear
    x = torch.randn(3, 32)
    assert torch.equal(twin(x), layer(x))
    restore_peft(twin)
    assert type(twin) is Linear


def accelerated_layer():
    model = peft_model()
    accelerate_peft(model)
    return layers_of(model)[0].eval()


def test_layers_that_another_library_has_reclassed_are_still_told():
    model = peft_model()
    accelerate_peft(model)
    layer = layers_of(model)[0]
    layer.__class__ = type("FSDPLinear", (FastPeftLinear,), {})
    with pytest.raises(ConfigError, match="FSDPLinear"):
        restore_peft(model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dora_caching(family):
    """PEFT's rule: filled in eval mode within the context, read until training or a pass outside clears it."""
    slow = peft_model(family)
    fast = copy.deepcopy(slow)
    accelerate_peft(fast)

    def caches(model):
        return [layer.lora_magnitude_vector["default"]._dora_cache for layer in layers_of(model)]

    for model in (slow, fast):
        logits(model.eval())
        assert not any(caches(model))
        with DoraCaching():
            logits(model.train())
            assert not any(caches(model))
            first = logits(model.eval())
            assert {tuple(cache) for cache in caches(model)} == {("lora-weight-default", "weight-norm-default")}
            assert torch.equal(logits(model), first)
    for ours, theirs in zip(caches(fast), caches(slow), strict=True):
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-7)
    with DoraCaching():
        torch.testing.assert_close(logits(fast), logits(slow), rtol=1e-5, atol=1e-5)
        for model in (slow, fast):  # what is kept is what is used
            for cache in caches(model):
                cache["weight-norm-default"].mul_(2)
        torch.testing.assert_close(logits(fast), logits(slow), rtol=1e-5, atol=1e-5)
        for model in (slow, fast):
            logits(model.train().eval())
        torch.testing.assert_close(logits(fast), logits(slow), rtol=1e-5, atol=1e-5)
    for model in (slow, fast):
        logits(model)
        assert not any(caches(model))


def test_a_cache_that_we_filled_serves_peft():
    model = peft_model().eval()
    expected = logits(model)
    accelerate_peft(model)
    with DoraCaching():
        logits(model)
        restore_peft(model)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.5}, {"use_dora": False}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_fresh_adapter_has_the_base_s_bits(family, config):
    base = tiny_model(family)
    model = peft_model(family, moved=False, **config)
    accelerate_peft(model)
    for mode in (True, False):
        model.train(mode)
        assert torch.equal(logits(model), logits(base))
        with torch.no_grad():
            assert torch.equal(logits(model), logits(base))
        with kernels.reference():
            assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fresh_adapter_of_half_precision_too_where_it_has_pefts(dtype):
    """With adapters of the model's dtype PEFT rounds norm and magnitude alike, and its start is the base."""
    torch.manual_seed(0)
    base = tiny_model("qwen2", dtype=dtype)
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=True)
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    assert torch.equal(logits(model), logits(base))
    accelerate_peft(model)
    assert torch.equal(logits(model), logits(base))


def test_dropout_modules_are_heeded():
    model = peft_model(lora_dropout=0.5).train()
    accelerate_peft(model)
    assert not torch.equal(logits(model), logits(model))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    assert torch.equal(logits(model), logits(model))


def test_the_supported_version_has_what_we_use():
    dora = peft.tuners.lora.dora
    assert dora.ENABLE_DORA_CACHING is False
    assert {"_dora_cache", "_cache_clear"} <= {*dir(dora.DoraLinearLayer(False))}
