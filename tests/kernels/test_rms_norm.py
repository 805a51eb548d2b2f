"""RMSNorm against float64: the kernels on a GPU or under Triton's interpreter, the plain reference elsewhere."""

import copy

import pytest
import torch
from torch import nn

import formula
from registered import opcheck
from theodora import kernels
from theodora.kernels.notes import norm_of
from theodora.kernels.operators import interpreted
from theodora.kernels.rms_norm import NormStyle, fast_forward, is_rms_norm, rms_norm, rms_norm_reference
from tiny import FAMILIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 3), (3, 5), (2, 7, 64), (5, 96), (2, 3, 4, 16), (4, 1000), (2, 4097)]


def budget(dtype):
    """What a kernel's error may be of the reference's; Triton's interpreter cuts bfloat16 off where a GPU rounds."""
    return 5 if dtype == torch.bfloat16 and interpreted() and DEVICE == "cpu" else 2


def inputs(shape, dtype, size=1.0, weight_dtype=None):
    x = (torch.randn(shape, device=DEVICE) * size).to(dtype)
    w = torch.randn(shape[-1], device=DEVICE).to(weight_dtype or dtype)
    return x, w, torch.randn(shape, device=DEVICE).to(dtype)


def run(norm, x, w, dy, *args):
    x = x.detach().clone().requires_grad_()
    y, rstd = norm(x, w, *args)
    y.backward(dy.to(y.dtype))
    return y.detach(), rstd.detach(), x.grad


def exact(x, w, dy, eps, offset):
    return run(rms_norm_reference, x.double(), w.double(), dy.double(), eps, offset)


@pytest.mark.parametrize("cast", ["llama", "gemma"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(shape, dtype, offset, cast):
    given, rounding = inputs(shape, dtype, size=3.0), torch.finfo(dtype).eps / 2
    found = run(rms_norm, *given, 1e-5, offset, cast)
    plain = run(rms_norm_reference, *given, 1e-5, offset, cast)
    for value, reference, expected in zip(found, plain, exact(*given, 1e-5, offset), strict=True):
        assert value.dtype == reference.dtype
        assert value.shape == reference.shape
        assert formula.error(value, expected) <= budget(dtype) * formula.error(reference, expected) + rounding


@pytest.mark.parametrize("size", [1e-4, 1e3])
def test_small_and_large_rows_and_rows_of_zeros(size):
    x, w, dy = inputs((4, 40), torch.float32, size)
    x[1] = 0
    found = run(rms_norm, x, w, dy, 1e-6)
    for value, expected in zip(found, exact(x, w, dy, 1e-6, 0.0), strict=True):
        assert formula.error(value, expected) < 1e-5


def test_a_wider_weight_widens_the_output_as_in_llama():
    given = inputs((3, 24), torch.bfloat16, weight_dtype=torch.float32)
    for cast, dtype in (("llama", torch.float32), ("gemma", torch.bfloat16)):
        y, _, dx = run(rms_norm, *given, 1e-6, 0.0, cast)
        assert y.dtype == run(rms_norm_reference, *given, 1e-6, 0.0, cast)[0].dtype == dtype
        assert dx.dtype == torch.bfloat16


def test_rows_that_lie_apart():
    x, w, dy = inputs((6, 48), torch.float32)
    apart, dy_apart = x.T.contiguous().T, dy.T.contiguous().T
    assert not apart.is_contiguous()
    for found, expected in zip(run(rms_norm, apart, w, dy_apart, 1e-6), run(rms_norm, x, w, dy, 1e-6), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_that_do_without_the_output_learn_from_large_rows_and_small_gradients(dtype):
    norm = nn.RMSNorm(64, eps=1e-6, device=DEVICE, dtype=dtype).requires_grad_(False)
    h = (1e3 * torch.randn(32, 64, device=DEVICE)).to(dtype).requires_grad_()
    w, dy = torch.randn(2, 32, 64, device=DEVICE).to(dtype) * torch.tensor([[[0.1]], [[1e-4]]], device=DEVICE)
    a, b = torch.randn(4, 64, device=DEVICE) / 8, torch.randn(32, 4, device=DEVICE)

    def gradient(x):
        learned = a.to(x.dtype if x.dtype == torch.float64 else a.dtype, copy=True).requires_grad_()
        y = kernels.lora_linear(x, w.to(x.dtype), None, learned, b.to(learned.dtype), 1.0)
        y.backward(dy[:, :32].to(x.dtype))
        return learned.grad.double()

    wanted = gradient(rms_norm_reference(h.detach().double(), norm.weight.double(), 1e-6)[0])
    found = gradient(fast_forward(norm, NormStyle(1e-6, 0.0, "llama"), h, norm.forward))
    assert formula.error(found, wanted) < 0.03


def test_no_rows():
    x, w, dy = inputs((0, 8), torch.float32)
    y, rstd, dx = run(rms_norm, x, w, dy, 1e-6)
    assert (y.shape, rstd.shape, dx.shape) == ((0, 8), (0,), (0, 8))


def test_the_operators_keep_their_word():
    x, w, dy = inputs((3, 16), torch.float32)
    for cast in ("llama", "gemma"):
        opcheck(torch.ops.theodora.rms_norm, (x, w, 1e-6, 1.0, cast))
    opcheck(torch.ops.theodora.rms_norm_backward, (dy, x, rms_norm(x, w, 1e-6)[1], w, 1.0))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.13 does it itself
def test_it_compiles_without_a_break():
    x, w, dy = inputs((3, 16), torch.float32)
    compiled = torch.compile(rms_norm, backend="aot_eager", fullgraph=True)
    for found, expected in zip(run(compiled, x, w, dy, 1e-6), run(rms_norm, x, w, dy, 1e-6), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


OWN = {"gemma": (1.0, "gemma")}  # all others are Llama's


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_of_the_families_are_known_by_what_they_do(family, tiny_model):
    model = tiny_model(family)
    for name, module in model.named_modules():
        is_norm = "rmsnorm" in type(module).__name__.lower()
        offset, cast = OWN.get(family, (0.0, "llama"))
        expected = NormStyle(
            is_norm and module.__dict__.get("variance_epsilon", module.__dict__.get("eps")), offset, cast
        )
        assert is_rms_norm(module) == (expected if is_norm else None), name


def torch_norm():
    return nn.RMSNorm(24, eps=1e-5)


class Scaled(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x) * 1.01


class OtherEps(nn.RMSNorm):
    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True).sqrt() + self.eps).reciprocal() * self.weight


class Gated(nn.RMSNorm):
    def forward(self, x, gate=None):
        return super().forward(x)


def hooked():
    norm = nn.RMSNorm(24, eps=1e-5)
    norm.forward = lambda x: x
    return norm


def test_torchs_own_norm_is_one():
    assert is_rms_norm(torch_norm()) == NormStyle(1e-5, 0.0, "gemma")


@pytest.mark.parametrize(
    "module",
    [nn.LayerNorm(24), nn.Linear(3, 3), nn.Identity(), nn.RMSNorm((3, 4), eps=1e-5), hooked()]
    + [kind(24, eps=1e-5) for kind in (Scaled, OtherEps, Gated)],
    ids=lambda module: type(module).__name__,
)
def test_what_is_no_rms_norm(module):
    assert is_rms_norm(module) is None


def test_looking_changes_nothing():
    module = torch_norm()
    seen = []
    module.register_forward_hook(lambda *_: seen.append(1))
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    assert is_rms_norm(module) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(before["weight"], module.weight)
    assert not seen


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_gives_the_same_by_the_fast_forward(family, dtype, tiny_model):
    norm = tiny_model(family, dtype=dtype).model.norm.to(DEVICE)
    norm.weight.requires_grad_(False).normal_()
    style = is_rms_norm(norm)
    x = torch.randn(2, 3, 32, device=DEVICE, dtype=dtype, requires_grad=True)
    y = fast_forward(norm, style, x, lambda _: pytest.fail("it fits"))
    rounding = 2 * budget(dtype) * torch.finfo(dtype).eps  # of a reciprocal root, a sum and two products, both ways
    torch.testing.assert_close(y, norm(x), rtol=rounding, atol=0)
    x_flat, rstd, weight, offset = norm_of(y)
    rebuilt = x_flat.float() * rstd[:, None] * (weight.float() + offset)
    torch.testing.assert_close(rebuilt.to(dtype).view_as(y), y, rtol=rounding, atol=1e-6)
    with torch.no_grad():
        assert norm_of(fast_forward(norm, style, x, norm)) is None


def test_a_weight_that_trains_goes_through_the_module_itself():
    norm = torch_norm()
    x = torch.randn(2, 24)
    assert fast_forward(norm, NormStyle(1e-5, 0.0, "gemma"), x, lambda x: x) is x
