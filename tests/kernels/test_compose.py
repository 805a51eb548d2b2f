"""Update and row scale on z against float64: the kernels on a GPU or under Triton's interpreter, else the reference."""

import pytest
import torch

import formula
from formula import DEVICE
from registered import opcheck
from theodora.kernels import compose as kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (7, 33, 3), (33, 130, 16), (70, 65, 40), (5, 48, 100), (3, 24, 128)]
LOW, SCALED, BIASED = "low", "scaled", "biased"
KINDS = [{LOW}, {LOW, BIASED}, {LOW, SCALED}, {LOW, SCALED, BIASED}, {SCALED}, {SCALED, BIASED}]
KIND_IDS = [" ".join(sorted(kind)) for kind in KINDS]


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def inputs(shape, kind, dtype, far=False):
    """z, xa, B, scale, magnitude, norm, bias, and dy; xa and z are columns of wider tensors, the first norm is 0."""
    tokens, outputs, rank = shape
    z, xa = normal(tokens, outputs + 5, dtype=dtype)[:, 2:-3], normal(tokens, rank + 3, dtype=dtype)[:, 1 : rank + 1]
    norm = torch.rand(outputs, device=DEVICE) + 0.5
    magnitude = norm * torch.exp((1 if far else 0.01) * normal(outputs))
    norm[0] = 0
    low, scaled = LOW in kind, SCALED in kind
    return (
        z,
        xa if low else None,
        0.3 * normal(outputs, rank) if low else None,
        0.7,
        magnitude if scaled else None,
        norm if scaled else None,
        normal(outputs, dtype=dtype) if BIASED in kind else None,
    ), normal(tokens, outputs, dtype=dtype)


def wide(values):
    return [v.double() if isinstance(v, torch.Tensor) else v for v in values]


def check(found, plain, exact, dtype):
    for value, reference, expected in zip(found, plain, exact, strict=True):
        assert formula.within_budget(value, reference, expected, dtype)


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(shape, dtype, kind):
    given, dy = inputs(shape, kind, dtype, far=shape[0] % 2 == 0)
    y = kernel.compose(*given)
    exact = kernel.compose_reference(*wide(given))
    check([y], [kernel.compose_reference(*given)], [exact], dtype)
    given = given[:-1]
    exact = kernel.compose_backward_reference(dy.double(), *wide(given))
    check(kernel.compose_backward(dy, *given), kernel.compose_backward_reference(dy, *given), exact, dtype)
    if SCALED in kind:
        assert exact[3][0] == kernel.compose_backward(dy, *given)[3][0] == 0  # a row without a norm has no say


def test_rows_of_a_gradient_that_lie_apart():
    given, dy = inputs((9, 40, 5), {LOW, SCALED}, torch.float32)
    for apart in (dy.T.contiguous().T, dy[:1].expand(9, -1), dy[:, :1].expand(-1, 40)):
        whole = apart.contiguous()
        for found, expected in zip(
            kernel.compose_backward(apart, *given[:-1]), kernel.compose_backward(whole, *given[:-1]), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_b_may_lie_in_any_order():
    given, dy = inputs((9, 40, 5), {LOW, SCALED, BIASED}, torch.float32)
    turned = (*given[:2], given[2].T.contiguous().T, *given[3:])
    torch.testing.assert_close(kernel.compose(*turned), kernel.compose(*given), rtol=1e-5, atol=1e-6)
    for found, expected in zip(
        kernel.compose_backward(dy, *turned[:-1]), kernel.compose_backward(dy, *given[:-1]), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_in_place(biased, dtype):
    (z, xa, b, scale, _, _, bias), _ = inputs((37, 70, 6), {LOW, BIASED} if biased else {LOW}, dtype)
    room = torch.full((37, 80), 7.0, device=DEVICE, dtype=dtype)
    y = room[:, 3:73].copy_(z)
    kernel.compose_in_place(y, xa, b, scale, bias, [])
    exact = kernel.compose_reference(*wide((z, xa, b, scale, None, None, bias)))
    check([y], [kernel.compose_reference(z, xa, b, scale, None, None, bias)], [exact], dtype)
    assert bool((room[:, :3] == 7).all())
    assert bool((room[:, 73:] == 7).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_sums(count, dtype):
    (z, xa, b, scale, _, _, _), _ = inputs((37, 70, 6), {LOW}, dtype)
    others = [torch.randn(70, 37, device=DEVICE).to(dtype).T for _ in range(count)]
    one_by_one = kernel.compose_reference(sum(others, z), xa, b, scale, None, None, None)
    exact = kernel.compose_reference(sum(wide(others), z.double()), *wide((xa, b, scale)), None, None, None)
    y = z.clone()
    kernel.compose_in_place(y, xa, b, scale, None, others)
    check([y], [one_by_one], [exact], dtype)


@pytest.mark.parametrize("parts", [{LOW, SCALED}, {SCALED, BIASED}, {LOW}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onto_the_residual(dtype, parts):
    given, residual = inputs((37, 70, 6), parts, dtype)
    found = kernel.compose_onto(*given, residual)
    exact = residual.double() + kernel.compose_reference(*wide(given))
    check([found], [residual + kernel.compose_reference(*given)], [exact], dtype)


@pytest.mark.parametrize("over_z", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 17, 128])
def test_gradients_are_written_where_they_are_wanted_and_nowhere_else(rank, dtype, over_z):
    given, dy = inputs((37, 70, rank), {LOW, SCALED}, dtype)
    z, rest = given[0], given[1:6]
    room = torch.full((37, 90), float("nan"), device=DEVICE, dtype=dtype)
    dz = room[:, 4:74]
    if over_z:
        z = dz.copy_(z)
    plain = kernel.compose_backward_reference(dy, given[0], *rest)
    exact = kernel.compose_backward_reference(*wide((dy, given[0], *rest)))
    found = kernel.compose_backward_into(dy, z, *rest, dz)
    check([dz, *found], [plain[0], *plain[2:]], [exact[0], *exact[2:]], dtype)
    assert int(room.isnan().sum()) == 37 * 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [3, 16, 128])
def test_a_magnitudes_gradient_from_the_output(rank, dtype):
    given, dy = inputs((42, 96, rank), {LOW, SCALED}, dtype)
    z, xa, b, scale, magnitude, norm, _ = given
    magnitude[1], small = 0, slice(2, 50)
    magnitude[small] *= 10.0 ** -(torch.arange(48, device=DEVICE) % 10)
    exact = kernel.compose_backward_reference(*wide((dy, z, xa, b, scale, magnitude, norm)))
    exact[3][1] = 0  # for `zero_scale_gradient`
    rest = xa, b, scale, magnitude, norm
    y = kernel.compose_reference(*wide(given))
    again = kernel.compose_backward_from_output_reference(dy.double(), y, *wide(rest))
    for value, expected in zip(again, exact, strict=True):
        torch.testing.assert_close(value, expected)
    # The output as it would be kept, rounded: what is kept of z is rounded, too.
    y, dz = y.to(dtype), torch.empty_like(dy)
    db, dm = kernel.compose_backward_from_output(dy, y, *rest, dz)
    plain = kernel.compose_backward_reference(dy, z, xa, b, scale, magnitude, norm)
    plain[3][1] = 0
    check([dz, db, dm], [plain[0], *plain[2:]], [exact[0], *exact[2:]], dtype)
    check([dm[small]], [plain[3][small]], [exact[3][small]], dtype)  # small magnitudes learn as exactly as large ones


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_magnitude_of_zero_has_its_gradient_from_x(dtype, normed):
    (_, xa, b, scale, magnitude, norm, _), dy = inputs((37, 20, 5), {LOW, SCALED}, dtype)
    h, w = normal(37, 300, dtype=dtype), normal(20, 300, dtype=dtype)
    rstd, weight = (normal(37).abs(), normal(300, dtype=dtype)) if normed else (None, None)
    magnitude[3:6] = torch.tensor([0.0, 1e-30, -1e-30])
    norm[4] = 0
    x = h.double() if rstd is None else h.double() * rstd.double()[:, None] * weight.double()
    z = x @ w.double().T
    exact = kernel.compose_backward_reference(dy.double(), z, *wide((xa, b, scale, magnitude, norm)))[3]
    plain = kernel.compose_backward_reference(dy, z.to(dtype), xa, b, scale, magnitude, norm)[3]
    dm = torch.full((20,), 7.0, device=DEVICE)
    kernel.zero_scale_gradient(dm, dy, h, rstd, weight, w, xa, b, scale, magnitude, norm)
    rows = [3, 5]  # row 4 has no norm: its magnitude has no say
    check([dm[rows]], [plain[rows]], [exact[rows]], dtype)
    assert bool((dm[[0, 1, 2, 4, *range(6, 20)]] == 7).all())


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_the_operators_keep_their_word(kind):
    operators = torch.ops.theodora
    given, dy = inputs((5, 20, 3), kind, torch.float32)
    opcheck(operators.compose, given)
    opcheck(operators.compose_backward, (dy, *given[:-1]))
    z, xa, b, scale, magnitude, norm, bias = given
    if xa is not None and norm is None:
        opcheck(operators.compose_, (z, xa, b, scale, bias, [dy]))
    opcheck(operators.compose_onto, (z, xa, b, scale, magnitude, norm, bias, dy))
    if xa is not None and norm is not None:
        dz = torch.empty_like(dy)
        opcheck(operators.compose_backward_into, (dy, z, xa, b, scale, magnitude, norm, dz))
        rest = xa, b, scale, magnitude, norm
        opcheck(operators.compose_backward_from_output, (dy, z, *rest, dz))
        x, w, dm = normal(5, 8), normal(20, 8), torch.ones(20, device=DEVICE)
        opcheck(operators.zero_scale_gradient, (dm, dy, x, None, None, w, *rest))
