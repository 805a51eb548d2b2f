"""What every kind of base weight must do, against float64. A new kind is one entry in KINDS."""

import copy
import gc
import io
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import formula
from formula import DEVICE, F64
from theodora import (
    AdapterConfig,
    functional,
    inject_adapter,
    merge_adapter,
    remove_adapter,
    unmerge_adapter,
)
from theodora.adapters.quantize import module_fingerprint
from theodora.autocast import autocast_dtype
from theodora.kernels.base_weight import BaseWeight, Float8Weight, PlainWeight, StackedWeight, dora_norms, products
from theodora.kernels.float8 import quantize_rows
from theodora.layers.base_weights import Unfit, base_weight_of
from theodora.layers.float8 import quantize

IN, OUT, RANK = 32, 48, 4


def embedding():
    return nn.Embedding(IN, OUT)


def float8_linear():
    module = nn.Linear(IN, OUT)
    quantize(module)
    return module


def float8_conv1d():
    module = Conv1D(OUT, IN)
    quantize(module, stored_transposed=True)
    return module


def stacked():
    """No module's: that of two layers which read one x."""
    return StackedWeight([frozen(OUT // 2, IN), frozen(OUT // 2, IN)], RANK)


class Written(BaseWeight):
    """A kind that says no more than it must: what others do in a faster way, it has by default."""

    stored = "written"

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    shape = property(lambda self: tuple(self.tensor.shape))
    dtype = property(lambda self: self.tensor.dtype)
    device = property(lambda self: self.tensor.device)

    def takes(self, dtype):
        return dtype == self.dtype

    def to(self, dtype):
        return Written(self.tensor.to(dtype))

    def product(self, x_TI, bias_O=None, shared=None):
        z = x_TI @ self.tensor.T
        return z if bias_O is None else z + bias_O

    def product_backward(self, dz_TO, onto=None):
        dx = dz_TO @ self.tensor
        return dx if onto is None else onto + dx

    def rows(self, at=slice(None)):
        return self.tensor[at].to(functional.wide_dtype(self.dtype))

    def split(self, outputs):
        return [Written(rows) for rows in self.tensor.split(outputs)]

    def dense(self, dtype=None):
        return self.tensor if dtype is None else self.tensor.to(dtype)

    def plain(self):
        return None

    def tensors(self):
        return (self.tensor,)

    def maker(self):
        return Written


@dataclass(frozen=True)
class Kind:
    """One way to store a weight."""

    make: Callable[[], nn.Module | BaseWeight]
    stored: str = "plain"
    rounding: float = 1e-6
    """The relative error of its products: those of float8 round x to 4 bits."""


MODULES = {
    "linear": Kind(lambda: nn.Linear(IN, OUT)),
    "conv1d": Kind(lambda: Conv1D(OUT, IN)),
    "embedding": Kind(embedding),
    "float8 linear": Kind(float8_linear, "float8", 0.05),
    "float8 conv1d": Kind(float8_conv1d, "float8", 0.05),
}
KINDS = MODULES | {"stacked": Kind(stacked), "written": Kind(lambda: Written(frozen(OUT, IN)), "written")}

kinds = pytest.mark.parametrize("kind", KINDS)
modules = pytest.mark.parametrize("kind", MODULES)


def frozen(*shape):
    return nn.Parameter(torch.randn(*shape, device=DEVICE) / IN**0.5, requires_grad=False)


def module_of(kind):
    module = MODULES[kind].make().to(DEVICE).requires_grad_(False)
    if getattr(module, "bias", None) is not None:
        nn.init.normal_(module.bias)
    return module


def weight_of(kind):
    """The weight, and the numbers that it stands for, (O, I), float64, by the tensors it is made of."""
    made = module_of(kind) if kind in MODULES else KINDS[kind].make()
    weight = base_weight_of(made) if kind in MODULES else made
    assert isinstance(weight, BaseWeight)
    tensor, *scale = weight.tensors()
    exact = tensor.double() if tensor.shape == (OUT, IN) else tensor.double().T
    return weight, exact * scale[0].double()[:, None] if scale else exact


def factors(n=1):
    a, b = torch.randn(n, RANK, IN, device=DEVICE) / IN**0.5, 0.3 * torch.randn(n, OUT, RANK, device=DEVICE)
    return a, b


@kinds
def test_what_it_says_of_itself(kind):
    weight, exact = weight_of(kind)
    assert weight.shape == exact.shape == (OUT, IN)
    assert weight.device.type == DEVICE
    assert weight.dtype == torch.float32
    assert weight.stored == KINDS[kind].stored
    assert weight.captures
    assert weight.takes(torch.float32)
    half = weight.to(torch.bfloat16)
    assert half.takes(torch.bfloat16)
    assert half.product(torch.ones(2, IN, device=DEVICE).bfloat16()).dtype == torch.bfloat16


@kinds
def test_its_numbers(kind):
    weight, exact = weight_of(kind)
    plain = weight.plain()
    assert plain is None or torch.equal(plain.double(), exact)
    assert formula.error(weight.dense(), exact) < 1e-7
    assert torch.equal(weight.dense(F64), exact)
    assert weight.dense(torch.bfloat16).dtype == torch.bfloat16
    some = torch.arange(OUT, device=DEVICE) % 3 == 1
    for at in (slice(None), slice(5, 9), some):
        assert weight.rows(at).dtype == torch.float32
        assert formula.error(weight.rows(at), exact[at]) < 1e-7
    parts = weight.split(OUT // 2)
    assert formula.error(torch.cat([part.dense() for part in parts]), exact) < 1e-7


@kinds
def test_products_and_their_backward(kind):
    weight, exact = weight_of(kind)
    x, dz = torch.randn(2, 5, IN, device=DEVICE), torch.randn(2, 5, OUT, device=DEVICE)
    bias = torch.randn(OUT, device=DEVICE)
    z, rounding = x.double() @ exact.T, KINDS[kind].rounding
    assert formula.error(weight.product(x), z) < rounding
    assert formula.error(weight.product(x, bias), z + bias) < rounding
    dz, dx = dz[0], dz[0].double() @ exact
    assert formula.error(weight.product_backward(dz), dx) < rounding
    onto = torch.randn(5, IN, device=DEVICE)
    expected = onto.double() + dx
    assert formula.error(weight.product_backward(dz, onto), expected) < rounding


@kinds
def test_products_of_one_x_are_those_alone(kind):
    weights = [weight_of(kind)[0], PlainWeight(frozen(7, IN)), weight_of(kind)[0]]
    for x in (torch.randn(5, IN, device=DEVICE), torch.randn(2, 5, IN, device=DEVICE)):
        found = products(x, weights)
        assert all(torch.equal(z, weight.product(x)) for z, weight in zip(found, weights, strict=True))


@kinds
def test_norms(kind):
    (weight, exact), (other, other_exact) = weight_of(kind), weight_of(kind)
    (a1, a2), (b1, b2) = factors(2)
    assert formula.error(weight.norm_squared(), exact.square().sum(1)) < 1e-6
    assert formula.error(weight.times_a(a1), exact @ a1.double().T) < 1e-6
    b1[3] = b1[3] / b1[3].norm()
    norms = [(w + 0.7 * b.double() @ a.double()).norm(dim=1) for w, a, b in ((exact, a1, b1), (other_exact, a2, b2))]
    norm_sq = torch.stack([weight.norm_squared(), other.norm_squared()])
    assert formula.error(weight.dora_norm(a1, b1, 0.7, norm_sq[0]), norms[0]) < 1e-6
    together = dora_norms([weight, other], torch.stack([a1, a2]), torch.stack([b1, b2]), 0.7, norm_sq)
    assert formula.error(together, torch.stack(norms)) < 1e-6


@kinds
def test_a_weight_is_made_again_of_its_tensors_alone(kind):
    weight, exact = weight_of(kind)
    maker, tensors = weight.maker(), [t.detach().clone() for t in weight.tensors()]
    seen = [weakref.ref(t) for t in weight.tensors()]
    other = maker(*tensors)
    assert type(other).stored == KINDS[kind].stored
    assert torch.equal(other.dense(F64), exact)
    del weight
    gc.collect()
    assert not any(t() is not None for t in seen)


@kinds
def test_gradients_go_around_it(kind):
    """As one autograd step, beside a second layer of the same x."""
    weight, exact = weight_of(kind)
    (a,), (b,) = factors()
    assert formula.goes_around(weight, exact, a, b, max(1e-5, KINDS[kind].rounding))
    assert not any(t.requires_grad for t in weight.tensors())


# As modules store it -------------------------------------------------------------------------------------------------


def adapted(kind, method="dora"):
    net = nn.Sequential(module_of(kind))
    inject_adapter(net, AdapterConfig(method=method, rank=RANK, targets=("0",)))
    with torch.no_grad():
        for parameter in net[0].adapters["default"].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def inputs(kind, dtype=torch.float32):
    if kind == "embedding":
        return torch.randint(IN, (2, 5), device=DEVICE)
    return torch.randn(2, 5, IN, device=DEVICE, dtype=dtype)


def exactly(net, kind, x):
    """The adapted layer by the formula."""
    layer, exact = net[0], base_weight_of(net[0]).dense(F64)
    adapter, bias = layer.adapters["default"], getattr(layer, "bias", None)
    x = nn.functional.one_hot(x, IN) if kind == "embedding" else x
    values = x.double(), exact, None if bias is None else bias.double(), adapter.lora_A.double()
    rest = adapter.lora_B.double(), adapter.scale
    if adapter.magnitude is None:
        return formula.lora(*values, *rest)
    return formula.dora(*values, *rest, adapter.magnitude.double())


@modules
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_an_adapted_layer(kind, method):
    net, x = adapted(kind, method), inputs(kind)
    y, rounding = net(x), max(1e-5, MODULES[kind].rounding)
    exact = exactly(net, kind, x)
    assert formula.error(y, exact) < rounding
    dy, parameters = torch.randn_like(y), list(net[0].adapters["default"].parameters())
    found, wanted = (torch.autograd.grad(out, parameters, dy.to(out.dtype)) for out in (y, exact))
    assert len(parameters) == (3 if method == "dora" else 2)
    assert all(formula.error(f, w) < rounding for f, w in zip(found, wanted, strict=True))


@modules
@pytest.mark.filterwarnings("ignore:The adapter was merged into a base in float8:UserWarning")
def test_merging_and_back(kind):
    net, x = adapted(kind).eval(), inputs(kind)
    with torch.no_grad():
        before, exact = net(x), exactly(net, kind, x)
    own, fingerprint = net[0].weight, module_fingerprint(net[0])
    merge_adapter(net)
    assert base_weight_of(net[0]).stored == "plain"
    assert not net[0].weight.requires_grad
    assert module_fingerprint(net[0]) == fingerprint
    assert formula.error(net(x), exact) < 1e-5
    unmerge_adapter(net)
    assert net[0].weight is own
    assert torch.equal(net(x), before)


@modules
def test_it_is_recognised_by_its_values_whoever_holds_it(kind):
    module = module_of(kind)
    fingerprint, w = module_fingerprint(module), base_weight_of(module).dense()
    net = nn.Sequential(module)
    inject_adapter(net, AdapterConfig(rank=RANK, targets=("0",)))
    assert module_fingerprint(net[0]) == fingerprint
    assert torch.equal(net[0].base_weight.dense(), w)
    remove_adapter(net)
    assert module_fingerprint(net[0]) == fingerprint
    assert any(fingerprint)


@modules
def test_copies_and_moves_keep_its_numbers(kind):
    net, x = adapted(kind), inputs(kind)
    with torch.no_grad():
        y, exact = net(x), base_weight_of(net[0]).dense()
    stream = io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    # (as torch pickles: by itself pickle does not take tensors of float8)
    copies = copy.deepcopy(net), torch.load(stream, weights_only=False), copy.deepcopy(net).to("cpu").to(DEVICE)
    for other in copies:
        assert torch.equal(base_weight_of(other[0]).dense(), exact)
        with torch.no_grad():
            assert torch.equal(other(x), y)
    half = copy.deepcopy(net).to(torch.bfloat16)
    rounding = torch.finfo(torch.bfloat16).eps if MODULES[kind].stored == "plain" else 0
    assert formula.error(base_weight_of(half[0]).dense(), exact.double()) <= rounding
    assert half(inputs(kind, torch.bfloat16)).dtype == torch.bfloat16


@modules
def test_state_dicts_hold_plain_numbers(kind):
    net, other = adapted(kind), adapted(kind)
    state = net.state_dict()
    assert state["0.weight"].is_floating_point()
    assert state["0.weight"].dtype == torch.float32
    other.load_state_dict(state)
    assert formula.error(base_weight_of(other[0]).dense(), base_weight_of(net[0]).dense(F64)) < 1e-6
    x = inputs(kind)
    with torch.no_grad():
        torch.testing.assert_close(other(x), net(x), rtol=1e-5, atol=1e-5)


@modules
def test_under_autocast(kind):
    net, x = adapted(kind), inputs(kind)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = net(x)
        dtype = torch.float32 if kind == "embedding" else autocast_dtype(x)
    assert y.dtype == dtype
    assert formula.error(y, exactly(net, kind, x)) < 0.05


# (test_layers.py compiles plain ones)
@pytest.mark.parametrize("kind", [kind for kind, one in MODULES.items() if one.stored != "plain"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_under_compile(kind):
    net, x = adapted(kind), inputs(kind)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    parameters = list(net[0].adapters["default"].parameters())
    found, wanted = (torch.autograd.grad(call(x).square().sum(), parameters) for call in (compiled, net))
    assert all(formula.error(f, w.double()) < 1e-5 for f, w in zip(found, wanted, strict=True))


def test_modules_without_a_weight_for_an_adapter_say_why():
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    for module, reason in (
        (nn.LayerNorm(4), "LayerNorm is no linear layer, embedding or convolution"),
        (quantised, "its weight is quantised or special (Parameter, torch.int8)"),
        (nn.Linear(4, 4, device="meta"), "its weight is not loaded yet (it is on the meta device)"),
        (nn.Embedding(4, 4, max_norm=1.0), "Embedding with max_norm rescales its weight while it is used"),
    ):
        assert base_weight_of(module) == Unfit(reason)


def test_a_weight_that_is_a_view_lies_in_no_stack():
    own = [frozen(16, IN), frozen(16, IN)]
    stack = StackedWeight(own, RANK)
    weights = [PlainWeight(w) for w in own]
    assert stack.holds(weights, RANK)
    assert not stack.holds(weights[::-1], RANK)
    assert not stack.holds(weights, 1000)
    assert not stack.holds([weights[0], Float8Weight(*quantize_rows(own[1]), torch.float32)], RANK)
    own[1].data = own[1].data.clone()
    assert not stack.holds(weights, RANK)


def test_a_stack_has_the_adapters_behind_its_weights():
    own = [frozen(16, IN), frozen(17, IN)]
    exact, stack = torch.cat([w.detach().clone() for w in own]), StackedWeight(own, ranks=20)
    for ranks, columns in ((0, 33), (1, 49), (16, 49), (17, 65), (20, 65), (32, 65)):
        a = torch.randn(ranks, IN, device=DEVICE)
        behind = torch.zeros(columns - 33 - ranks, IN, device=DEVICE)
        assert stack.columns(ranks) == columns
        assert torch.equal(stack.with_a(a.split(8)), torch.cat([exact, a, behind]))
    assert torch.equal(stack.weight_OI, exact)
