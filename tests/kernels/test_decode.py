"""The decode kernel against float64: for real on a GPU, or under Triton's interpreter (TRITON_INTERPRET=1)."""

import pytest
import torch

import formula
from registered import opcheck
from theodora.kernels import decode
from theodora.kernels.operators import runs_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernel = pytest.mark.skipif(not runs_triton(torch.empty(0, device=DEVICE)), reason="needs Triton")

# T, O, I, R: one token, few, and as many as fit; features and rows that fill no tile; ranks 1 to 256
SHAPES = [
    *((1, 33, 65, 1), (1, 100, 700, 17), (1, 8, 1200, 256)),
    *((2, 7, 5, 3), (3, 130, 300, 5), (32, 64, 512, 16), (64, 70, 96, 40)),
]


def inputs(tokens, outputs, features, rank, dtype, scaled=True, biased=True):
    w = torch.randn(outputs, features)
    w[0] = 0
    values = (torch.randn(tokens, features), w, torch.randn(rank, features) / features**0.5, torch.randn(outputs, rank))
    x, w, a, b = (value.to(DEVICE, dtype) for value in values)
    g = torch.rand(outputs, device=DEVICE) + 0.5 if scaled else None
    return x, w, a, 0.1 * b, g, torch.randn(outputs).to(DEVICE, dtype) if biased else None


def exact(x, w, a, b, g, bias):
    x, w, a, b, g, bias = (None if t is None else t.double() for t in (x, w, a, b, g, bias))
    y = formula.lora(x, w, None, a, b, 1.0) * (1 if g is None else g)
    return y if bias is None else y + bias


@pytest.fixture(params=["one launch", "xa apart"])
def counters(request, monkeypatch):
    """The kernel with its counters, and without, as where a CUDA graph is captured before they were made."""
    if not runs_triton(torch.empty(0, device=DEVICE)):
        return None
    from theodora.kernels.triton import decode as kernel

    monkeypatch.setattr(kernel, "_pools", {})
    if request.param == "one launch":
        decode.prepare(torch.empty(0, device=DEVICE).device)
    return kernel._pools


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(shape, dtype, counters):
    for scaled, biased in ((True, True), (False, False)):
        given = inputs(*shape, dtype, scaled, biased)
        found, plain = decode.decode_linear(*given), decode.decode_linear_reference(*given)
        assert found.dtype == dtype
        # In float32 the order of the sum is all the error there is.
        rounding = torch.finfo(dtype).eps * (2 if dtype == torch.float32 else 1 / 8)
        allowed = 2 * formula.error(plain, exact(*given)) + rounding
        assert formula.error(found, exact(*given)) <= allowed
        assert torch.equal(decode.decode_linear(*given), found)  # sums have one order, and counters are zero again
    for pool in (counters or {}).values():
        assert not pool.counters.any()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "plan"),
    [
        ((1, 40, 1000, 8), (4, 1, 64, 1)),
        ((1, 40, 1000, 8), (16, 1, 64, 3)),
        ((20, 70, 1000, 33), (64, 32, 32, 4)),
        ((20, 70, 90, 33), (64, 32, 32, 8)),  # more splits than tiles
    ],
)
def test_however_it_is_cut(shape, plan, dtype):
    from theodora.kernels.triton import decode as kernel

    given = inputs(*shape, dtype)
    kernel.prepare(given[0].device)
    plain = formula.error(decode.decode_linear_reference(*given), exact(*given))
    assert formula.error(kernel.decode(*given, kernel.Plan(*plan)), exact(*given)) <= 2 * plain


@pytest.mark.parametrize("tokens", [1, 5])
def test_inputs_that_are_not_contiguous(tokens, counters):
    x, w, a, b, g, bias = inputs(tokens, 48, 96, 8, torch.float16)
    expected = decode.decode_linear(x, w, a, b, g, bias)
    apart = torch.stack([x, x], 1)[:, 0], w.T.contiguous().T, a.T.contiguous().T, b.T.contiguous().T, g, bias
    assert formula.error(decode.decode_linear(*apart), expected.double()) < 1e-3


def test_a_full_pool_is_no_end(counters, monkeypatch):
    for pool in (counters or {}).values():
        pool.used = len(pool.counters)
    given = inputs(1, 16, 64, 4, torch.float16)
    assert formula.error(decode.decode_linear(*given), exact(*given)) < 1e-3


def test_no_tokens_and_too_many():
    for tokens in (0, decode.MOST_TOKENS + 1):
        given = inputs(tokens, 16, 24, 4, torch.float16)
        torch.testing.assert_close(decode.decode_linear(*given), decode.decode_linear_reference(*given))
        assert not decode.fits(given[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_it_is_an_operator():
    given = inputs(2, 16, 24, 4, torch.float16)
    opcheck(torch.ops.theodora.decode_linear.default, given)
    compiled = torch.compile(decode.decode_linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*given), decode.decode_linear(*given))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 32])
def test_in_a_cuda_graph(tokens, counters):
    given = inputs(tokens, 1024, 4096, 16, torch.bfloat16)
    expected = decode.decode_linear(*given)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        decode.decode_linear(*given)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            ys = [decode.decode_linear(*given) for _ in range(5)]
    for _ in range(20):
        graph.replay()
        assert all(torch.equal(y, ys[0]) for y in ys)
        assert formula.error(ys[0], expected.double()) < 5e-3
