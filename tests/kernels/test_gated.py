"""The middle of a gated MLP, and the whole of it, against float64: see `formula.DEVICE` for what runs."""

from dataclasses import fields, replace
from itertools import product

import pytest
import torch

import formula
from formula import DEVICE
from registered import opcheck
from theodora import functional
from theodora.kernels import gated as kernel
from theodora.kernels.base_weight import PlainWeight, StackedWeight
from theodora.kernels.gated_mlp import Stacks, gated_mlp
from theodora.kernels.operators import runs_triton
from theodora.kernels.parts import Parts, Update

# numpy's, in Triton's interpreter: exp may give infinity, and what comes of it is tested.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["plain", "lora", "dora", "magnitude"]


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def update(kind, tokens, outputs, rank, dtype, biased):
    low, scaled = kind in ("lora", "dora"), kind in ("dora", "magnitude")
    norm = torch.rand(outputs, device=DEVICE) + 0.5
    magnitude = norm * torch.exp(0.3 * normal(outputs))
    norm[0] = 0
    return Update(
        normal(tokens, rank + 3, dtype=dtype)[:, 1 : rank + 1] if low else None,
        0.2 * normal(outputs, rank) if low else None,
        0.7,
        magnitude if scaled else None,
        norm if scaled else None,
        normal(outputs, dtype=dtype) if biased else None,
    )


def wide(value):
    if isinstance(value, Update):
        return replace(value, **{field.name: wide(getattr(value, field.name)) for field in fields(Update)})
    return value.double() if isinstance(value, torch.Tensor) else value


def gradients(run, *given):
    """What `run` returns, and what it writes to the places for dz₁ and dz₂."""
    *rest, activation, keep_h = given
    places = [torch.full_like(given[0], float("nan")) for _ in range(2)]
    return [*run(*rest, activation, *places, keep_h), *places]


def check(tokens, outputs, ranks, kinds, dtype, activation, biased, keep_h=False, joins=True):
    """Forward and backward; `kinds` and `ranks` of gate, up and down (only its rank counts, 0 for no adapter)."""
    gate, up = (update(kind, tokens, outputs, rank, dtype, biased) for kind, rank in zip(kinds, ranks, strict=False))
    z1, z2 = normal(tokens, 2 * outputs + 3, dtype=dtype)[:, 3:].split(outputs, dim=1)
    found, plain = (run(z1, z2, gate, up, activation) for run in (kernel.gated, kernel.gated_reference))
    exact = kernel.gated_reference(*map(wide, (z1, z2, gate, up)), activation)
    assert formula.within_budget(found, plain, exact, dtype)
    low, a = (normal(tokens, ranks[2], dtype=dtype), 0.2 * normal(ranks[2], outputs)) if ranks[2] else (None, None)
    given = normal(tokens, outputs, dtype=dtype), low, a if joins else None, z1, z2, gate, up
    found, plain = (
        gradients(run, *given, activation, keep_h) for run in (kernel.gated_backward, kernel.gated_backward_reference)
    )
    exact = gradients(kernel.gated_backward_reference, *map(wide, given), activation, keep_h)
    for value, reference, expected in zip(found, plain, exact, strict=True):
        assert formula.within_budget(value, reference, expected, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("activation", kernel.ACTIVATIONS)
def test_activations(activation, dtype):
    check(33, 70, (5, 5, 5), ("dora", "dora"), dtype, activation, biased=True)


@pytest.mark.parametrize("kinds", [*product(KINDS, KINDS)], ids=" ".join)
@pytest.mark.parametrize("down", [0, 4])
def test_all_combinations_of_adapters(kinds, down):
    for dtype in DTYPES:
        check(17, 40, (3, 7, down), kinds, dtype, "silu", biased=down == 4, keep_h=down == 4)


@pytest.mark.parametrize("ranks", [(1, 1, 1), (16, 17, 2), (64, 33, 1), (65, 3, 100), (128, 1, 128), (2, 1, 128)])
@pytest.mark.parametrize("shape", [(3, 9), (70, 130)])
def test_ranks_and_shapes(ranks, shape):
    for dtype in DTYPES:
        check(*shape, ranks, ("dora", "lora"), dtype, "gelu_tanh", biased=False, joins=ranks[2] != 2)


@pytest.mark.parametrize("activation", kernel.ACTIVATIONS)
def test_far_from_zero(activation):
    """Nothing overflows on the way to what is finite."""
    z = torch.tensor([-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4], device=DEVICE)[:, None].repeat(1, 3)
    nothing = Update(None, None, 1.0, None, None, None)
    given = torch.ones_like(z), None, None, z, torch.ones_like(z), nothing, nothing
    for run in (kernel.gated_backward, kernel.gated_backward_reference):
        found, exact = gradients(run, *given, activation, True), gradients(run, *map(wide, given), activation, True)
        for value, expected in zip(found, exact, strict=True):
            torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kinds", [("plain", "plain"), ("dora", "lora")])
def test_the_operators_keep_their_word(kinds):
    given = normal(5, 12), normal(5, 12)
    spread = [getattr(u, f.name) for u in (update(kind, 5, 12, 3, torch.float32, True) for kind in kinds)
              for f in fields(Update)]  # fmt: skip
    opcheck(torch.ops.theodora.gated, (*given, *spread, "silu"))
    for low, a, keep_h in ((None, None, True), (normal(5, 3), normal(3, 12), False)):
        places = torch.zeros(5, 12, device=DEVICE), torch.zeros(5, 12, device=DEVICE)
        opcheck(torch.ops.theodora.gated_backward, (normal(5, 12), low, a, *given, *spread, "silu", *places, keep_h))


# The whole MLP -------------------------------------------------------------------------------------------------------


def layer(kind, outputs, inputs, rank, dtype, biased):
    w = torch.nn.Parameter(normal(outputs, inputs, dtype=dtype) / inputs**0.5, requires_grad=False)
    bias = normal(outputs, dtype=dtype) if biased else None
    if kind == "plain":
        return Parts(PlainWeight(w), bias)
    a, b = (normal(rank, inputs) / inputs**0.5).requires_grad_(), (0.2 * normal(outputs, rank)).requires_grad_()
    if kind == "lora":
        return Parts(PlainWeight(w), bias, a, b, 0.7)
    norm = functional.dora_norm(w, a, b, 0.7)
    return Parts(PlainWeight(w), bias, a, b, 0.7, (norm * torch.exp(0.1 * normal(outputs))).requires_grad_(), norm)


def copied(parts, dtype=None):
    """With leaves of its own, and w and bias in another dtype perhaps; a wide copy is wide altogether."""

    def leaf(t):
        new = t.detach().clone()
        return (new.double() if dtype == formula.F64 else new).requires_grad_(t.requires_grad)

    values = {f.name: getattr(parts, f.name) for f in fields(Parts)}
    copy = {k: leaf(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    w = torch.nn.Parameter(leaf(parts.weight.plain()), requires_grad=False)
    return Parts(**{**copy, "weight": PlainWeight(w)})


def written_out(x, parts):
    g = 1 if parts.norm_O is None else parts.magnitude_O / parts.norm_O
    y = x @ parts.weight.dense(x.dtype).T
    if parts.a_RI is not None:
        y = y + parts.scale * (x @ parts.a_RI.to(x.dtype).T) @ parts.b_OR.to(x.dtype).T
    y = (g * y).to(x.dtype)
    return y if parts.bias_O is None else y + parts.bias_O


def mlp_by_formula(x, gate, up, down, activation):
    return written_out(kernel.activate(written_out(x, gate), activation) * written_out(x, up), down)


def mlp_results(mlp, x, layers, activation, dy):
    x = x.detach().clone().requires_grad_()
    y = mlp(x, *layers, activation)
    y.backward(dy)
    leaves = [t for part in layers for t in (part.a_RI, part.b_OR, part.magnitude_O) if t is not None]
    return [y.detach(), x.grad, *(t.grad for t in leaves)]


def stacked(x, gate, up, down, activation):
    ranks = [0 if part.a_RI is None else part.a_RI.shape[0] for part in (gate, up, down)]
    w1, w2, w3 = (part.weight.plain() for part in (gate, up, down))
    stacks = Stacks(StackedWeight([w1, w2], ranks[0] + ranks[1]), StackedWeight([w3], ranks[2]))
    assert stacks.inner.holds([gate.weight, up.weight], ranks[0] + ranks[1])
    assert stacks.outer.holds([down.weight], ranks[2])
    return gated_mlp(x, gate, up, down, activation, stacks)


@pytest.mark.parametrize("mlp", [gated_mlp, stacked])
@pytest.mark.parametrize("down", KINDS[:3])
@pytest.mark.parametrize("stack", [*product(KINDS[:3], repeat=2)], ids=" ".join)
def test_the_whole_mlp(stack, down, mlp):
    if mlp is stacked and not runs_triton(normal(1)):
        pytest.skip("weights are stacked where Triton runs")
    for dtype, rank in ((torch.float32, 4), (torch.bfloat16, 3), (torch.float32, 130)):
        sizes = (24, 16), (24, 16), (16, 24)
        layers = [layer(kind, *size, rank, dtype, rank == 3) for kind, size in zip((*stack, down), sizes, strict=True)]
        x, dy = normal(2, 7, 16, dtype=dtype), normal(2, 7, 16, dtype=dtype)
        found = mlp_results(mlp, x, [copied(part) for part in layers], "silu", dy)
        plain = mlp_results(mlp_by_formula, x, [copied(part) for part in layers], "silu", dy)
        wide_layers = [copied(part, formula.F64) for part in layers]
        exact = mlp_results(mlp_by_formula, x.double(), wide_layers, "silu", dy.double())
        for value, reference, expected in zip(found, plain, exact, strict=True):
            assert formula.within_budget(value, reference, expected, dtype)


@pytest.mark.parametrize("mlp", [gated_mlp, stacked])
@pytest.mark.parametrize("hooks", [None, (torch.clone, torch.clone)], ids=["", "saved tensors moved apart"])
def test_gradients_take_the_place_of_what_was_saved(hooks, mlp):
    if not runs_triton(normal(1)):
        pytest.skip("weights are stacked where Triton runs")
    layers = [layer("dora", *size, 4, torch.float32, False) for size in ((24, 16), (24, 16), (16, 24))]
    x, dy = normal(5, 16), normal(5, 16)
    plain = mlp_results(mlp_by_formula, x, [copied(part) for part in layers], "silu", dy)
    if hooks is None:  # whoever keeps saved tensors elsewhere may go backward again
        y = mlp(x.clone().requires_grad_(), *map(copied, layers), "silu")
        y.backward(dy, retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(dy)
        return
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        found = mlp_results(mlp, x, [copied(part) for part in layers], "silu", dy)
    for value, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
