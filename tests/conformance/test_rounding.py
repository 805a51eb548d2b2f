"""The oracle and the bounds: the walk computes the formula, and real rounding stays within its bound without crowding
it from far away."""

import pytest
import torch

from theodora.conformance import formula
from theodora.conformance.cases import KINDS, VARIANTS, base_numbers, build, flat, inputs, trained_values
from theodora.conformance.rounding import F64, Rounded, distance, roundoff
from theodora.conformance.trial import with_values

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(variant, kind, seed=1):
    base = base_numbers(build("fp32"))[kind]
    return with_values(base, trained_values(base, VARIANTS[variant], kind, seed), VARIANTS[variant].scale(kind))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rounding_is_as_large_as_its_variance_says(dtype):
    value = torch.randn(400, 50, dtype=F64)
    rounded = Rounded.exact(value).to(dtype)
    found = distance(value.to(dtype), value)
    assert 0.2 * rounded.bound() < found < rounded.bound()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_stored_already_is_not_rounded(dtype):
    value = torch.randn(40, 50).to(dtype)
    assert Rounded.exact(value).to(dtype).bound() == 0


def test_a_product_in_float32_is_as_far_off_as_its_variance_says():
    a, b = torch.randn(64, 300), torch.randn(300, 80)
    exact = Rounded.exact(a) @ Rounded.exact(b)
    found = distance(a @ b, exact.value)
    assert 0.01 * exact.bound() < found < exact.bound()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["lora", "dora", "dora-rslora-patterns"])
def test_the_walk_computes_the_formula(variant, kind):
    n = numbers(variant, kind)
    rows = flat(inputs("fp32")[KINDS.index(kind)], kind)
    dy = torch.randn(len(rows), len(n.weight_OI), dtype=F64)
    torch.testing.assert_close(formula.walk(n, rows, torch.float32).y.value, formula.output(n, rows))
    exact = formula.gradients(n, rows, dy)
    for part, found in formula.walk_back(n, rows, dy, torch.float32).items():
        torch.testing.assert_close(found.value, exact[part])
    torch.testing.assert_close(formula.walk_merge(n, torch.float32).value, formula.adapted_weight(n))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_gradients_are_those_of_autograd_with_a_constant_norm(variant, kind):
    n = numbers(variant, kind)
    rows = flat(inputs("fp32")[KINDS.index(kind)], kind).requires_grad_()
    leaves = {"x": rows}
    for part, value in (("A", n.a_RI), ("B", n.b_OR), ("m", n.magnitude_O)):
        if value is not None:
            leaves[part] = value.clone().requires_grad_()
    live = formula.replace(n, a_RI=leaves["A"], b_OR=leaves["B"], magnitude_O=leaves.get("m"))
    v = formula.direction(live)
    g = torch.ones(len(v), dtype=F64)
    if "m" in leaves:
        norm = v.detach().norm(dim=1)
        g = torch.where(norm > 0, leaves["m"] / norm.clamp_min(1e-300), 1.0)
    dy = torch.randn(len(rows), len(v), dtype=F64)
    (rows @ (g[:, None] * v).T).backward(dy)
    for part, exact in formula.gradients(n, rows.detach(), dy).items():
        torch.testing.assert_close(leaves[part].grad, exact)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_sum_of_adapters_as_one_adapter(variant):
    both, weights = [numbers(variant, "linear", 1), numbers(variant, "linear", 2)], [0.7, -0.4]
    wanted = both[0].weight_OI + sum(w * formula.change(n) for w, n in zip(weights, both, strict=True))
    torch.testing.assert_close(formula.adapted_weight(formula.summed(both, weights)), wanted)
    torch.testing.assert_close(formula.adapted_weight(formula.dense(both[0], wanted - both[0].weight_OI, True)), wanted)


def test_distances():
    one = torch.ones(3)
    assert distance(one, one) == 0
    assert distance(torch.tensor([1.0, float("nan"), 1.0]), one) == float("inf")
    assert distance(torch.ones(4), one) == float("inf")
    assert distance(torch.full((3,), 0.5), torch.zeros(3)) == pytest.approx(0.75**0.5)
    assert roundoff(torch.bfloat16) == 2**-8
