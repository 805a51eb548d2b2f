"""The fused loss against float64: the kernels on a GPU or under Triton's interpreter, the plain reference elsewhere."""

import pytest
import torch

import formula
from registered import opcheck
from theodora.kernels import cross_entropy
from theodora.kernels.cross_entropy import (
    IGNORED,
    block_rows,
    linear_cross_entropy,
    linear_cross_entropy_of_tokens,
    linear_cross_entropy_reference,
)
from theodora.kernels.operators import interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# T, H, V. The widest rows take two rounds of the kernel's loop.
SHAPES = [(1, 4, 3), (5, 8, 33), (37, 16, 272), (3, 16, 5001)]


def budget(dtype):
    """What the kernel's error may be of the reference's; Triton's interpreter cuts bfloat16 off where a GPU rounds."""
    return 5 if dtype == torch.bfloat16 and interpreted() and DEVICE == "cpu" else 2


def problem(shape, dtype, bias=False, learned=0.7):
    tokens, width, vocabulary = shape
    hidden = torch.randn(tokens, width, device=DEVICE).to(dtype)
    weight = torch.randn(vocabulary, width, device=DEVICE).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,), device=DEVICE)
    labels[torch.rand(tokens, device=DEVICE) > learned] = -100
    return hidden, weight, labels, {"bias_V": torch.randn(vocabulary, device=DEVICE).to(dtype) if bias else None}


def run(loss, hidden, weight, labels, options, factor=1.0):
    hidden = hidden.detach().clone().requires_grad_()
    sums = loss(hidden, weight, labels, **options)
    (sums.nats * factor).backward()
    return sums, hidden.grad


def widened(hidden, weight, labels, options):
    wide = {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    return hidden.double(), weight.double(), labels, wide


def within(found, plain, exact, dtype, slack):
    """Whether the error is at most the budget's multiple of the reference's, but for rounding and `slack`."""
    found_error, plain_error = ((t.double() - exact).norm() for t in (found.detach(), plain.detach()))
    rounding = max(torch.finfo(dtype).eps, 1e-6) * exact.norm()
    return found_error <= budget(dtype) * plain_error + rounding + slack


@pytest.mark.parametrize(
    "options", [{}, {"scale": 0.25}, {"softcap": 3.0}, {"scale": 2.0, "softcap": 5.0}], ids=["", "scale", "cap", "both"]
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(shape, dtype, bias, options):
    hidden, weight, labels, extra = problem(shape, dtype, bias)
    labels[0] = shape[2] - 1
    given = hidden, weight, labels, {**options, **extra, "with_stats": True}
    (expected, dh), (plain, plain_dh) = (
        run(linear_cross_entropy_reference, *inputs, 0.3) for inputs in (widened(*given), given)
    )
    found, found_dh = run(linear_cross_entropy, *given, 0.3)
    assert (found_dh.dtype, found.nats.dtype) == (dtype, torch.float32)
    # Of a sure prediction little is left when probabilities near 1 are subtracted: there it is their own error that
    # counts, some 1e-7 a token.
    each = 4e-7 * labels.numel()
    for name in ("nats", "entropy"):
        value, exact = getattr(found, name), getattr(expected, name)
        assert within(value, getattr(plain, name), exact, dtype, each), name
    assert within(found_dh, plain_dh, dh, dtype, 0.3 * each * weight.double().norm(dim=1).max())
    assert found.count == expected.count == (labels != -100).sum()
    assert not found_dh[labels == -100].any()
    if dtype == torch.float32:
        assert found.correct == expected.correct


@pytest.mark.parametrize("bytes_at_once", [1, 2**14])
def test_many_blocks_give_what_one_gives(bytes_at_once, monkeypatch):
    given = problem((140, 8, 40), torch.float32)
    given[3]["with_stats"] = True
    whole, dh = run(linear_cross_entropy, *given)
    monkeypatch.setattr(cross_entropy, "_MOST_BYTES", bytes_at_once)
    assert block_rows(140, 40, 4) < 140
    parts, dh_parts = run(linear_cross_entropy, *given)
    torch.testing.assert_close(vars(parts), vars(whole))
    torch.testing.assert_close(dh_parts, dh)


def test_blocks_are_bounded_and_even():
    for tokens in (1, 127, 128, 8192, 10_000):
        for vocabulary in (3, 50257, 128256, 262144):
            rows = block_rows(tokens, vocabulary, 2)
            blocks = -(-tokens // rows)
            assert rows == tokens or (rows % 128 == 0 and tokens > rows * (blocks - 1))
            assert rows <= 128 or rows * vocabulary * 2 <= 2**28
    assert block_rows(8192, 128256, 2) == 1024


def test_nothing_learned_is_a_loss_of_zero():
    hidden, weight, labels, options = problem((9, 8, 40), torch.bfloat16, learned=-1)
    sums, dh = run(linear_cross_entropy, hidden, weight, labels, {**options, "with_stats": True})
    assert [float(value.detach()) for value in vars(sums).values()] == [0, 0, 0, 0]
    assert not dh.any()


def test_no_tokens():
    hidden, weight, labels, options = problem((9, 8, 40), torch.float32)
    sums, dh = run(linear_cross_entropy, hidden[:0], weight, labels[:0], options)
    assert (sums.nats, dh.shape) == (0, (0, 8))


@pytest.mark.parametrize("label", [40, 41, -1])
def test_a_label_outside_the_vocabulary_makes_the_loss_nan(label):
    for loss in (linear_cross_entropy, linear_cross_entropy_reference):
        hidden, weight, labels, options = problem((9, 8, 40), torch.float32)
        labels[3] = label
        assert bool(loss(hidden, weight, labels, **options).nats.isnan())


def test_impossible_and_huge_logits():
    hidden, weight, labels, _ = problem((9, 8, 40), torch.float32, learned=2)
    labels[labels < 2] = 2
    bias = torch.zeros(40, device=DEVICE)
    bias[:2], bias[5] = float("-inf"), 1e4
    options = {"bias_V": bias, "with_stats": True}
    (found, dh), (plain, plain_dh) = (
        run(loss, hidden, weight, labels, options) for loss in (linear_cross_entropy, linear_cross_entropy_reference)
    )
    assert bool(torch.isfinite(dh).all())
    torch.testing.assert_close(vars(found), vars(plain), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dh, plain_dh)


def test_equal_logits_count_as_correct_for_the_first():
    hidden, weight = torch.ones(3, 4, device=DEVICE), torch.ones(6, 4, device=DEVICE)
    labels = torch.tensor([0, 1, 5], device=DEVICE)
    for loss in (linear_cross_entropy, linear_cross_entropy_reference):
        assert loss(hidden, weight, labels, with_stats=True).correct == 1


def test_without_gradient_none_is_computed(monkeypatch):
    given = problem((9, 8, 40), torch.float32)
    with_gradient, _ = run(linear_cross_entropy, *given)
    hidden, weight, labels, options = given
    made = []
    operator = cross_entropy._operator
    monkeypatch.setattr(cross_entropy, "_operator", lambda *a: made.append(operator(*a)) or made[-1])
    with torch.no_grad():
        sums = linear_cross_entropy(hidden.requires_grad_(), weight, labels, **options)
    linear_cross_entropy(hidden.detach(), weight, labels, **options)
    assert [dh.numel() for _, dh in made] == [0, 0]
    torch.testing.assert_close(sums.nats, with_gradient.nats.detach())


def test_rows_that_lie_apart_and_a_wider_weight():
    hidden, weight, labels, options = problem((9, 8, 40), torch.bfloat16)
    apart = hidden.T.contiguous().T
    found, dh = run(linear_cross_entropy, apart, weight.float(), labels, options)
    plain, plain_dh = run(linear_cross_entropy, hidden, weight, labels, options)
    assert torch.equal(found.nats, plain.nats)
    assert torch.equal(dh, plain_dh)


def test_autocast_is_that_of_the_head():
    hidden, weight, labels, options = problem((9, 8, 40), torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found, dh = run(linear_cross_entropy, hidden, weight, labels, options)
    plain, plain_dh = run(linear_cross_entropy, hidden.bfloat16(), weight.bfloat16(), labels, options)
    assert torch.equal(found.nats, plain.nats)
    assert dh.dtype == torch.float32
    assert torch.equal(dh, plain_dh.float())


def test_the_incoming_scalar_is_not_rounded():
    """Also to bfloat16, where a multiplication by a tensor would round 1/3 by 0.1 %."""
    given = problem((64, 16, 40), torch.bfloat16)
    _, dh = run(linear_cross_entropy, *given)
    _, third = run(linear_cross_entropy, *given, torch.tensor(1 / 3, device=DEVICE))
    assert torch.equal(third, (dh.float() / 3).bfloat16()) or interpreted()
    assert formula.error(third, dh.double() / 3) < budget(torch.bfloat16) * 2e-3


def test_the_operators_keep_their_word():
    hidden, weight, labels, _ = problem((9, 8, 40), torch.float32)
    for with_gradient in (False, True):
        args = hidden, weight, labels, None, 1.0, None, -100, True, with_gradient
        opcheck(torch.ops.theodora.linear_cross_entropy, args)
    opcheck(torch.ops.theodora.scaled, (hidden, torch.tensor(0.5, device=DEVICE)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.13 does it itself
def test_it_compiles_without_a_break():
    given = problem((9, 8, 40), torch.float32)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    (found, dh), (plain, plain_dh) = run(compiled, *given), run(linear_cross_entropy, *given)
    assert torch.equal(found.nats, plain.nats)
    assert torch.equal(dh, plain_dh)


@pytest.mark.skipif(DEVICE == "cpu", reason="CPUs do not run ahead")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # torch: a prototype
def test_nothing_waits_for_the_gpu():
    given = problem((300, 16, 272), torch.bfloat16)
    given[3]["with_stats"] = True
    run(linear_cross_entropy, *given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(linear_cross_entropy, *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU products would be refused as not deterministic")
def test_memory_that_holds_nan_reaches_no_gradient():
    """As some CPUs' bfloat16 products read it: 272 logits lie in rows of 320."""
    given = *problem((37, 16, 272), torch.bfloat16)[:3], {}
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        sums, dh = run(linear_cross_entropy, *given)
    finally:
        torch.use_deterministic_algorithms(False)
    assert dh.isfinite().all()
    assert sums.nats.isfinite()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_losses_of_tokens_add_up_and_are_weighed_one_by_one(softcap):
    """Each token's loss is its own, and so is its gradient, whatever weight comes in for it."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 16, generator=draw, dtype=torch.float64)
    weight = torch.randn(50, 16, generator=draw, dtype=torch.float64)
    labels = torch.randint(50, (300,), generator=draw)
    labels[::7] = IGNORED
    weights = torch.rand(300, generator=draw, dtype=torch.float64)
    hidden.requires_grad_()
    each = linear_cross_entropy_of_tokens(hidden, weight, labels, softcap=softcap, with_stats=True)
    whole = linear_cross_entropy(hidden, weight, labels, softcap=softcap, with_stats=True)
    for one, total in ((each.nats, whole.nats), (each.entropy, whole.entropy), (each.correct, whole.correct)):
        torch.testing.assert_close(one.sum(), total)
    assert torch.equal(each.learned.bool(), labels != IGNORED)
    (found,) = torch.autograd.grad((each.nats * weights).sum(), hidden)
    z = hidden @ weight.T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    nats = torch.nn.functional.cross_entropy(z, labels, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(each.nats, nats)
    (expected,) = torch.autograd.grad((nats * weights).sum(), hidden)
    torch.testing.assert_close(found, expected)
