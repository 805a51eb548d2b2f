"""Outputs and gradients of both paths against float64 autograd through the written-out formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import formula
from theodora import functional, kernels

WIDTHS = {torch.float64: 1e-12, torch.float32: 2e-5}


@st.composite
def problems(draw):
    """Shapes, options and values of one layer, all in float64."""
    tokens, inputs, outputs = (draw(st.integers(1, n)) for n in (24, 40, 40))
    rank = draw(st.integers(1, 64))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=formula.F64)

    w = normal(outputs, inputs)
    if draw(st.booleans()):
        w[draw(st.integers(0, outputs - 1))] = 0
    values = {
        "x": normal(2, tokens, inputs),
        "w": w,
        "bias": normal(outputs) if draw(st.booleans()) else None,
        "a": normal(rank, inputs) / inputs**0.5,
        "b": normal(outputs, rank) / rank**0.5 * draw(st.sampled_from([0.0, 0.03, 1.0])),
        "m": w.norm(dim=1) * torch.exp(normal(outputs) * draw(st.sampled_from([0.0, 0.01, 1.0]))),
        "x_lora": normal(2, tokens, inputs) if draw(st.booleans()) else None,
    }
    return values, draw(st.sampled_from([0.25, 1.0, 2.0])), normal(2, tokens, outputs)


def run(layer, values, scale, dy, dtype, adapter_dtype):
    """Output and all gradients of a layer in `dtype`, its adapter stored in `adapter_dtype`."""
    leaf = {
        key: None
        if value is None
        else value.clone().to(adapter_dtype if key in "abm" else dtype).requires_grad_(key not in ("w", "bias"))
        for key, value in values.items()
    }
    y = layer(leaf, scale)
    assert y.dtype == dtype
    y.backward(dy.to(dtype))
    # A tensor that no path leads to has no gradient; autograd leaves None, the kernels step a zero.
    grads = {key: leaf[key].grad for key in ("x", "a", "b", "m", "x_lora") if leaf[key] is not None}
    return {"y": y.detach(), **{key: torch.zeros_like(leaf[key]) if g is None else g for key, g in grads.items()}}


def exact_dora(v, scale):
    return formula.dora(v["x"], v["w"], v["bias"], v["a"], v["b"], scale, v["m"], v["x_lora"])


def exact_lora(v, scale):
    return formula.lora(v["x"], v["w"], v["bias"], v["a"], v["b"], scale, v["x_lora"])


def dora_by(module):
    def layer(v, scale):
        norm = functional.dora_norm(v["w"], v["a"], v["b"], scale)
        return module.dora_linear(v["x"], v["w"], v["bias"], v["a"], v["b"], scale, v["m"], norm, x_lora_TI=v["x_lora"])

    return layer


def lora_by(module):
    return lambda v, scale: module.lora_linear(v["x"], v["w"], v["bias"], v["a"], v["b"], scale, x_lora_TI=v["x_lora"])


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("module", [functional, kernels])
@pytest.mark.parametrize("dtype", WIDTHS)
@settings(max_examples=min(40, settings.default.max_examples), deadline=None, derandomize=True)
@given(problem=problems())
def test_agrees_with_float64(problem, module, dtype, method):
    values, scale, dy = problem
    layer, exact = (dora_by(module), exact_dora) if method == "dora" else (lora_by(module), exact_lora)
    expected = run(exact, values, scale, dy, formula.F64, formula.F64)
    found = run(layer, values, scale, dy, dtype, dtype)
    for key, value in expected.items():
        size = float(value.norm()) or 1.0
        assert float((found[key].double() - value).norm()) <= WIDTHS[dtype] * max(size, 1e-3), key


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=min(25, settings.default.max_examples), deadline=None, derandomize=True)
@given(problem=problems())
def test_half_precision_is_as_good_as_the_reference(problem, dtype, method):
    values, scale, dy = problem
    # The same rounded weights for all three, so that what is compared is the arithmetic.
    values = {k: v if v is None or k in "abm" else v.to(dtype).double() for k, v in values.items()}
    make, exact = (dora_by, exact_dora) if method == "dora" else (lora_by, exact_lora)
    expected = run(exact, values, scale, dy.to(dtype).double(), formula.F64, formula.F64)
    fast = run(make(kernels), values, scale, dy, dtype, torch.float32)
    plain = run(make(functional), values, scale, dy, dtype, torch.float32)
    unit = torch.finfo(dtype).eps
    for key, value in expected.items():
        assert formula.error(fast[key], value) <= 2 * formula.error(plain[key], value) + unit, key


def test_norm_forms_no_dense_update(monkeypatch):
    """B·A is (O, I); nothing of that size but the weight may be made."""
    w, a, b = torch.randn(300, 200), torch.randn(4, 200), torch.randn(300, 4)
    monkeypatch.setattr(functional, "lora_delta", lambda *_: pytest.fail("B·A was formed"))
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(func for t in (out,) if isinstance(t, torch.Tensor) and t.shape == w.shape)
            return out

    squared = functional.row_norm_squared(w)
    with Watch():
        norm = functional.dora_norm(w, a, b, 0.5, squared)
    assert not [f for f in made if "mm" in str(f)]
    torch.testing.assert_close(norm, (w + 0.5 * b @ a).norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("left", [1e-1, 1e-2, 1e-3, 1e-5])
def test_norm_survives_cancellation(left):
    """An update that erases all but a little of each row leaves norms that agree with float64."""
    w = torch.randn(12, 40, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    a, b = (vh * s[:, None]).float(), (-(1 - left) * u).float()
    w = w.float()
    exact = (w.double() + b.double() @ a.double()).norm(dim=1)
    assert formula.error(functional.dora_norm(w, a, b, 1.0), exact) < 1e-4


def test_zero_row_starts_as_lora_and_then_moves():
    """A row of zeros has no direction: its output is zero, stays finite, and both B and m can learn."""
    w = torch.randn(5, 7)
    w[2] = 0
    a, b = torch.randn(3, 7, requires_grad=True), torch.zeros(5, 3, requires_grad=True)
    norm = functional.dora_norm(w, a, b, 1.0)
    m = norm.clone().requires_grad_()
    x = torch.randn(4, 7)
    for _ in range(3):
        y = kernels.dora_linear(x, w, None, a, b, 1.0, m, functional.dora_norm(w, a, b, 1.0))
        assert bool(torch.isfinite(y).all())
        (y - 1).square().sum().backward()
        with torch.no_grad():
            for t in (a, b, m):
                t -= 0.01 * t.grad
                assert bool(torch.isfinite(t.grad).all())
                t.grad = None
    assert bool(b[2].any())
    assert m[2] != 0


def test_reference_switch():
    w, a, b, x = torch.randn(5, 7), torch.randn(3, 7), torch.randn(5, 3), torch.randn(4, 7)
    a.requires_grad_()
    with kernels.reference():
        assert "Add" in type(kernels.lora_linear(x, w, None, a, b, 1.0).grad_fn).__name__
    assert "View" in type(kernels.lora_linear(x, w, None, a, b, 1.0).grad_fn).__name__
