"""The formulas themselves: values against the definition in float64, dtypes, and what each optional argument does."""

import pytest
import torch
from torch import Tensor

from theodora.functional import (
    dora_linear,
    dora_norm,
    dora_scale,
    factored_norm_squared,
    lora_delta,
    lora_linear,
    merged_weight,
    row_norm_squared,
)

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SCALE = 1.5


def draw(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=F64).to(dtype)


def parts(w: torch.dtype = F64, ab: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    """W (5, 4), A (2, 4), B (5, 2)."""
    return draw(5, 4, dtype=w), draw(2, 4, dtype=ab), draw(5, 2, dtype=ab)


def adapted(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return w.double() + SCALE * b.double() @ a.double()


@pytest.mark.parametrize(("stored", "wide"), [(F64, F64), (F32, F32), (BF16, F32), (torch.float16, F32)])
def test_norms_and_merged_weights_are_as_wide_as_said(stored, wide):
    """Whatever A and B are stored in: with float64 weights nothing is rounded to float32 on the way."""
    tolerance = 1e-14 if wide == F64 else 1e-6
    for ab in (F64, F32, BF16):
        w, a, b = parts(stored, ab)
        m = draw(5).abs()
        whole = adapted(w, a, b)
        norm = whole.norm(dim=1)
        expected = {
            "row_norm_squared": (row_norm_squared(w), w.double().square().sum(1)),
            "dora_norm": (dora_norm(w, a, b, SCALE), norm),
            "merged LoRA": (merged_weight(w, a, b, SCALE), whole),
            "merged DoRA": (merged_weight(w, a, b, SCALE, m), (m / norm)[:, None] * whole),
        }
        for name, (found, value) in expected.items():
            assert found.dtype == wide, name
            torch.testing.assert_close(found.double(), value, rtol=tolerance, atol=tolerance, msg=name)


def test_a_given_norm_of_the_frozen_weight_is_the_one_that_counts():
    w, a, b = parts(F32)
    given = row_norm_squared(w.double()) + 1
    found = dora_norm(w, a, b, SCALE, given)
    assert found.dtype == F32
    torch.testing.assert_close(found.double(), (adapted(w, a, b).square().sum(1) + 1).sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_rows_that_the_update_nearly_erases_keep_their_digits(dtype):
    """Several at once, each with its own remainder, among rows that are as usual."""
    w, a, b = parts(dtype, dtype)
    for row, remainder in ((1, 1e-4), (3, 3e-4)):
        w[row] = -SCALE * b[row] @ a
        w[row, 0] += remainder
    norm = adapted(w, a, b).norm(dim=1)
    found = dora_norm(w, a, b, SCALE)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), norm, rtol=1e-6 if dtype == F32 else 1e-12, atol=0)


def test_a_row_that_the_update_erases_has_the_norm_zero():
    w, a, b = parts()
    w[2] = b[2] = 0
    assert dora_norm(w, a, b, SCALE)[2] == 0


def test_the_norm_compiles_whole_and_carries_no_gradient():
    w, a, b = parts(F32, F32)
    a.requires_grad_(True)
    found = torch.compile(dora_norm, fullgraph=True, backend="eager")(w, a, b, SCALE)
    assert not found.requires_grad
    torch.testing.assert_close(found, dora_norm(w, a, b, SCALE))


def test_the_factored_norm_and_what_it_is_made_of():
    w, a, b = parts()
    squared, terms = factored_norm_squared(row_norm_squared(w), w @ a.T, a, b, SCALE)
    torch.testing.assert_close(squared, adapted(w, a, b).square().sum(1))
    torch.testing.assert_close(terms, w.square().sum(1) + lora_delta(a, b, SCALE).square().sum(1))


def test_the_scale_has_the_norms_dtype_and_is_one_where_there_is_no_direction():
    m = torch.tensor([2.0, 3.0], dtype=F64, requires_grad=True)
    g = dora_scale(m, torch.tensor([4.0, 0.0]))
    assert g.dtype == F32
    assert g.tolist() == [0.5, 1.0]
    (gradient,) = torch.autograd.grad(g.sum(), m)
    assert gradient.tolist() == [0.25, 0.0]


@pytest.mark.parametrize("x_dtype", [F64, F32, BF16])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_outputs_are_the_formulas_in_the_dtype_of_x(x_dtype, dropped, biased):
    w, a, b = parts(x_dtype, F64 if x_dtype == F32 else F32)
    x, m = draw(3, 4, dtype=x_dtype), draw(5, dtype=F32).abs()
    x_lora = draw(3, 4, dtype=x_dtype) if dropped else None
    bias = draw(5, dtype=x_dtype) if biased else None
    z = x.double() @ w.double().T + SCALE * (x if x_lora is None else x_lora).double() @ a.double().T @ b.double().T
    shift = 0 if bias is None else bias.double()
    norm = dora_norm(w, a, b, SCALE)
    tolerance = {F64: 1e-6, F32: 1e-5, BF16: 0.1}[x_dtype]  # A and B are float32 beside a float64 x
    for found, expected in (
        (lora_linear(x, w, bias, a, b, SCALE, x_lora_TI=x_lora), z + shift),
        (dora_linear(x, w, bias, a, b, SCALE, m, norm, x_lora_TI=x_lora), z * (m.double() / norm.double()) + shift),
    ):
        assert found.dtype == x_dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
