"""‖W + s·B·A‖ against float64: the kernel on a GPU or under Triton's interpreter, the plain reference elsewhere."""

import pytest
import torch

import formula
from formula import DEVICE
from registered import opcheck
from theodora import functional
from theodora.kernels.float8 import FLOAT8
from theodora.kernels.operators import runs_triton
from theodora.kernels.weight_norm import dora_norm, dora_norms, stack_norms

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (5, 300, 3), (40, 70, 16), (33, 130, 40), (17, 64, 256)]
EPS = torch.finfo(torch.float32).eps


def inputs(shape, dtype, size=0.3, transposed=False):
    outputs, width, rank = shape
    w = torch.randn(*((width, outputs) if transposed else (outputs, width)), device=DEVICE).to(dtype)
    a = torch.randn(rank, width, device=DEVICE) / width**0.5
    return w.T if transposed else w, a, size * torch.randn(outputs, rank, device=DEVICE)


def exact(w, a, b, scale):
    return (w.double() + scale * b.double() @ a.double()).norm(dim=1)


def check(w, a, b, scale=0.5):
    """Each row: its relative error, at most twice the largest of the reference's."""
    expected = exact(w, a, b, scale)
    squared = functional.row_norm_squared(w)
    found, plain = dora_norm(w, a, b, scale, squared, None), functional.dora_norm(w, a, b, scale, squared)
    assert found.dtype == torch.float32

    def worst(norm):
        return float(((norm.double() - expected).abs() / expected.where(expected > 0, 1)).max())

    assert worst(found) <= 2 * worst(plain) + 4 * EPS


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(shape, dtype, transposed):
    for size in (1e-3, 0.3, 10.0):
        check(*inputs(shape, dtype, size, transposed))


@pytest.mark.parametrize("rank", [5, 40, 256])
def test_from_products(rank, monkeypatch):
    """What a GPU does: W Aᵀ by a product of its own, the rows that cancel by a kernel of their own at large ranks."""
    pytest.importorskip("triton")
    from theodora.kernels.triton import weight_norm

    if DEVICE == "cpu":
        monkeypatch.setattr(weight_norm, "_multiplied", lambda w, a3, _: w.float() @ a3.flatten(0, 1).float().T)
    w, a, b = inputs((21, 48, rank), torch.bfloat16)
    w[1], b[1] = 0, 0
    a[0], b[7] = -1.98 * w[7].float(), 0
    b[7, 0] = 1
    found = dora_norm(w, a, b, 0.5, functional.row_norm_squared(w), None)
    torch.testing.assert_close(found.double(), exact(w, a, b, 0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rank", [5, 33])
def test_a_is_split_and_its_gram_is_as_exact_as_float32s(rank):
    if not runs_triton(torch.empty(0, device=DEVICE)):
        pytest.skip("a kernel of Triton's alone")
    from theodora.kernels.triton import weight_norm

    a = torch.randn(rank, 2100, device=DEVICE)
    a3, gram = weight_norm._split_with_gram(a, weight_norm.rank_block(rank))
    assert torch.equal(a3.double().sum(0), a.double())
    exact = a.double() @ a.double().T
    assert (gram.double().sum(0) - exact).abs().max() <= 4 * EPS * exact.abs().max()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("rank", [5, 40, 256])
def test_several_weights_at_once(rank, quantized, monkeypatch):
    if runs_triton(torch.empty(0, device=DEVICE)) and DEVICE == "cpu":
        from theodora.kernels.triton import weight_norm

        monkeypatch.setattr(weight_norm, "_multiplied", lambda w, a3, _: w.float() @ a3.flatten(0, 1).float().T)
    ws, factors = [], [inputs((21, 48, rank), torch.bfloat16) for _ in range(3)]
    scales = torch.rand(3, 21, device=DEVICE) + 0.5 if quantized else None
    for w, _, b in factors:
        w[1], b[1] = 0, 0
        ws.append(w.to(FLOAT8) if quantized else w)
    rows = torch.ones(3, 21, device=DEVICE) if scales is None else scales
    plain = [w.double() * scale[:, None] for w, scale in zip(ws, rows, strict=True)]
    w, a, b = plain[1], *factors[1][1:]
    a[0], b[7] = -1.98 * w[7].float(), 0  # a row whose terms cancel, in the middle one
    b[7, 0] = 1
    squared = torch.stack([w.square().sum(1).float() for w in plain])
    found = dora_norms(ws, *(torch.stack([f[i] for f in factors]) for i in (1, 2)), 0.5, squared, scales)
    expected = torch.stack([exact(w, a, b, 0.5) for w, (_, a, b) in zip(plain, factors, strict=True)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros(dtype):
    w, a, b = inputs((20, 48, 5), dtype)
    w[1], b[1] = 0, 0
    w[2], b[3] = 0, 0
    check(w, a, b)
    assert dora_norm(w, a, b, 0.5, functional.row_norm_squared(w), None)[1] == 0


@pytest.mark.parametrize("left", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_the_update_all_but_erases(dtype, left):
    w, a, b = inputs((20, 48, 5), dtype)
    a[0], b[7] = -2 * (1 - left) * w[7].float(), 0
    b[7, 0] = 1
    expected = exact(w, a, b, 0.5)
    found = dora_norm(w, a, b, 0.5, functional.row_norm_squared(w), None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3 if left < 1e-3 else 1e-5, atol=0)


def test_factors_in_any_order_and_dtype():
    w, a, b = inputs((20, 48, 5), torch.bfloat16)
    squared = functional.row_norm_squared(w)
    expected = dora_norm(w, a, b, 0.5, squared, None)
    turned = dora_norm(w, a.T.contiguous().T, b.T.contiguous().T, 0.5, squared, None)
    torch.testing.assert_close(turned, expected, rtol=1e-6, atol=0)
    rounded = a.bfloat16(), b.bfloat16()
    found = dora_norm(w, *rounded, 0.5, squared, None)
    torch.testing.assert_close(found.double(), exact(w, *rounded, 0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_quantised_weight(shape):
    w, a, b = inputs(shape, torch.float32)
    w_scale = w.abs().amax(1) / 448
    w8 = (w / w_scale[:, None]).to(FLOAT8)
    plain = w8.float() * w_scale[:, None]
    squared = functional.row_norm_squared(plain)
    found = dora_norm(w8, a, b, 0.5, squared, w_scale)
    expected = exact(plain, a, b, 0.5)
    reference = functional.dora_norm(plain, a, b, 0.5, squared)
    assert formula.error(found, expected) <= 2 * formula.error(reference, expected) + EPS


def test_the_operator_keeps_its_word():
    w, a, b = inputs((6, 20, 3), torch.bfloat16)
    opcheck(torch.ops.theodora.dora_norm, (w, a, b, 0.5, functional.row_norm_squared(w), None))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [5, 40])
def test_several_weights_in_one_tensor(rank, transposed):
    each = [inputs((21, 48, rank), torch.bfloat16) for _ in range(3)]
    w, a, b = (torch.stack(tensors) for tensors in zip(*each, strict=True))
    a[1, 0], b[1, 7] = -1.98 * w[1, 7].float(), 0  # a row whose terms cancel, in the middle one
    b[1, 7, 0] = 1
    w[2, 3], b[2, 3] = 0, 0
    held = w.mT.contiguous().mT if transposed else w
    found = stack_norms(held, a, b, 0.5, functional.row_norm_squared(held))
    expected = torch.stack([exact(*one, 0.5) for one in zip(w, a, b, strict=True)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
