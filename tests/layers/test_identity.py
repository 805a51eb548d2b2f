"""A fresh adapter has its base's bits: in every dtype, on every path, with biases, saved and loaded again."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import formula
from theodora import (
    AdapterConfig,
    accelerate,
    adapter_disabled,
    inject_adapter,
    kernels,
    load_adapter,
    quantize_base,
    save_adapter,
)
from theodora.layers import AdapterLayer, start_norm
from theodora.serve.slotted import Routing, prepare_slots, slot
from tiny import tiny_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IDS = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))


def scales(model):
    """g of every row of every layer."""
    layers = [m for m in model.modules() if isinstance(m, AdapterLayer)]
    return torch.cat([(m.active.magnitude / m.norm(m.active)).detach().double() for m in layers])


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi", "gpt_neox"])
def test_whole_models(family, dtype, method):
    base = tiny_model(family, dtype=dtype)
    model = inject_adapter(copy.deepcopy(base), AdapterConfig(method=method, rank=4))
    expected = base(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
    with torch.inference_mode():
        assert torch.equal(model(IDS[:, :1]).logits, base(IDS[:, :1]).logits)
    with kernels.reference():
        assert torch.equal(model(IDS).logits, expected)
    if method == "dora":
        assert bool((scales(model) == 1).all())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("init", ["default", "gaussian", "pissa", "olora"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_of_real_width(dtype, init, method, bias):
    """Sums of 576 products come in blocks, where a bias that is added afterwards is rounded elsewhere."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(576, 300, bias=bias), Conv1D(80, 300)).to(dtype)
    base = copy.deepcopy(net)
    inject_adapter(net, AdapterConfig(method=method, rank=8, init=init, targets=("0", "1")))
    for shape in ((94, 576), (2, 31, 576), (1, 1, 576), (576,)):
        x = torch.randn(shape).to(dtype)
        expected = base(x)
        assert torch.equal(net(x), expected)
        with torch.no_grad():
            assert torch.equal(net(x), expected)
        with kernels.reference():
            assert torch.equal(net(x), expected)


@pytest.mark.parametrize("way", ["fast", "reference"])
@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_its_gradients_are_those_of_the_formula(dtype, init, way):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 24)).to(dtype)
    inject_adapter(net, AdapterConfig(rank=4, init=init, targets=("0",)))
    layer, adapter = net[0], net[0].active
    x, dy = torch.randn(7, 32, dtype=dtype, requires_grad=True), torch.randn(7, 24, dtype=dtype)
    if way == "fast":
        net(x).backward(dy)
    else:
        with kernels.reference():
            net(x).backward(dy)
    wide = [t.detach().double().requires_grad_() for t in (x, adapter.lora_A, adapter.lora_B, adapter.magnitude)]
    xs, a, b, m = wide
    if adapter.start is not None:
        a, b = torch.cat([a, adapter.start_A.double()]), torch.cat([b, -adapter.start_B.double()], dim=1)
    formula.dora(xs, layer.weight.double(), layer.bias.double(), a, b, adapter.scale, m).backward(dy.double())
    for found, exact in zip((x, adapter.lora_A, adapter.lora_B, adapter.magnitude), wide, strict=True):
        assert formula.error(found.grad, exact.grad) < 1e-5


def test_it_ends_with_the_first_step():
    """What a fresh adapter spares must not be spared once it has moved, whichever of its parts has."""
    for part in ("lora_A", "lora_B", "magnitude"):
        for init in ("default", "pissa"):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(32, 24))
            inject_adapter(net, AdapterConfig(rank=4, init=init, targets=("0",)))
            layer, adapter = net[0], net[0].active
            x = torch.randn(7, 32)
            net(x)
            getattr(adapter, part).data.mul_(1.5).add_(0.1)
            with torch.no_grad():
                exact = layer.merged_weight("default").double()
            for context in (torch.no_grad, torch.enable_grad):
                with context():
                    assert formula.error(net(x), x.double() @ exact.T + layer.bias.double()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_again(dtype, tmp_path):
    base = tiny_model("qwen2", dtype=dtype)
    save_adapter(inject_adapter(copy.deepcopy(base), AdapterConfig(rank=4)), tmp_path)
    model = load_adapter(copy.deepcopy(base), tmp_path)
    assert bool((scales(model) == 1).all())
    assert torch.equal(model(IDS).logits, base(IDS).logits)


@pytest.mark.filterwarnings("ignore:Products with float8")
def test_float8():
    base = quantize_base(tiny_model("qwen2", dtype=torch.bfloat16))
    model = inject_adapter(copy.deepcopy(base), AdapterConfig(rank=4))
    assert bool((scales(model) == 1).all())
    assert torch.equal(model(IDS).logits, base(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma", "phi3"])
def test_on_the_fast_path(family, dtype):
    """With Triton the products of several layers are one: the base is the same model with its adapter disabled."""
    model = accelerate(inject_adapter(tiny_model(family, dtype=dtype), AdapterConfig(rank=4)))
    found = model(IDS).logits
    with adapter_disabled(model):
        assert torch.equal(model(IDS).logits, found)
    assert bool((scales(model) == 1).all())


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_slots(kind):
    torch.manual_seed(0)
    module = {"linear": nn.Linear(48, 40, bias=False), "conv1d": Conv1D(40, 48), "embedding": nn.Embedding(48, 40)}[
        kind
    ]
    fresh = inject_adapter(nn.Sequential(copy.deepcopy(module)), AdapterConfig(rank=4, targets=("0",)))[0].active
    routing = Routing(2)
    layer = slot(copy.deepcopy(module), routing, 4)
    (tensors,) = prepare_slots([layer], [fresh.lora_A.data], [fresh.lora_B.data], [fresh.magnitude.data], fresh.scale)
    assert bool((tensors.g_O == 1).all())
    layer.fill(1, tensors)
    routing.set(torch.tensor([0, 1, 1, 0, 1]))
    x = torch.arange(5) if kind == "embedding" else torch.randn(5, 48)
    with torch.inference_mode():
        assert torch.equal(layer(x), module(x))


def test_the_norm_to_start_from_is_the_layers_own():
    torch.manual_seed(0)
    for module in (nn.Linear(300, 70), Conv1D(70, 300), nn.Embedding(300, 70)):
        nn.init.normal_(module.weight)
        net = inject_adapter(nn.Sequential(module), AdapterConfig(rank=4, targets=("0",)))
        layer = net[0]
        exact = layer.current_weight.dense().double().norm(dim=1)
        torch.testing.assert_close(layer.active.magnitude.detach().double(), exact, rtol=1e-6, atol=0)
        for context in (kernels.reference, torch.no_grad, torch.enable_grad):
            with context():
                assert torch.equal(layer.norm(layer.active), layer.active.magnitude)
                assert torch.equal(start_norm(layer, layer.active), layer.active.magnitude)
