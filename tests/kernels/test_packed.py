"""Packed weights as the kernels read them: to the bit as their library dequantises, and norms against float64.

The kernels run on a GPU, or under Triton's interpreter (TRITON_INTERPRET=1).
"""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import formula
from formula import DEVICE
from registered import opcheck
from theodora import functional
from theodora.kernels import decode, packed, weight_norm
from theodora.kernels.formats import Bits4, Bits8, Part
from theodora.kernels.library_weight import LibraryWeight
from theodora.kernels.operators import runs_triton

pytest.importorskip("triton")
pytest.importorskip("bitsandbytes")

import bitsandbytes
import triton
import triton.language as tl

from theodora.kernels.triton.packed import EXACT, argument, constants, load_packed

needs_kernel = pytest.mark.skipif(not runs_triton(torch.empty(0, device=DEVICE)), reason="needs Triton")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = torch.finfo(torch.float32).eps

# table, block, double quantised
KINDS = [
    *(("nf4", 64, True), ("nf4", 64, False), ("fp4", 64, True)),
    *(("nf4", 128, True), ("nf4", 256, False), ("int8", 0, False)),
]


def quantized(outputs, inputs, kind, dtype=torch.bfloat16):
    """(format, tensors) of a random weight."""
    table, block, nested = kind
    w = torch.randn(outputs, inputs, device=DEVICE, dtype=dtype if dtype != torch.float32 else None)
    if table == "int8":
        scale = w.float().abs().amax(1)
        cb = (w.float() * (127 / scale[:, None])).round().to(torch.int8)
        return Bits8((outputs, inputs), dtype, threshold=0.0, int8_product=False), (cb, scale)
    q, state = bitsandbytes.functional.quantize_4bit(w, blocksize=block, compress_statistics=nested, quant_type=table)
    outer = (state.state2.absmax, state.state2.code, state.offset) if nested else ()
    form = Bits4((outputs, inputs), dtype, table, block, state.state2.blocksize if nested else 0, dtype)
    return form, (q, state.absmax, *outer)


@triton.jit
def read(w, out, O, I, BITS: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, DTYPE: tl.constexpr,
         BO: tl.constexpr, BI: tl.constexpr):  # fmt: skip
    o, i = tl.program_id(0) * BO + tl.arange(0, BO), tl.program_id(1) * BI + tl.arange(0, BI)
    tile = load_packed(w, o, tl.program_id(1) * BI, O, I, BITS, BLOCK, NESTED, DTYPE, BO, BI)
    tl.store(out + o[:, None] * I + i[None, :], tile, mask=(o[:, None] < O) & (i[None, :] < I))


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_is_read_as_the_library_dequantises_it(kind, dtype):
    """Also some rows of a larger weight, and rows and features that fill no tile."""
    form, tensors = quantized(21, 768, kind, dtype)
    for some in (form, Part.of(form, 3, 16)):
        weight = some.packed(tensors)
        assert weight is not None
        for bo, bi in ((16, 32), (8, 128), (16, 512)):
            out = torch.full(some.shape, torch.nan, device=DEVICE, dtype=dtype)
            grid = (triton.cdiv(some.shape[0], bo), triton.cdiv(some.shape[1], bi))
            read[grid](argument(weight), out, *some.shape, **constants(weight), BO=bo, BI=bi, **EXACT)
            assert torch.equal(out, some.dense(tensors, dtype))


def exact(w, a, b, scale):
    return (w.double() + scale * b.double() @ a.double()).norm(dim=1)


def factors(outputs, inputs, rank, size=0.3):
    a = torch.randn(rank, inputs, device=DEVICE) / inputs**0.5
    return a, size * torch.randn(outputs, rank, device=DEVICE)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 40])
def test_norm(rank, kind, dtype):
    """Each row's relative error: at most twice the largest of the reference's."""
    form, tensors = quantized(37, 768, kind, dtype)
    for some, sizes in ((form, (1e-3, 0.3, 10.0)), (Part.of(form, 5, 16), (0.3,))):
        weight, w = some.packed(tensors), some.dense(tensors, dtype)
        squared = functional.row_norm_squared(w)
        for size in sizes:
            a, b = factors(*some.shape, rank, size)
            expected = exact(w, a, b, 0.5)
            found = weight_norm.dora_norm_packed(weight, a, b, 0.5, squared)
            plain = functional.dora_norm(w, a, b, 0.5, squared)
            worst = [float(((norm.double() - expected).abs() / expected).max()) for norm in (found, plain)]
            assert worst[0] <= 2 * worst[1] + 4 * EPS


@needs_kernel
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]])
@pytest.mark.parametrize("rank", [5, 100, 256])
def test_several_at_once(rank, kind):
    """With rows whose terms cancel, and some of zeros."""
    weights, dense, all_a, all_b = [], [], [], []
    for _ in range(3):
        form, tensors = quantized(21, 512, kind)
        w = form.dense(tensors, torch.bfloat16)
        a, b = factors(21, 512, rank)
        a[0], b[7] = -1.98 * w[7].float(), 0
        b[7, 0] = 1
        weights.append(form.packed(tensors))
        dense.append(w)
        all_a.append(a)
        all_b.append(b)
    squared = torch.stack([functional.row_norm_squared(w) for w in dense])
    found = weight_norm.dora_norms_packed(weights, torch.stack(all_a), torch.stack(all_b), 0.5, squared)
    expected = torch.stack([exact(*each, 0.5) for each in zip(dense, all_a, all_b, strict=True)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@needs_kernel
def test_factors_in_any_order_and_dtype():
    form, tensors = quantized(20, 512, KINDS[0])
    weight, w = form.packed(tensors), form.dense(tensors, torch.bfloat16)
    a, b = factors(20, 512, 5)
    squared = functional.row_norm_squared(w)
    expected = weight_norm.dora_norm_packed(weight, a, b, 0.5, squared)
    turned = weight_norm.dora_norm_packed(weight, a.T.contiguous().T, b.T.contiguous().T, 0.5, squared)
    torch.testing.assert_close(turned, expected, rtol=1e-6, atol=0)
    rounded = a.bfloat16(), b.bfloat16()
    found = weight_norm.dora_norm_packed(weight, *rounded, 0.5, squared)
    torch.testing.assert_close(found.double(), exact(w, *rounded, 0.5), rtol=1e-5, atol=0)


def test_what_the_kernels_cannot_read():
    form, tensors = quantized(6, 96, ("nf4", 64, True))  # a block of two rows
    assert form.packed(tensors) is None
    form, tensors = quantized(6, 128, ("nf4", 64, True), torch.float32)
    assert form.packed(tensors) is not None
    assert form.packed((tensors[0], tensors[1], tensors[2].double(), *tensors[3:])) is None


@needs_kernel
def test_the_operator_keeps_its_word():
    form, tensors = quantized(6, 128, KINDS[0])
    weight = form.packed(tensors)
    a, b = factors(6, 128, 3)
    squared = functional.row_norm_squared(form.dense(tensors, torch.bfloat16))
    given = a, b, 0.5, squared, list(tensors), list(weight.form), weight.table, 0
    opcheck(torch.ops.theodora.dora_norm_packed, given)


def test_tables_are_the_librarys():
    for name, table in packed.TABLES.items():
        byte = torch.arange(16, dtype=torch.uint8, device=DEVICE)
        numbers = (byte[::2] << 4 | byte[1::2]).repeat(4)[:, None]
        wide = torch.ops.bitsandbytes.dequantize_4bit.default(
            numbers, torch.ones(1, device=DEVICE), 64, name, (1, 64), torch.float32
        )
        assert torch.equal(wide[0, :16], torch.tensor(table, device=DEVICE))


def decoded_exactly(x, w, a, b, g, bias):
    y = x.double() @ w.double().T + (x.double() @ a.double().T) @ b.double().T
    y = y if g is None else y * g.double()
    return y if bias is None else y + bias.double()


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4], KINDS[-1]])
@pytest.mark.parametrize(("tokens", "rank"), [(1, 3), (1, 40), (5, 16), (40, 3)])
def test_decoding(tokens, rank, kind, dtype, monkeypatch):
    """In one launch or with xa apart, and of z that another kernel has made."""
    from theodora.kernels.triton import decode as kernel

    form, tensors = quantized(45, 768, kind, dtype)
    weight, w = LibraryWeight(form, *tensors), form.dense(tensors, dtype)
    assert decode.runs(weight)
    a, b = (factor.to(dtype) for factor in factors(45, 768, rank))
    x, g, bias = torch.randn(tokens, 768, device=DEVICE).to(dtype), torch.rand(45, device=DEVICE), w[:, 0].clone()
    numbers = list(weight.packed().tensors), list(weight.packed().form), weight.packed().table
    for pools in (True, False):
        monkeypatch.setattr(kernel, "_pools", {})
        if pools:
            decode.prepare(x.device)
        for rest in ((a, b, g, bias), (a, b, None, None)):
            expected = decoded_exactly(x, w, *rest)
            plain = formula.error(decode.decode_linear_reference(x, w, *rest), expected)
            allowed = 2 * plain + torch.finfo(dtype).eps / 8
            found = decode.decode_packed(x, *rest, *numbers)
            assert formula.error(found, expected) <= allowed
            assert torch.equal(decode.decode_packed(x, *rest, *numbers), found)
            assert formula.error(decode.decode_onto(x, F.linear(x, w), *rest), expected) <= allowed
        for pool in kernel._pools.values():
            assert not pool.counters.any()


@needs_kernel
@pytest.mark.parametrize(
    ("kind", "dtype", "inputs", "cut"),
    [
        (("nf4", 64, True), torch.bfloat16, 192, (4, 1, 256, 1, 2)),  # features and rows that fill no tile
        (("fp4", 32, False), torch.float16, 96, (2, 1, 64, 2, 1)),  # chunks of 32, and two splits
        (("nf4", 128, False), torch.float16, 256, (8, 1, 128, 1, 2, 1, 2)),  # rows in steps
    ],
)
def test_decoding_one_token_by_looking_up(kind, dtype, inputs, cut, monkeypatch):
    from theodora.kernels.triton import decode as kernel
    from theodora.kernels.triton import lookup

    monkeypatch.setattr(lookup, "EVERYWHERE", True)
    form, tensors = quantized(9, inputs, kind, dtype)
    decode.prepare(tensors[0].device)
    some = Part.of(form, 2, 9)
    weight, w = some.packed(tensors), some.dense(tensors, dtype)
    assert lookup.chunk_of(weight) == min(kind[1], 64)
    a, b = (factor.to(dtype) for factor in factors(7, inputs, 3))
    x = torch.randn(1, inputs, device=DEVICE).to(dtype)
    expected = decoded_exactly(x, w, a, b, None, None)
    plain = formula.error(decode.decode_linear_reference(x, w, a, b, None, None), expected)
    found = kernel.decode(x, weight, a, b, None, None, kernel.Plan(*cut))
    assert formula.error(found, expected) <= 2 * plain + torch.finfo(dtype).eps / 2


@needs_kernel
def test_decoding_asks_the_library_where_it_rounds_x():
    form, tensors = quantized(20, 512, KINDS[-1], torch.float16)
    rounding = replace(form, int8_product=True)
    weight = LibraryWeight(rounding, *tensors)
    a, b = (factor.half() for factor in factors(20, 512, 3))
    x = torch.randn(2, 512, device=DEVICE).half()
    z = weight.product(x)
    assert not torch.equal(z, F.linear(x, weight.dense()))
    found = decode.decode(x, weight, a, b, None, None)
    assert formula.error(found, z.double() + (x.double() @ a.double().T) @ b.double().T) < 1e-3


@needs_kernel
def test_decoding_is_an_operator():
    form, tensors = quantized(16, 128, KINDS[0], torch.float16)
    weight = form.packed(tensors)
    a, b = (factor.half() for factor in factors(16, 128, 4))
    x = torch.randn(2, 128, device=DEVICE).half()
    given = x, a, b, None, None, list(tensors), list(weight.form), weight.table
    opcheck(torch.ops.theodora.decode_packed.default, given)
    opcheck(torch.ops.theodora.decode_onto.default, (x, x @ a.T @ b.T, a, b, None, None))
