"""Adapted modules: identity at the start, dtypes, autocast, dropout, copies, compile, caches."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import formula
from theodora import (
    AdapterConfig,
    adapter_disabled,
    inject_adapter,
    kernels,
    merge_adapter,
    remove_adapter,
    set_adapter,
    unmerge_adapter,
)
from theodora.layers import AdapterLayer
from theodora.layers import init as start
from tiny import tiny_model

INITS = ["default", "gaussian", "orthogonal", "pissa", "olora"]


class Net(nn.Module):
    """One of each kind of layer, a row of zeros among them."""

    def __init__(self, bias=True):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = Conv1D(10, 6)
        self.linear = nn.Linear(10, 7, bias=bias)
        nn.init.normal_(self.conv.bias)
        with torch.no_grad():
            self.linear.weight[3] = 0

    def forward(self, ids):
        return self.linear(torch.tanh(self.conv(self.embed(ids))))


IDS = torch.arange(8).view(2, 4)
ALL = ("embed", "conv", "linear")


def net(**config):
    torch.manual_seed(0)
    model = Net().to(config.pop("dtype", torch.float32))
    base = copy.deepcopy(model)
    return inject_adapter(model, AdapterConfig(rank=2, targets=ALL, **config)), base


def move(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_start_is_the_identity(init, method, dtype):
    model, base = net(method=method, init=init, dtype=dtype)
    assert model(IDS).dtype == dtype
    if init != "orthogonal":  # whose B·A is zero but for rounding
        assert torch.equal(model(IDS), base(IDS))
        return
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(model(IDS), base(IDS), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_each_layer_is_the_formula(init, method):
    model, base = net(method=method, init=init)
    move(model)
    for name in ALL:
        layer = getattr(model, name)
        adapter = layer.adapters["default"]
        a, b = (t.double() for t in adapter.factors())
        w = getattr(base, name).weight.double()
        w = w if name == "linear" else w.T
        eye = torch.eye(w.shape[1], dtype=torch.float64)
        exact = (
            formula.lora(eye, w, None, a, b, adapter.scale)
            if method == "lora"
            else formula.dora(eye, w, None, a, b, adapter.scale, adapter.magnitude.double())
        )
        found = layer(torch.arange(11)) if name == "embed" else layer(eye.float()) - layer.bias
        assert formula.error(found, exact) < 1e-5
        assert formula.error(layer.merged_weight("default").T, exact) < 1e-6


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_only_the_adapter_trains_and_all_of_it(method):
    model, base = net(method=method)
    move(model)
    model(IDS).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("adapters" in name), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_output_dtype_is_autocasts_as_that_of_linear(method, base):
    model, plain = net(method=method, dtype=base)
    move(model)
    for name, width in (("linear", 10), ("conv", 6)):
        layer = getattr(model, name)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(3, width, dtype=dtype, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(x)
                assert y.dtype == getattr(plain, name)(x).dtype == torch.bfloat16
            y.sum().backward()
            assert x.grad.dtype == dtype
            assert formula.error(y, layer.to(torch.float64)(x.double()).detach()) < 0.03
            layer.to(base)
            layer.adapters.to(torch.float32)


def test_dropout_is_on_the_low_rank_branch_alone():
    model, base = net(dropout=0.9)
    x = torch.randn(50, 10)
    torch.testing.assert_close(model.linear.train()(x), base.linear(x))  # B is zero: dropping inputs changes nothing
    move(model)
    assert not torch.equal(model.linear(x), model.linear(x))
    model.eval()
    assert torch.equal(model.linear(x), model.linear(x))
    average = torch.stack([model.linear.train()(x) for _ in range(3000)]).mean(0)
    assert formula.error(average, model.linear.eval()(x).double()) < 0.1


def test_dropout_needs_no_second_product(monkeypatch):
    model, _ = net(dropout=0.5, dtype=torch.float64)
    move(model)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "mm" in str(func):
                sizes.append([tuple(a.shape) for a in args if isinstance(a, torch.Tensor)])
            return func(*args, **(kwargs or {}))

    model.linear.norm(model.linear.adapters["default"])
    with Watch():
        model.linear.eval().train()(torch.randn(50, 10, dtype=torch.float64))
    assert sum((50, 10) in shapes and ((10, 7) in shapes or (7, 10) in shapes) for shapes in sizes) == 1


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_independent(how):
    model, base = net()
    move(model)
    expected = model(IDS)
    other = how(model)
    assert torch.equal(other(IDS), expected)
    move(other, seed=2)
    assert not torch.equal(other(IDS), expected)
    assert torch.equal(model(IDS), expected)
    remove_adapter(other)
    assert type(other.linear) is nn.Linear
    assert torch.equal(other(IDS), base(IDS))


def test_state_dict_round_trip():
    model, _ = net()
    move(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    other, _ = net()
    other.eval()(IDS)  # fills its caches
    other.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    assert torch.equal(other(IDS), model.eval()(IDS))


@pytest.mark.parametrize("change", ["optimizer", "data", "base", "to"])
def test_no_cache_outlives_what_it_depends_on(change):
    model, _ = net()
    move(model)
    model.eval()
    with torch.no_grad():
        model(IDS)
        layer = model.linear
        adapter = layer.adapters["default"]
        if change == "optimizer":
            adapter.lora_B.add_(0.5)
        elif change == "data":
            adapter.lora_B.data = adapter.lora_B.data + 0.5
        elif change == "base":
            layer.weight.mul_(2)
        else:
            model.to(torch.float64)
        x = torch.randn(4, 10, dtype=layer.weight.dtype)
        with kernels.reference():
            found = layer(x)
        exact = formula.dora(
            x.double(),
            layer.weight.double(),
            layer.bias.double(),
            *(t.double() for t in adapter.factors()),
            adapter.scale,
            adapter.magnitude.double(),
        )
        assert formula.error(found, exact) < 1e-6


def test_steps_that_autograd_does_not_see_reach_the_norm():
    """Some optimizers write through `.data` or from a kernel of their own."""
    model, _ = net()
    move(model)
    x = torch.randn(4, 10)
    layer = model.linear.train()
    for _ in range(2):
        with torch.no_grad():
            layer(x)
        layer(x).sum().backward()
        layer.adapters["default"].lora_B.data.add_(0.5)
    with torch.no_grad():
        exact = layer.merged_weight("default").double()
        assert formula.error(layer(x), x.double() @ exact.T + layer.bias.double()) < 1e-6


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_writes_through_data_are_seen(context):
    model, _ = net()
    with context():
        model.eval()(IDS)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    model.linear.weight.data.mul_(2)
    x = torch.randn(4, 10)
    with context():
        found = model.linear(x).detach().clone()
    a, b = (t.detach().double() for t in model.linear.adapters["default"].factors())
    m = model.linear.adapters["default"].magnitude.detach().double()
    w, bias = (t.detach().double() for t in (model.linear.weight, model.linear.bias))
    if context is torch.enable_grad:  # ‖W‖² of a frozen weight is looked at again when the mode changes
        found = model.train().eval().linear(x).detach()
    assert formula.error(found, formula.dora(x.double(), w, bias, a, b, 2.0, m)) < 1e-5
    model(IDS).sum().backward()


def test_merged_moved_and_unmerged_ties_stay():
    model = inject_adapter(tiny_model("gpt2", tied=True), AdapterConfig(rank=2, targets=("lm_head", "c_attn")))
    merge_adapter(model).to(torch.float64)
    unmerge_adapter(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.dtype == torch.float64


def test_named_adapters_switch_exactly():
    model, base = net()
    move(model)
    first = model(IDS)
    inject_adapter(model, AdapterConfig(method="lora", rank=3, targets=("linear",)), name="second")
    assert torch.equal(model(IDS), base(IDS))
    move(model, seed=5)
    second = model(IDS)
    set_adapter(model, "default")
    assert torch.equal(model(IDS), first)
    assert not model.linear.adapters["second"].lora_A.requires_grad
    set_adapter(model, "second")
    assert torch.equal(model(IDS), second)
    with adapter_disabled(model):
        assert torch.equal(model(IDS), base(IDS))
    assert torch.equal(model(IDS), second)
    remove_adapter(model, "second")
    assert torch.equal(set_adapter(model, "default")(IDS), first)
    remove_adapter(model)
    assert torch.equal(model(IDS), base(IDS))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, AdapterLayer) for module in model.modules())


def test_hooks_stay():
    model = Net()
    seen = []
    model.linear.register_forward_hook(lambda *_: seen.append(1))
    inject_adapter(model, AdapterConfig(rank=2, targets=("linear",)))(IDS)
    assert seen == [1]


def test_gemma_style_scaled_embedding():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    model = nn.Sequential(Gemma3TextScaledWordEmbedding(11, 6, padding_idx=0, embed_scale=3.0))
    inject_adapter(model, AdapterConfig(rank=2, targets=("0",)))
    move(model)
    ids = torch.arange(1, 11)
    expected = 3 * model[0].merged_weight("default").T[1:]
    torch.testing.assert_close(model(ids), expected)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable:FutureWarning")  # the new name is of 5.2x
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_gradient_checkpointing_changes_nothing(method):
    ids = torch.randint(3, 200, (2, 10))
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = inject_adapter(tiny_model("llama"), AdapterConfig(method=method, rank=2)).train()
        move(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_compiled_equals_eager(method):
    model, _ = net(method=method)
    move(model)
    ids = IDS
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for mode in (True, False):
        model.train(mode)
        torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-5, atol=1e-6)
    model.train()
    model(ids).square().sum().backward()
    eager = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled(ids).square().sum().backward()
    for name, gradient in eager.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-5, atol=1e-6)


def test_empty_batch():
    model, _ = net()
    assert model.linear(torch.randn(0, 10)).shape == (0, 7)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_row_of_zeros_has_no_start_either(init):
    # Rounding leaves about 1e-9 in B₀, whose direction DoRA would scale up to the magnitude.
    model, _ = net(method="dora", init=init)
    adapter = model.linear.adapters["default"]
    assert not bool(adapter.start_B[3].any())
    assert not bool(adapter.lora_B[3].any())
    assert float(adapter.magnitude[3].detach()) == 0


def test_pissa_of_a_large_weight_starts_from_the_same_factors(monkeypatch):
    u, v = (torch.linalg.qr(torch.randn(size, 40, dtype=torch.float64))[0] for size in (60, 50))
    s = 0.9 ** torch.arange(40, dtype=torch.float64)
    best = (u * s)[:, :3] @ v[:, :3].T
    monkeypatch.setattr(start, "_EXACT_SVD", 4)  # the randomised decomposition, of what is above this size
    a, b, _ = start.start_values("pissa", ((u * s) @ v.T).float(), rank=3, scale=2.0)
    # Each of its 8 iterations shrinks what it misses by (s₁₂ / s₃)² = 0.15; after 2 the error is still 2e-3 or more.
    assert formula.error(2.0 * b @ a, best) < 1e-5
