"""Float8 weights and their products against float64: on a GPU, under Triton's interpreter, or in plain torch."""

from itertools import product

import pytest
import torch

import formula
from theodora.kernels import float8
from theodora.kernels.base_weight import Float8Weight, PlainWeight, products
from theodora.kernels.float8 import (
    FLOAT8,
    dequantized,
    float8_linear,
    float8_linear_backward,
    float8_product,
    quantize_rows,
    reference_quantize_rows,
    transpose,
)
from theodora.kernels.operators import runs_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (5, 33), (2, 1000), (1, 16400)]

# Triton's interpreter says it of infinite values.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def same(one, other):
    return one.dtype == other.dtype and torch.equal(one.float(), other.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantising_equals_the_reference(shape, dtype):
    x, factors = normal(*shape, dtype=dtype), normal(shape[1])
    views = (x, torch.cat([x, x])[::2], torch.cat([x, x], 1)[:, ::2], x.T.contiguous().T)
    for given, times in product(views, (None, factors)):
        assert all(map(same, quantize_rows(given, times), reference_quantize_rows(given, times)))


def test_quantising_many_rows_with_factors():
    x, times = normal(1030, 20), normal(20)
    assert all(map(same, quantize_rows(x, times), reference_quantize_rows(x, times)))


def test_quantising_rounds_to_the_nearest_at_every_size():
    exponents = torch.linspace(-20, 0, 4000, device=DEVICE)
    x = torch.cat([2**exponents, -(2**exponents), torch.ones(1, device=DEVICE)])[None] * 3
    x8, scale = quantize_rows(x)
    grid = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(FLOAT8).double()
    grid = grid[grid.isfinite()]
    nearest = (x.double().T / scale.double() - grid).abs().amin(1)
    assert torch.allclose((x8.double() - x.double() / scale.double()).abs()[0], nearest, rtol=1e-4, atol=1e-6)
    assert float(x8.float().abs().max()) == 448


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_the_error_of_a_row_is_that_of_three_bits_whatever_its_size(size):
    x = normal(6, 500) * size
    x8, scale = quantize_rows(x)
    assert formula.error(x8.double() * scale.double()[:, None], x.double()) < 0.03


def test_rows_of_zeros_and_of_next_to_nothing_are_zero():
    x = normal(3, 40)
    x[0], x[1] = 0, 1e-38
    x8, scale = quantize_rows(x)
    assert not x8[:2].float().any()
    assert scale[:2].tolist() == [1, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_not_hidden(bad):
    x, w = normal(3, 32), normal(16, 32)
    x[1, 7] = bad
    w8, w_scale = quantize_rows(w)
    z = float8_linear(x, w8, w_scale)
    assert not bool(z[1].isfinite().any())
    assert bool(z[[0, 2]].isfinite().all())
    dx = float8_linear_backward(torch.full_like(z, bad), w8, w_scale)
    assert not bool(dx.isfinite().any())


@pytest.mark.parametrize("shape", [(16, 16), (144, 272), (128, 128), (5, 7), (3, 1)])
def test_transposing(shape):
    w8 = quantize_rows(normal(*shape))[0]
    for given in (w8, w8.T.contiguous().T):
        assert same(transpose(given), given.T.contiguous())
        assert transpose(given).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16, 16), (33, 80, 48), (7, 5, 3), (0, 16, 32)])
def test_products_equal_those_of_the_quantised_values(shape, dtype):
    """Nothing but the rounding of x and dz to e4m3 and of the result is lost."""
    tokens, inputs, outputs = shape
    x, dz = normal(tokens, inputs, dtype=dtype), normal(tokens, outputs, dtype=dtype)
    w8, w_scale = quantize_rows(normal(outputs, inputs))
    w = dequantized(w8, w_scale, torch.float64)
    x8, x_scale = reference_quantize_rows(x)
    z = float8_linear(x, w8, w_scale)
    rounding = torch.finfo(torch.bfloat16 if dtype == torch.float16 else dtype).eps if DEVICE == "cpu" else 1e-2
    assert z.dtype == dtype
    assert formula.error(z, dequantized(x8, x_scale, torch.float64) @ w.T) <= rounding
    d8, d_scale = reference_quantize_rows(dz, w_scale)
    dx = float8_linear_backward(dz, w8, w_scale)
    assert dx.dtype == dtype
    exact = dequantized(d8, d_scale, torch.float64) @ dequantized(w8, torch.ones_like(w_scale), torch.float64)
    assert formula.error(dx, exact) <= rounding


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_near_those_of_the_weight_itself(dtype):
    x, w, dz = normal(4, 9, 96, dtype=dtype), normal(64, 96) * normal(64, 1).exp(), normal(4, 9, 64, dtype=dtype)
    w8, w_scale = quantize_rows(w)
    assert formula.error(float8_linear(x, w8, w_scale), x.double() @ w.double().T) < 0.05
    assert formula.error(float8_linear_backward(dz, w8, w_scale), dz.double() @ w.double()) < 0.05


def test_one_quantisation_serves_several_weights_and_any_factor_goes_into_the_scale():
    x, g = normal(5, 32, dtype=torch.bfloat16), 1 + 0.1 * normal(48)
    x8, x_scale = quantize_rows(x)
    for w in (normal(48, 32), normal(48, 32)):
        w8, w_scale = quantize_rows(w)
        z = float8_linear(x, w8, w_scale)
        assert torch.equal(float8_product(x8, x_scale, w8, w_scale), z)
        assert formula.error(float8_product(x8, x_scale, w8, w_scale * g), g * z.double()) < 1e-2


def test_products_that_share_x_equal_those_alone():
    x, plain = normal(5, 32), PlainWeight(normal(16, 32))
    weights = [plain, *(Float8Weight(*quantize_rows(normal(48, 32)), torch.bfloat16) for _ in range(2))]
    for given in (weights, weights[1:], weights[:2]):
        found = products(x, given)
        assert all(torch.equal(z, weight.product(x)) for z, weight in zip(found, given, strict=True))


@pytest.mark.skipif(not runs_triton(torch.zeros(1, device=DEVICE)), reason="a Triton kernel")
def test_widened_weights():
    from theodora.kernels.triton.float8 import widen

    every = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    every = every.masked_fill(every % 128 == 127, 0).view(FLOAT8).view(16, 16).repeat(3, 5)  # weights have no NaN
    for w8 in (every, every.T, every[:, ::2], every[:0]):
        torch.testing.assert_close(widen(w8), w8.to(torch.bfloat16), rtol=0, atol=0)


def test_weights_that_lie_transposed():
    """As GPT-2's do: stored (I, O), seen as (O, I)."""
    x, dz = normal(5, 32), normal(5, 48)
    w8, w_scale = quantize_rows(normal(48, 32))
    other = w8.T.contiguous().T
    assert torch.equal(float8_linear(x, w8, w_scale), float8_linear(x, other, w_scale))
    assert torch.equal(float8_linear_backward(dz, w8, w_scale), float8_linear_backward(dz, other, w_scale))


def test_autocast_changes_nothing():
    x = normal(5, 32)
    w8, w_scale = quantize_rows(normal(48, 32))
    expected = float8_linear(x, w8, w_scale)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(float8_linear(x, w8, w_scale), expected)


def test_a_weight_that_lost_its_dtype_is_refused():
    w8, w_scale = quantize_rows(normal(48, 32))
    with pytest.raises(TypeError, match=r"expected torch\.float8_e4m3fn"):
        float8_linear(normal(5, 32), w8.bfloat16(), w_scale)


def test_operators_are_sound():
    x, dz = normal(6, 32), normal(6, 16)
    w8, w_scale = quantize_rows(normal(16, 32))
    x8, x_scale = quantize_rows(x)
    for name, given in {
        "float8_quantize_rows": (dz, w_scale),
        "float8_transpose": (w8,),
        "float8_product": (x8, x_scale, w8, w_scale, torch.bfloat16),
        "float8_linear": (x, w8, w_scale),
        "float8_linear_backward": (dz, w8, w_scale),
    }.items():
        operator = getattr(torch.ops.theodora, name).default
        # Gradients are the business of the callers, and the check of the schema cannot compare float8.
        torch.library.opcheck(operator, given, test_utils="test_faketensor")


def test_falling_back_is_said_once(caplog):
    if float8.multiplies_float8(torch.device(DEVICE)):
        pytest.skip("nothing to fall back from")
    float8._say_once.cache_clear()
    w8, w_scale = quantize_rows(normal(16, 32))
    for _ in range(2):
        float8_linear(normal(2, 32), w8, w_scale)
    assert [record.message.partition(": ")[2] for record in caplog.records] == ["cpu has no products of float8."]
