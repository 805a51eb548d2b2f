"""The kernels compile for a GPU that is not there, at every padded rank, and fit its shared memory.

Triton's compiler needs no GPU. What it is given here is what a launch would give it; the launch itself is replaced.
"""

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel
from triton.runtime.jit import JITFunction

from theodora.kernels.operators import interpreted
from theodora.kernels.packed import Packed
from theodora.kernels.parts import MOST_LAYERS, Gate, SlottedWeights, Update
from theodora.kernels.triton import (
    beside,
    compose,
    decode,
    experts,
    experts_gate,
    finite,
    gated,
    packed,
    rotary,
    routed,
    weight_norm,
)

pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter has no compiler")

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024  # bytes a program can have on an H100
TYPES = {
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
}


def kind(value):
    """What a kernel is told of an argument."""
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


@pytest.fixture
def launched(monkeypatch):
    """Kernel name -> bytes of shared memory, of every launch in the test."""
    used: dict[str, int] = {}

    def run(kernel, *args, grid, warmup, num_warps=4, num_stages=3, enable_fp_fusion=True, **constants):
        values = dict(zip(kernel.arg_names, args, strict=False)) | constants
        signature, constexprs = {}, {}
        for index, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constexprs[(index,)] = "constexpr", value
            elif isinstance(value, tuple):
                signature[parameter.name] = tuple(map(kind, value))
            else:
                signature[parameter.name] = kind(value)
        source = ASTSource(kernel, signature, constexprs)
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
        made = compile_kernel(source, target=HOPPER, options=options)
        used[kernel.__name__] = made.metadata.shared

    monkeypatch.setattr(JITFunction, "run", run)
    return used


def update(tokens, outputs, rank, dtype):
    xa, bias, ones = torch.zeros(tokens, rank, dtype=dtype), torch.zeros(outputs, dtype=dtype), torch.ones(outputs)
    return Update(xa, torch.zeros(outputs, rank), 2.0, ones, ones, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [16, 64, 128])
def test_compose(rank, dtype, launched):
    z, u = torch.zeros(64, 128, dtype=dtype), update(64, 128, rank, dtype)
    compose.compose(z, u.xa_TR, u.b_OR, 2.0, u.magnitude_O, u.norm_O, u.bias_O, torch.empty_like(z))
    rest = u.xa_TR, u.b_OR, 2.0, u.magnitude_O, u.norm_O
    compose.compose_backward_into(z, z, *rest, torch.empty_like(z), from_output=True)
    x = torch.zeros(64, 96, dtype=dtype), torch.zeros(64), torch.zeros(96, dtype=dtype)
    w = torch.zeros(128, 96, dtype=dtype)
    compose.zero_scale_gradient(torch.zeros(128), z, *x, w, u.xa_TR, u.b_OR, 2.0, u.magnitude_O, u.norm_O)
    assert max(launched.values()) <= SHARED_MEMORY
    assert {"_compose", "_compose_backward", "_sum_rows", "_zero_scale_gradient"} <= launched.keys()


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotary(dtype, back, launched):
    rotary.turn(torch.zeros(2, 6, 8, 128, dtype=dtype), *torch.zeros(2, 1, 8, 128, dtype=dtype), back)
    assert set(launched) == {"_turn"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [16, 64, 128])
def test_gated(rank, dtype, launched):
    z1, z2, u = *torch.zeros(2, 64, 128, dtype=dtype), update(64, 128, rank, dtype)
    gated.gated(z1, z2, u, u, "silu")
    a = torch.zeros(rank, 128)
    gated.gated_backward(z1, u.xa_TR, a, z1, z2, u, u, "silu", torch.empty_like(z1), torch.empty_like(z2), False)
    assert max(launched.values()) <= SHARED_MEMORY
    assert {"_gated", "_gated_backward"} <= launched.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("rank", [16, 64, 256])
def test_weight_norm(rank, dtype, launched, monkeypatch):
    w = torch.zeros(64, 256).to(dtype)
    w_scale = torch.ones(64) if dtype == torch.float8_e4m3fn else None
    rest = torch.zeros(rank, 256), torch.zeros(64, rank), 2.0, torch.ones(64), w_scale
    weight_norm.dora_norm(w, *rest)
    monkeypatch.setattr(weight_norm, "_multiplied", lambda w, a3, _: torch.zeros(64, 3 * rank))
    weight_norm.dora_norm(w, *rest)
    assert max(launched.values()) <= SHARED_MEMORY
    assert ("_form_cancelled" in launched) == (rank > 32 and dtype != torch.float32)


def packed_weight(table, nested, dtype, outputs=256, inputs=1024):
    if table == "int8":
        tensors = torch.zeros(outputs, inputs, dtype=torch.int8), torch.ones(outputs)
        return Packed.of(tensors, (outputs, inputs), table, dtype)
    numbers, blocks = torch.zeros(outputs * inputs // 2, 1, dtype=torch.uint8), outputs * inputs // 64
    largest = torch.ones(blocks)
    if nested:
        largest = torch.zeros(blocks, dtype=torch.uint8), torch.ones(-(-blocks // 256)), torch.ones(256), torch.ones(())
    tensors = (numbers, *largest) if nested else (numbers, largest)
    return Packed.of(tensors, (outputs, inputs), table, dtype, 64, 256 if nested else 0)


@pytest.mark.parametrize(
    ("rank", "table", "nested", "dtype"),
    [
        *((rank, "nf4", True, torch.bfloat16) for rank in (16, 64, 128, 256)),
        *((16, "nf4", False, dtype) for dtype in (torch.float16, torch.float32)),
        (256, "nf4", True, torch.float32),
        (16, "int8", False, torch.bfloat16),
    ],
)
def test_norm_of_packed(rank, table, nested, dtype, launched):
    weight = packed_weight(table, nested, dtype)
    assert weight is not None
    packed.dora_norms([weight], torch.zeros(1, rank, 1024), torch.zeros(1, 256, rank), 2.0, torch.ones(1, 256))
    assert {"_times_a", "_dora_norm", "_form"} <= launched.keys()
    assert max(launched.values()) <= SHARED_MEMORY


@pytest.mark.parametrize("tokens", [1, 8, 64])
@pytest.mark.parametrize("how", ["nf4", "int8", "given"])
def test_decode_of_packed(how, tokens, launched, monkeypatch):
    monkeypatch.setattr(decode, "_pools", {})
    decode.prepare(torch.device("cpu"))
    x, g, bias = (
        torch.zeros(tokens, 1024, dtype=torch.bfloat16),
        torch.ones(256),
        torch.zeros(256, dtype=torch.bfloat16),
    )
    w = packed_weight(how, True, torch.bfloat16) if how != "given" else torch.zeros(tokens, 256, dtype=torch.bfloat16)
    rest = torch.zeros(16, 1024, dtype=torch.bfloat16), torch.zeros(256, 16, dtype=torch.bfloat16)
    decode.decode(x, w, *rest, g, bias, given=how == "given")
    assert launched["_decode"] <= SHARED_MEMORY


@pytest.mark.parametrize("rank", [16, 256])
@pytest.mark.parametrize("layers", [1, 3])
def test_beside(layers, rank, launched):
    beside.stacked_rows(torch.zeros(layers * rank + 1, 256, dtype=torch.bfloat16), [torch.zeros(rank, 256)] * layers)
    into = torch.zeros(layers * 64, layers * rank, dtype=torch.bfloat16)
    beside.diagonal(into, [torch.zeros(64, rank)] * layers, [2.0] * layers)
    assert set(launched) == {"_stacked_rows", "_diagonal"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [16, 33, 256])
@pytest.mark.parametrize("layers", [1, MOST_LAYERS])
def test_routed(layers, rank, dtype, launched):
    tokens, features, outputs, slots = 64, 4096, 4096, 3
    weights = SlottedWeights(
        a_SRI=torch.zeros(slots, rank, features, dtype=dtype),
        b_SRO=torch.zeros(slots, rank, outputs, dtype=dtype),
        g_SO=torch.ones(slots, outputs),
        bias_O=torch.zeros(outputs, dtype=dtype),
    )
    x, zs = torch.zeros(tokens, features, dtype=dtype), [torch.zeros(tokens, outputs, dtype=dtype)] * layers
    order, tiles = torch.arange(tokens), torch.zeros(tokens, 3, dtype=torch.int32)
    routed.routed(zs, x, [weights] * layers, order, tiles)
    assert set(launched) == {"_down", "_up"}
    assert max(launched.values()) <= SHARED_MEMORY


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_finite(dtype, launched):
    key, value = torch.zeros(1, 8, 64, 128, dtype=dtype), torch.zeros(1, 64, 8, 128, dtype=dtype).transpose(1, 2)
    finite.keep_finite(key, value, torch.zeros(64, dtype=torch.int32), 2.0**96)
    assert max(launched.values()) <= SHARED_MEMORY
    assert "_keep_finite" in launched


@pytest.mark.parametrize(("rank", "scaled", "turns"), [(5, True, False), (16, True, True), (64, False, False)])
def test_experts(rank, scaled, turns, launched):
    count, tokens, hidden, features = 8, 64, 128, 256
    bf16, choices = {"dtype": torch.bfloat16}, torch.zeros(2 * tokens, dtype=torch.int32)
    tiles, firsts = experts.split_rows(torch.zeros(count, dtype=torch.int32), 2 * tokens, experts.TILE)
    rows = experts.Rows(choices, choices, firsts[1:], tiles, tiles, firsts)
    index, weights = torch.zeros(tokens, 2, dtype=torch.int64), torch.zeros(tokens, 2, **bf16)
    x, low = torch.zeros(tokens, hidden, **bf16), torch.zeros(2 * tokens, rank, **bf16)
    v, h, z = (torch.zeros(2 * tokens, size, **bf16) for size in (hidden, features, 2 * features))
    a, b = torch.zeros(count, rank, features), torch.zeros(count, 2 * features, rank)
    g, bias = (torch.zeros(count, 2 * features), torch.zeros(count, 2 * features, **bf16)) if scaled else (None, None)
    g_v = torch.zeros(count, hidden) if scaled else None
    factors = experts.columns_of_a(torch.zeros(count, rank, hidden))
    experts.project(x, rows, factors, of_tokens=True, g_EC=g_v, keep=True)
    experts.add_low(v, rows, low, factors)
    experts.scaled(z, rows, g, torch.zeros(count, 2 * features, **bf16))
    experts.combine(v, rows, index, weights, g_v, None)
    weighted = weights if scaled else None
    parts, _ = experts.outer(x, rows, low, of_tokens=True, weights_TK=weighted, v_SC=v if scaled else None)
    experts.sum_chunks(parts, rows, torch.float32, 2.0, g_v)
    form = Gate("silu", turns, 1.7, 7.0, turns, 1.0)
    experts_gate.gate(z, rows, low, b, 2.0, g, bias, form)
    experts_gate.gate_backward(h, rows, weights, low, a, z, low, b, 2.0, g, bias, form)
    assert len(launched) == 8
    assert max(launched.values()) <= SHARED_MEMORY // 2
