"""Linear layers with a float8 weight, and adapters on them, against the formulas on the quantised values."""

import copy
import io

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import formula
from theodora import AdapterConfig, inject_adapter, kernels
from theodora.kernels.float8 import FLOAT8, dequantized, quantize_rows
from theodora.layers.float8 import Float8Layer, plain_weight, quantize

F64 = torch.float64
KINDS = ["linear", "conv1d"]


def layer(kind="linear", inputs=32, outputs=48, dtype=torch.float32):
    module = nn.Linear(inputs, outputs) if kind == "linear" else Conv1D(outputs, inputs)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    module = module.to(dtype)
    with torch.no_grad():
        rows = module.weight if kind == "linear" else module.weight.T
        rows.mul_(torch.linspace(-3, 3, outputs).exp()[:, None])
        rows[3] = 0
    quantize(module, stored_transposed=kind == "conv1d")
    return module


def weight_OI(module):
    return dequantized(module.weight.T if module.stored_transposed else module.weight, module.weight_scale, F64)


def rounded(x, times=None):
    x8, scale = quantize_rows(x.detach().reshape(-1, x.shape[-1]), times)
    return dequantized(x8, scale, F64).view(x.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_alone(kind, dtype):
    module, x = layer(kind, dtype=dtype), torch.randn(2, 5, 32).to(dtype).requires_grad_()
    y = module(x)
    w, eps = weight_OI(module), 2 * torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert formula.error(y, rounded(x) @ w.T + module.bias.double()) < eps
    dy = torch.randn(2, 5, 48).to(dtype)
    y.backward(dy)
    dx = rounded(dy, module.weight_scale) @ (w / module.weight_scale.double()[:, None])
    assert formula.error(x.grad, dx) < eps
    assert formula.error(x.grad, dy.double() @ w) < 0.05
    assert module.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_the_layer_with_an_adapter_is_the_formula_on_what_it_stores(kind, method):
    net = nn.Sequential(layer(kind))
    inject_adapter(net, AdapterConfig(method=method, rank=4, targets=("0",)))
    module, x = net[0], torch.randn(2, 5, 32, requires_grad=True)
    adapter = module.adapters["default"]
    with torch.no_grad():
        adapter.lora_B.normal_()
        if method == "dora":
            adapter.magnitude.mul_(1.1)
    dy = torch.randn(2, 5, 48)
    net(x).backward(dy)
    found = {"y": net(x), **{name: p.grad for name, p in adapter.named_parameters()}}

    low, exact = x.detach().double().requires_grad_(), {}
    a, b = (p.detach().double().requires_grad_() for p in (adapter.lora_A, adapter.lora_B))
    values = (rounded(x), weight_OI(module), module.bias.double(), a, b, adapter.scale)
    if method == "dora":
        m = adapter.magnitude.detach().double().requires_grad_()
        exact["y"] = formula.dora(*values, m, x_lora=low)
    else:
        exact["y"] = formula.lora(*values, x_lora=low)
    exact["y"].backward(dy.double())
    exact |= {"lora_A": a.grad, "lora_B": b.grad} | ({"magnitude": m.grad} if method == "dora" else {})
    for name, value in exact.items():
        assert formula.error(found[name], value) < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_dora_starts_where_the_quantised_layer_stands(kind):
    net = nn.Sequential(layer(kind))
    x = torch.randn(3, 32)
    before = net(x)
    inject_adapter(net, AdapterConfig(targets=("0",)))
    assert torch.allclose(net(x), before, rtol=1e-6, atol=1e-6)
    norm = weight_OI(net[0]).norm(dim=1)
    assert formula.error(net[0].adapters["default"].magnitude, norm) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapted", [False, True])
def test_changes_of_dtype_and_copies_keep_the_numbers(kind, adapted):
    net = nn.Sequential(layer(kind, dtype=torch.bfloat16))
    if adapted:
        inject_adapter(net, AdapterConfig(targets=("0",)))
    w, x = weight_OI(net[0]), torch.randn(3, 32).bfloat16()
    y, saved = net(x), io.BytesIO()
    torch.save(net, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(net),
        torch.load(saved, weights_only=False),
        copy.deepcopy(net).bfloat16(),
        copy.deepcopy(net).to(torch.float16),
        copy.deepcopy(net).to("cpu", torch.float32),
    ):
        assert isinstance(other[0], Float8Layer)
        assert other[0].weight.dtype == FLOAT8
        assert other[0].weight_scale.dtype == torch.float32
        assert torch.equal(weight_OI(other[0]), w)
        assert formula.error(other(x.to(other[0].bias.dtype)), y.double()) < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_dict_is_a_plain_layers(kind, dtype):
    module = layer(kind, dtype=dtype)
    state = module.state_dict()
    assert set(state) == {"weight", "bias"}
    assert state["weight"].dtype == dtype
    plain = nn.Linear(32, 48, dtype=dtype) if kind == "linear" else Conv1D(48, 32).to(dtype)
    plain.load_state_dict(state)
    other = layer(kind, dtype=dtype)
    other.load_state_dict(state)
    assert torch.equal(other.weight.float(), module.weight.float())
    assert torch.allclose(weight_OI(other), weight_OI(module), rtol=torch.finfo(dtype).eps)
    assert torch.equal(other.state_dict()["weight"], state["weight"])
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        other.load_state_dict({"weight": torch.zeros(3, 3), "bias": state["bias"]})


def test_autocast():
    for adapted in (False, True):
        net = nn.Sequential(layer())
        if adapted:
            inject_adapter(net, AdapterConfig(targets=("0",)))
        x = torch.randn(3, 32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = net(x)
        assert formula.error(y, net(x).double()) < 0.03


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_under_compile():
    net = nn.Sequential(layer())
    x = torch.randn(3, 32, requires_grad=True)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    found, x.grad = x.grad, None
    net(x).sum().backward()
    assert torch.allclose(compiled(x), net(x), rtol=1e-5, atol=1e-5)
    assert torch.allclose(found, x.grad, rtol=1e-5, atol=1e-5)


def test_the_reference_path_differs_by_the_rounding_of_x_alone():
    net = nn.Sequential(layer())
    inject_adapter(net, AdapterConfig(targets=("0",)))
    x = torch.randn(3, 32)
    with kernels.reference():
        exact = net(x)
    assert formula.error(exact, x.double() @ weight_OI(net[0]).T + net[0].bias.double()) < 1e-5
    assert formula.error(net(x), exact.double()) < 0.05


def test_a_plain_weight_as_stored():
    for kind in KINDS:
        module = layer(kind)
        w = plain_weight(module, torch.float32)
        assert w.shape == module.weight.shape
        assert w.is_contiguous()
