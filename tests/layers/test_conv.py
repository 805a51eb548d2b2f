"""Adapted convolutions, held against the formula in float64 on the weight seen as a matrix."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from theodora import (
    AdapterConfig,
    ConfigError,
    adapter_disabled,
    inject_adapter,
    merge_adapter,
    remove_adapter,
    set_adapter,
    unmerge_adapter,
)
from theodora.adapters import quantize_base
from theodora.errors import CheckpointError
from theodora.layers import AdapterLayer, cannot_adapt
from theodora.layers.conv import ConvAdapterLayer

F64 = torch.float64
CASES = {
    "strided": lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1),
    "few outputs": lambda: nn.Conv1d(8, 2, 3),
    "grouped": lambda: nn.Conv1d(8, 24, 4, groups=2, padding=3, bias=False),
    "circular": lambda: nn.Conv1d(4, 12, 5, padding=2, padding_mode="circular"),
    "same": lambda: nn.Conv2d(8, 16, 3, groups=4, dilation=2, padding="same"),
    "depthwise": lambda: nn.Conv2d(8, 8, (3, 5), groups=8, padding=(1, 2), padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(6, 9, (2, 4), stride=(1, 3), padding=(0, 5), groups=3, padding_mode="replicate"),
    "patches": lambda: nn.Conv2d(3, 20, 3, stride=3, bias=False),
    "pointwise": lambda: nn.Conv2d(8, 12, 1),
    "volume": lambda: nn.Conv3d(4, 10, 2, groups=2, dilation=(1, 2, 1)),
}
METHODS = ["lora", "dora"]


class Net(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.conv = CASES[case]()

    def forward(self, x):
        return self.conv(x)


def input_of(model, dtype=F64, batch=(2,)):
    sizes = (9,) * (model.conv.weight.dim() - 2)
    return torch.randn(*batch, model.conv.in_channels, *sizes, generator=torch.Generator().manual_seed(5)).to(dtype)


def move(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)


def net(case, dtype=F64, *, fresh=False, **config):
    """An adapted model, moved from its start, and the bare one."""
    torch.manual_seed(0)
    base = Net(case).to(dtype)
    options = {"rank": 2, "targets": ("conv",), "adapter_dtype": "base", **config}
    model = inject_adapter(copy.deepcopy(base), AdapterConfig(**options))
    if not fresh:
        move(model)
    return model, base


def adapted_weight(base, adapter):
    """The formula, in float64; the norm is a constant."""
    w, a, b = base.conv.weight.detach().to(F64).flatten(1), adapter.lora_A.to(F64), adapter.lora_B.to(F64)
    v = w + adapter.scale * b @ a
    if adapter.start_A is not None:
        v = v - adapter.scale * adapter.start_B.to(F64) @ adapter.start_A.to(F64)
    if adapter.magnitude is not None:
        v = adapter.magnitude.to(F64)[:, None] * v / v.detach().norm(dim=1, keepdim=True)
    return v.view_as(base.conv.weight)


def formula(base, adapter, x):
    """The bare module with the adapted weight, in float64."""
    exact = copy.deepcopy(base).to(F64)
    return functional_call(exact, {"conv.weight": adapted_weight(base, adapter)}, (x.to(F64),))


@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_formula(case, method, init):
    if case == "few outputs" and init == "pissa":
        init = "olora"
    model, base = net(case, method=method, init=init)
    adapter = model.conv.adapters["default"]
    x, x_exact = (input_of(model).requires_grad_() for _ in range(2))
    y, exact = model(x), formula(base, adapter, x_exact)
    torch.testing.assert_close(y, exact, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(y, base(x), atol=1e-2)
    dy = torch.randn(y.shape, dtype=F64)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == (3 if method == "dora" else 2)
    ours, theirs = torch.autograd.grad(y, [x, *trained], dy), torch.autograd.grad(exact, [x_exact, *trained], dy)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_an_input_without_a_batch_and_one_without_items(method):
    model, base = net("same", method=method)
    x = input_of(model, batch=())
    torch.testing.assert_close(model(x), formula(base, model.conv.adapters["default"], x))
    assert model(x[None][:0]).shape == base(x[None][:0]).shape


@pytest.mark.parametrize("init", ["default", "pissa", "orthogonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_adapter_changes_nothing(method, dtype, init):
    for case in ("same", "strided", "depthwise"):
        model, base = net(case, dtype, fresh=True, method=method, init=init)
        x = input_of(model, dtype)
        if init == "orthogonal":  # B·A cancels by rounding alone
            torch.testing.assert_close(model(x), base(x), rtol=0.02, atol=0.02)
            continue
        assert torch.equal(model(x), base(x)), case
        with torch.no_grad():
            assert torch.equal(model(x), base(x)), case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_lower_precision_and_merging(case, method, dtype):
    model, base = net(case, dtype, method=method)
    x, adapter = input_of(model, dtype), model.conv.adapters["default"]
    exact, stored = formula(base, adapter, x), adapted_weight(base, adapter)
    near = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps * float(exact.detach().abs().max())}
    torch.testing.assert_close(model(x).to(F64), exact, **near)
    merge_adapter(model)
    assert model.conv.weight.shape == base.conv.weight.shape
    torch.testing.assert_close(model.conv.weight, stored.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(model(x).to(F64), exact, **near)
    unmerge_adapter(model)
    assert torch.equal(model.conv.weight, base.conv.weight)
    torch.testing.assert_close(model(x).to(F64), exact, **near)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_gives_its_dtype_as_ever(method):
    model, base = net("depthwise", torch.float32, method=method)
    x = input_of(model, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = model(x), base(x)
    assert y.dtype == plain.dtype == torch.bfloat16
    exact = formula(base, model.conv.adapters["default"], x)
    torch.testing.assert_close(y.to(F64), exact, rtol=0.03, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.conv.adapters.parameters())


def wrong(self, w_OI):
    return (1.01 * w_OI).view(self.base_parameter.shape)


def test_a_merge_that_is_not_what_the_layer_does_is_noticed(monkeypatch):
    monkeypatch.setattr(ConvAdapterLayer, "as_stored", wrong)
    for case in ("strided", "depthwise", "replicate"):
        model, base = net(case, torch.float32, method="dora")
        with pytest.raises(CheckpointError, match="conv: "):
            merge_adapter(model)
        assert torch.equal(model.conv.weight, base.conv.weight)


def test_switching_disabling_removing():
    model, base = net("same", method="dora")
    x = input_of(model)
    inject_adapter(model, AdapterConfig(method="lora", rank=3, targets=("conv",), adapter_dtype="base"), name="two")
    move(model, seed=2)
    two = model(x)
    torch.testing.assert_close(two, formula(base, model.conv.adapters["two"], x))
    set_adapter(model, "default")
    torch.testing.assert_close(model(x), formula(base, model.conv.adapters["default"], x))
    with adapter_disabled(model):
        assert torch.equal(model(x), base(x))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    remove_adapter(model)
    assert type(model.conv) is nn.Conv2d
    assert torch.equal(model(x), base(x))


def test_evaluation_between_steps_sees_the_new_numbers():
    model, base = net("grouped", torch.float32, method="dora")
    x, adapter = input_of(model, torch.float32), model.conv.adapters["default"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model.train()(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x).to(F64), formula(base, adapter, x), rtol=1e-4, atol=1e-4)
    adapter.lora_B.data.mul_(2)
    base.conv.weight.data.mul_(3)
    model.conv.weight.data.mul_(3)
    with torch.no_grad():
        torch.testing.assert_close(model(x).to(F64), formula(base, adapter, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_on_the_low_rank_branch_alone(method):
    model, base = net("same", method=method, dropout=0.5)
    x, adapter = input_of(model), model.conv.adapters["default"]
    torch.manual_seed(3)
    y = model.train()(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    update = copy.deepcopy(base.conv).requires_grad_(False)
    update.bias = None
    update.weight.copy_((adapter.scale * adapter.lora_B @ adapter.lora_A).detach().view_as(update.weight))
    z = base.conv._conv_forward(x, base.conv.weight, None) + update(dropped)
    if method == "dora":
        v = base.conv.weight.flatten(1) + adapter.scale * adapter.lora_B @ adapter.lora_A
        z = z * (adapter.magnitude / v.norm(dim=1)).view(-1, 1, 1)
    torch.testing.assert_close(y, z + base.conv.bias.view(-1, 1, 1))


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_and_compiling(method):
    model, _ = net("depthwise", method=method)
    x = input_of(model).requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(y):
        return y, torch.autograd.grad(y.square().sum(), [x, *trained])

    plain = gradients(model(x))
    again = gradients(checkpoint(model, x, use_reentrant=False))
    compiled = gradients(torch.compile(model, backend="eager", fullgraph=True)(x))
    for other in (again, compiled):
        torch.testing.assert_close(other, plain)


def test_channels_last_is_the_same_convolution():
    model, base = net("same", torch.float32, method="dora")
    x, exact = input_of(model, torch.float32), formula(base, model.conv.adapters["default"], input_of(model))
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x).to(F64), exact, rtol=1e-4, atol=1e-4)
    merge_adapter(model)
    torch.testing.assert_close(model(x).to(F64), exact, rtol=1e-4, atol=1e-4)
    unmerge_adapter(model)
    assert torch.equal(model.conv.weight, base.conv.weight)


class Scaled(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, 2 * weight, bias)


class OwnForward(nn.Conv1d):
    def forward(self, input):
        return super().forward(input)[..., :-1]


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)), "remove_parametrizations"),
        (nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), "made anew in each pass"),
        (nn.ConvTranspose1d(4, 4, 3), "transposed convolutions are not supported. Train it in full"),
        (Scaled(4, 4, 3), "Scaled has a forward pass of its own"),
        (OwnForward(4, 4, 3), "OwnForward has a forward pass of its own"),
        (nn.Conv2d(4, 4, 3, device="meta"), "not loaded yet"),
        (nn.Conv1d(4, 4, 3).to(torch.float8_e4m3fn), "quantised or special"),
    ],
)
def test_what_cannot_be_adapted_says_why(module, said):
    holder = nn.Module()
    holder.conv = module
    with pytest.raises(ConfigError, match=said):
        inject_adapter(holder, AdapterConfig(targets=("conv",)))
    assert not isinstance(holder.conv, AdapterLayer)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_weight_made_by_a_hook_is_refused():
    reason = cannot_adapt(nn.utils.weight_norm(nn.Conv1d(4, 4, 3)))
    assert reason is not None
    assert "remove_weight_norm" in reason


def test_sharding_is_refused():
    model, _ = net("strided")
    model.conv.__dict__["_is_fsdp_managed_module"] = True  # as fully_shard writes on it
    with pytest.raises(ConfigError, match=r"fully_shard has sharded an adapted AdaptedConv1d.*ignored_params"):
        model(input_of(model))


def test_a_start_beyond_the_weights_rank_is_refused():
    with pytest.raises(ConfigError, match="rank of at most 2 here, found 3"):
        net("few outputs", rank=3, init="pissa")


def test_all_linear_leaves_convolutions_out():
    model = nn.Sequential()
    model.add_module("conv", nn.Conv1d(4, 4, 3))
    model.add_module("proj", nn.Linear(16, 16))
    inject_adapter(model, AdapterConfig(targets=("conv",)))
    inject_adapter(model, AdapterConfig(), name="two")
    assert list(model.conv.adapters) == ["default"]
    assert list(model.proj.adapters) == ["two"]
    remove_adapter(model)
    quantize_base(model)
    assert type(model.conv) is nn.Conv1d
