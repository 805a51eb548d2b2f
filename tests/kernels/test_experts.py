"""A mixture's experts as one step, against the formula in float64: on a GPU, or under Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

from formula import DEVICE
from theodora.functional import dora_experts, dora_norm, lora_experts
from theodora.kernels import experts as kernel
from theodora.kernels.experts_weight import ExpertsWeight
from theodora.kernels.operators import interpreted
from theodora.kernels.parts import Gate, Parts
from theodora.layers.gates import apply

experts = pytest.importorskip("theodora.kernels.triton.experts")
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="there is no Triton for a CPU's tensors"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
E = 4
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # torch's grouped product takes no other there
LIMIT = 100.0 if DEVICE == "cuda" else 0.8  # one number that is cut off for its rounding is 3 % of a gradient here
SILU, GPT_OSS = Gate("silu"), Gate("silu", in_turns=True, alpha=1.7, limit=LIMIT, limited=True, offset=1.0)
# Name -> the experts of each token. Expert 2 has no row anywhere but in "even"; 4 and 9 are no experts.
ROUTES = {
    "even": [[0, 1], [2, 3], [1, 0], [3, 2]],
    "uneven": [[0, 1], [0, 3], [0, 1], [3, 0], [1, 0], [0, 3], [1, 0]] * 11,
    "all one's": [[1]] * 70,
    "one each": [[3], [0], [0]],
    "no expert": [[4, 1], [4, 9], [0, 4], [1, 3]],
    "nobody's": [[4], [4]],
}
KINDS = {
    "lora": ("lora", "lora"),
    "dora": ("dora", "dora"),
    "up": ("dora", None),
    "down": (None, "dora"),
    "none": ("none",) * 2,
}


def given(
    routes, kinds, gate, rank=8, dtype=DTYPE, adapter_dtype=torch.float32, transposed=False, biased=False, hidden=40
):
    features = 24
    index = torch.tensor(ROUTES[routes], device=DEVICE)

    def normal(*shape, of=torch.float64):
        return torch.randn(*shape, device=DEVICE, dtype=torch.float64).to(of)

    sides = []
    for kind, outputs, inputs in zip(kinds, (2 * features, hidden), (hidden, features), strict=True):
        w = normal(E, outputs, inputs, of=dtype) / inputs**0.5
        weight = ExpertsWeight(w.mT.contiguous() if transposed else w, transposed)
        bias = normal(E, outputs, of=dtype) if biased else None
        if kind is None:
            sides.append(Parts(weight, bias))
            continue
        a = (normal(E, rank, inputs) / inputs**0.5).to(adapter_dtype).requires_grad_()
        b = (normal(E, outputs, rank) * 0.2).to(adapter_dtype).requires_grad_()
        m = norm = None
        if kind == "dora":
            norm = dora_norm(w.double(), a.double(), b.double(), 0.7).float()
            norm[1, 3] = 0  # as of a row of zeros
            m = (norm * torch.exp(0.3 * normal(E, outputs))).to(adapter_dtype)
            m[0, 5] = 0
            m.requires_grad_()
        sides.append(Parts(weight, bias, a, b, 0.7, m, norm))
    x = normal(len(index), hidden, of=dtype).requires_grad_()
    weights = torch.rand(index.shape, device=DEVICE).to(dtype)
    weights[0, 0] = 0  # and is learnt all the same
    return x, index, weights.requires_grad_(), *sides, gate


def between(gate):
    """The gate in plain torch."""
    if not isinstance(gate, Gate):
        return gate
    return lambda y: apply(gate, y)


def tensors(x, index, weights, up, down, gate):
    return [x, weights, *(t for side in (up, down) for t in (side.a_RI, side.b_OR, side.magnitude_O) if t is not None)]


def exact(x, index, weights, up, down, gate):
    """Output and gradients in float64."""
    wide = {id(t): t.detach().double().requires_grad_() for t in tensors(x, index, weights, up, down, gate)}

    def product(rows, counts, side):
        w = side.weight.dense().double()
        bias = None if side.bias_O is None else side.bias_O.double()
        if side.a_RI is None:
            each = [r @ one.T for r, one in zip(rows.split(counts), w, strict=True)]
            each = [y if bias is None else y + bias[e] for e, y in enumerate(each)]
            return torch.cat(each)
        a, b = wide[id(side.a_RI)], wide[id(side.b_OR)]
        if side.norm_O is None:
            return lora_experts(rows, counts, w, bias, a, b, side.scale)
        m = wide[id(side.magnitude_O)]
        return dora_experts(rows, counts, w, bias, a, b, side.scale, m, side.norm_O.double())

    expert, order = index.flatten().sort(stable=True)
    known = int((expert < E).sum())
    counts = torch.bincount(expert[:known], minlength=E).tolist()
    order = order[:known]
    token = order // index.shape[1]
    y = product(wide[id(x)][token], counts, up)
    y = product(between(gate)(y), counts, down) * wide[id(weights)].flatten()[order, None]
    out = torch.zeros(x.shape, dtype=torch.float64, device=DEVICE).index_add(0, token, y)
    return out, torch.autograd.grad(out.sin().sum(), wide.values())


def check(args, tolerance=2e-5):
    tolerance = 0.02 if DEVICE == "cuda" else tolerance
    x, index, _, up, down, gate = args
    assert kernel.fits(x, index, up, down, gate)
    out = kernel.adapted_experts(*args)
    formula, slopes = exact(*args)
    found = torch.autograd.grad(out, tensors(*args), formula.cos().to(out.dtype))
    assert out.dtype == x.dtype
    for one, other in zip([out, *found], [formula, *slopes], strict=True):
        assert one.isfinite().all()
        assert (one.double() - other).norm() <= tolerance * other.norm() + 1e-12
    for one, t in zip(found, tensors(*args), strict=True):
        assert one.dtype == t.dtype
        if t.dim() == 3 and not (index == 2).any():
            assert not one[2].any()
    return out, found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", [SILU, GPT_OSS], ids=["silu", "gpt_oss"])
def test_agrees_with_float64(kind, gate):
    check(given("uneven", KINDS[kind], gate, biased=gate is GPT_OSS))


@pytest.mark.parametrize("gate", [GPT_OSS, lambda y: halves(y)], ids=["gate", "any function"])
def test_narrow_experts_keep_no_output(gate):
    args = given("uneven", KINDS["dora"], gate, biased=True, hidden=56)
    check(args)
    out = kernel.adapted_experts(*args)
    assert (args[1].numel(), 56) not in [t.shape for t in out.grad_fn.saved_tensors]


@pytest.mark.parametrize("routes", ROUTES)
def test_any_way_that_tokens_go(routes):
    check(given(routes, KINDS["dora"], SILU, biased=True))


def test_rows_that_fill_several_chunks(monkeypatch):
    monkeypatch.setattr(experts, "CHUNK", 32)
    args = given("all one's", KINDS["dora"], SILU)
    out, found = check(args)
    again = kernel.adapted_experts(*args)
    assert torch.equal(out, again)
    same = torch.autograd.grad(again, tensors(*args), exact(*args)[0].cos().to(out.dtype))
    assert all(torch.equal(one, other) for one, other in zip(found, same, strict=True))


@pytest.mark.parametrize("rank", [5, 16, 32])
@pytest.mark.parametrize("gate", [SILU, GPT_OSS], ids=["silu", "gpt_oss"])
def test_half_precision(rank, gate):
    wide = {"adapter_dtype": torch.bfloat16} if rank == 5 else {}
    gate = replace(gate, limit=4.0)
    args = given("even", KINDS["dora"], gate, rank, torch.bfloat16, transposed=gate.limited, **wide)
    check(args, 0.08)  # Triton's interpreter cuts off where a GPU rounds


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu"])
def test_other_activations(activation):
    check(given("even", KINDS["lora"], Gate(activation)))


def squared_relu(y):
    return y.relu().square()


def halves(y):
    one, other = y.chunk(2, dim=1)
    return one.tanh() * other


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_of_which_nothing_is_known(kind):
    check(given("no expert", KINDS[kind], halves, biased=kind == "dora"))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_without_a_gate(kind):
    x, index, weights, up, down, _ = given("no expert", KINDS[kind], squared_relu)
    cut = {"a_RI": up.a_RI}
    for name in ("b_OR", "magnitude_O", "norm_O"):
        t = getattr(up, name)
        cut[name] = t if t is None else t.detach()[:, :24].clone().requires_grad_(name != "norm_O")
    weight = ExpertsWeight(up.weight.tensor[:, :24].contiguous())
    check((x, index, weights, Parts(weight, None, scale=up.scale, **cut), down, squared_relu))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own
def test_as_operators(monkeypatch):
    """Shapes and dtypes without numbers, and torch.compile with them."""
    args = given("uneven", KINDS["dora"], SILU, biased=True)
    calls = []
    for name in ("_forward_op", "_backward_op"):
        run = getattr(kernel, name)
        with monkeypatch.context() as patch:
            patch.setattr(kernel, name, lambda *given, run=run: calls.append((run, given)) or run(*given))
            out = kernel.adapted_experts(*args)
            found = torch.autograd.grad(out.sum(), tensors(*args))
    for run, given_to in calls:
        plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in given_to]
        torch.library.opcheck(run, tuple(plain), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda *given: kernel.adapted_experts(*given, *args[3:]), backend="aot_eager")
    again = compiled(*args[:3])
    assert torch.equal(out, again)
    for one, other in zip(found, torch.autograd.grad(again.sum(), tensors(*args)), strict=True):
        assert torch.equal(one, other)
