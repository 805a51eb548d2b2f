"""Under autocast an adapted layer does what `nn.Linear` does: products and outputs in autocast's dtype, norms wide."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import formula
from theodora import AdapterConfig, accelerate_peft, inject_adapter, kernels, merge_adapter
from theodora.autocast import autocast_dtype
from theodora.fastpath.activation import FastGELU
from theodora.fastpath.norm import FastRMSNorm
from theodora.functional import dora_norm, merged_weight
from theodora.kernels.cross_entropy import linear_cross_entropy
from theodora.kernels.routed import Routes
from theodora.layers.swap import autocast_changes
from theodora.serve.slotted import Routing, prepare_slots, slot
from tiny import tiny_model

BF16 = torch.bfloat16
IDS = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))


def moved(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def injected(model, method="dora", **config):
    return inject_adapter(model, AdapterConfig(method=method, rank=4, **config))


def kept_for_backward(run):
    """Bytes of all memory that autograd saves while `run` runs."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_fresh_adapter_on_a_whole_model_is_the_base(family, dtype, method):
    base = tiny_model(family, dtype=dtype)
    model = injected(copy.deepcopy(base), method).train()
    with torch.autocast("cpu", BF16):
        expected = base(IDS).logits
        found = model(IDS).logits
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, expected)
        with kernels.reference():
            assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype
    found.float().square().mean().backward()


def test_no_more_is_kept_than_peft_keeps():
    sizes = []
    base = tiny_model("llama", hidden_size=64, intermediate_size=160)
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules="all-linear", use_dora=True))
    for model in (injected(base).train(), theirs.train()):
        with torch.autocast("cpu", BF16):
            sizes.append(kept_for_backward(lambda model=model: model(IDS).logits))
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("way", ["fast", "reference"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16, torch.float64])
def test_an_adapted_layer_is_the_formula(dtype, kind, way):
    torch.manual_seed(0)
    module = nn.Linear(48, 40) if kind == "linear" else Conv1D(40, 48)
    nn.init.normal_(module.weight, std=0.2)
    nn.init.normal_(module.bias)
    model = moved(injected(nn.Sequential(module).to(dtype), targets=("0",)))
    layer, adapter = model[0], model[0].active
    x = torch.randn(5, 7, 48, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", BF16):
        if way == "fast":
            y = layer(x)
        else:
            with kernels.reference():
                y = layer(x)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else BF16)  # autocast leaves float64 alone
    w = layer.current_weight.dense().double()
    a, b = (t.double() for t in adapter.factors())
    exact = formula.dora(x.double(), w, layer.bias.double(), a, b, adapter.scale, adapter.magnitude.double())
    assert formula.error(y, exact) < (1e-12 if dtype == torch.float64 else 0.01)
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert all(p.grad.dtype == p.dtype for p in adapter.parameters())


@pytest.mark.parametrize("way", ["fast", "reference"])
def test_the_adapters_own_mathematics_stays_wide(way):
    """A norm of bfloat16 products is off by a thousandth."""
    model = moved(injected(nn.Sequential(nn.Linear(64, 48)), targets=("0",)))
    layer, adapter = model[0], model[0].active
    a, b = (t.detach().double() for t in adapter.factors())
    exact = (layer.weight.double() + adapter.scale * b @ a).norm(dim=1)
    with torch.autocast("cpu", BF16):
        if way == "fast":
            norm = layer.norm(adapter)
        else:
            with kernels.reference():
                norm = layer.norm(adapter)
        again = dora_norm(layer.weight, adapter.lora_A, adapter.lora_B, adapter.scale)
        merged = merged_weight(layer.weight, adapter.lora_A, adapter.lora_B, adapter.scale)
    for found in (norm, again):
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
    assert merged.dtype == torch.float32
    assert formula.error(merged, layer.weight.double() + adapter.scale * b @ a) < 1e-6


def test_merging_under_autocast_is_exact():
    model = moved(injected(nn.Sequential(nn.Linear(64, 48)), targets=("0",)))
    expected = model[0].merged_weight("default")
    with torch.autocast("cpu", BF16):
        merge_adapter(model)
    assert torch.equal(model[0].weight, expected)


def test_a_backward_within_autocast_is_the_one_without():
    layer = moved(injected(nn.Sequential(nn.Linear(24, 16)), targets=("0",)))
    x, gradients = torch.randn(6, 24, requires_grad=True), []
    for inside in (False, True):
        y = layer(x)
        with torch.autocast("cpu", BF16, enabled=inside):
            gradients.append(torch.autograd.grad(y.sum(), [x, *(p for p in layer.parameters() if p.requires_grad)]))
    assert all(torch.equal(plain, found) for plain, found in zip(*gradients, strict=True))


def test_embeddings_keep_their_dtype_as_lookups_do():
    base = nn.Sequential(nn.Embedding(20, 16))
    model = moved(injected(copy.deepcopy(base), targets=("0",)))
    ids = torch.arange(20)
    exact = model[0].merged_weight("default").double().T
    with torch.autocast("cpu", BF16):
        assert model(ids).dtype == base(ids).dtype == torch.float32
        assert formula.error(model(ids), exact) < 1e-6


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_slotted_layers(dtype, kind, method):
    torch.manual_seed(0)
    module = {"linear": nn.Linear(48, 40), "conv1d": Conv1D(40, 48), "embedding": nn.Embedding(48, 40)}[kind].to(dtype)
    adapter = moved(injected(nn.Sequential(copy.deepcopy(module)), method, targets=("0",)))[0]
    low = adapter.active
    routing = Routing(2)
    layer = slot(copy.deepcopy(module), routing, 4)
    magnitudes = None if low.magnitude is None else [low.magnitude.detach()]
    (tensors,) = prepare_slots([layer], [low.lora_A.detach()], [low.lora_B.detach()], magnitudes, low.scale)
    layer.fill(1, tensors)
    x = torch.arange(6) if kind == "embedding" else torch.randn(6, 48, dtype=dtype)
    routing.set(torch.tensor([0, 0, 1, 1, 0, 1]))
    assert isinstance(routing.tokens, Routes)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        found, plain, adapted = layer(x), module(x), adapter(x)
    assert found.dtype == plain.dtype == adapted.dtype
    chosen = torch.tensor([False, False, True, True, False, True])[:, None]
    assert formula.error(found, torch.where(chosen, adapted, plain).double()) < 0.01


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_pefts_accelerated_layers_give_pefts_dtype(dtype, use_dora):
    theirs = get_peft_model(
        tiny_model("qwen2", dtype=dtype), LoraConfig(r=4, target_modules="all-linear", use_dora=use_dora)
    )
    ours = copy.deepcopy(theirs)
    accelerate_peft(ours)
    layers = [m.base_model.model.model.layers[0].self_attn.q_proj for m in (theirs, ours)]
    for x_dtype in (torch.float32, BF16, torch.float16):
        x = torch.randn(3, 32, dtype=x_dtype)
        with torch.autocast("cpu", BF16):
            assert [layer(x).dtype for layer in layers] == [BF16, BF16]


def test_a_fresh_dora_of_peft_is_the_base_there_too():
    base = tiny_model("qwen2")
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules="all-linear", use_dora=True))
    accelerate_peft(model)
    with torch.autocast("cpu", BF16):
        assert torch.equal(model(IDS).logits, base(IDS).logits)


def test_what_autocast_does_to_a_tensor():
    x = torch.zeros(2)
    assert autocast_dtype(x) is None
    with torch.autocast("cpu", BF16):
        assert autocast_dtype(x) == BF16
        assert autocast_dtype(x.double()) is None
        assert autocast_dtype(torch.zeros(2, device="meta")) is None
        with torch.autocast("cpu", enabled=False):
            assert autocast_dtype(x) is None


def test_the_fused_loss_leaves_float64_alone():
    h, w, labels = torch.randn(3, 8).double(), torch.randn(11, 8).double(), torch.tensor([1, 2, 10])
    with torch.autocast("cpu", BF16):
        found = linear_cross_entropy(h, w, labels).nats
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, F.cross_entropy(h @ w.T, labels, reduction="sum"), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [FastRMSNorm, FastGELU])
def test_modules_that_autocast_computes_in_float32_stay_so(kind):
    """CUDA's autocast widens norms and powers; a kernel in the module's place must not give another dtype."""
    module = kind()
    x = torch.zeros(2, 4, dtype=BF16)
    for given, changed in ((torch.float32, True), (BF16, False)):
        module.__dict__.pop("_theodora_autocast", None)

        def forward(t, given=given):
            assert t.shape[0] == 0  # nothing is computed to find out
            return t.to(given)

        assert not autocast_changes(module, forward, x)
        with torch.autocast("cpu", BF16):
            assert autocast_changes(module, forward, x) == changed
            assert not autocast_changes(module, forward, x.float())
