"""One token times a weight of 4 bits: rows · x without a gather for each number.

A thread takes 64 neighbouring numbers of a row (32 where blocks are as short), which have one scale. It forms the 16
values that they can have, rounded as the library rounds, and lays them out as bytes; `prmt`, which picks four bytes out
of eight by four bits each, then looks four numbers up at once. Beside that, a number costs a multiplication.

Where there is no such instruction (`instructions` is ""), each number can come from a load of the table: the same
values, slowly, for tests under the interpreter (`EVERYWHERE`); otherwise such weights are read as those of 8 bits are.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from theodora.kernels.operators import interpreted
from theodora.kernels.packed import TABLES, Packed
from theodora.kernels.triton.packed import rounded

_PAIRS = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}
EVERYWHERE = False
_ALIGNED = 16  # bytes that a thread loads at once

# In: a sum, the word, the tables' bytes ($3 to $6 the lower ones of four values each, $7 to $10 the upper ones), and
# four pairs of x. Of a number's four bits three choose among eight values, and the fourth one of two such choices. (A
# byte holds its first number in the upper half.) All in one, so that the compiler moves x between threads as pairs.
_HALF = """
prmt.b32 p, $3, $4, {low};
prmt.b32 q, $5, $6, {low};
prmt.b32 l, p, q, {high};
prmt.b32 p, $7, $8, {low};
prmt.b32 q, $9, $10, {low};
prmt.b32 h, p, q, {high};
prmt.b32 {first}, l, h, 0x4051;
prmt.b32 {second}, l, h, 0x6273;
"""  # of a word: four numbers
_LOOK_UP = f"""{{
.reg .b32 low, low2, high, high2, p, q, l, h, w<4>;
and.b32 low, $2, 0x77777777;
shr.u32 high, $2, 1;
shr.u32 low2, low, 16;
lop3.b32 high, high, 0x44444444, 0x32103210, 0xEA;
shr.u32 high2, high, 16;
{_HALF.format(low="low", high="high", first="w0", second="w1")}
{_HALF.format(low="low2", high="high2", first="w2", second="w3")}
.reg .f32 sum, u, v, x, y;
mov.f32 sum, $1;
"""
_WIDEN = {
    "bf16x2": "shl.b32 {low}, {pair}, 16;\nand.b32 {high}, {pair}, 0xffff0000;\n",
    "f16x2": "{{ .reg .b16 a, b; mov.b32 {{a, b}}, {pair}; cvt.f32.f16 {low}, a; cvt.f32.f16 {high}, b; }}\n",
}
_PRODUCT_REGISTERS = tl.constexpr(",".join(["=f", "f", *["r"] * 13]))
_TABLE_REGISTERS = tl.constexpr(",".join(["=&r"] * 8 + ["r"]))


@lru_cache
def _product_instructions(dtype: torch.dtype) -> str:
    """PTX that looks the eight numbers of a word up and multiplies them with x."""
    widen, lines = _WIDEN[_PAIRS[dtype]], [_LOOK_UP]
    for pair in range(4):
        lines.append(widen.format(pair=f"w{pair}", low="u", high="v"))
        lines.append(widen.format(pair=f"${11 + pair}", low="x", high="y"))
        lines.append("fma.rn.f32 sum, u, x, sum;\nfma.rn.f32 sum, v, y, sum;\n")
    return "".join([*lines, "mov.f32 $0, sum;\n}"])


@lru_cache
def _table_instructions(table: str, dtype: torch.dtype) -> str:
    """PTX that makes a scale, $8, into the bytes of 16 rounded values: $0 to $3 the lower ones, $4 to $7 the upper."""
    lines = ["{", ".reg .f32 u, v;", ".reg .b32 p<8>;"]
    bits = [struct.pack(">f", value).hex() for value in TABLES[table]]
    for pair in range(8):
        lines += [f"mul.rn.f32 u, $8, 0f{bits[2 * pair]};", f"mul.rn.f32 v, $8, 0f{bits[2 * pair + 1]};"]
        lines.append(f"cvt.rn.{_PAIRS[dtype]}.f32 p{pair}, v, u;")
    for four in range(4):
        for into, bytes_ in ((four, "0x6420"), (4 + four, "0x7531")):
            lines.append(f"prmt.b32 ${into}, p{2 * four}, p{2 * four + 1}, {bytes_};")
    return "\n".join([*lines, "}"])


def chunk_of(weight: Packed) -> int:
    """Numbers that a thread looks up with one table; 0: the weight is not one for this kernel."""
    _, inputs, bits, block, _, _ = weight.form
    numbers = weight.tensors[0]
    fits = bits == 4 and weight.dtype in _PAIRS and numbers.data_ptr() % _ALIGNED == 0
    fits = fits and (EVERYWHERE or instructions(weight)[0] != "")
    chunk = min(block, 64)
    return chunk if fits and inputs % chunk == 0 else 0


def instructions(weight: Packed) -> tuple[str, str]:
    """PTX for the weight's table and for products; "" under the interpreter and on GPUs that do not know it."""
    device = weight.tensors[0].device
    if interpreted() or torch.version.hip is not None:
        return "", ""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):  # has no `cvt` to two bfloat16
        return "", ""
    return _table_instructions(weight.table, weight.dtype), _product_instructions(weight.dtype)


def aligned(x: Tensor) -> Tensor:
    """`x`, or a copy, such that it can be read as words."""
    return x if x.data_ptr() % _ALIGNED == 0 else x.clone()


@triton.jit
def _two(pair, DTYPE: tl.constexpr):
    """The numbers in the lower and upper halves of words, float32."""
    if tl.bfloat16 == DTYPE:
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -0x10000).to(tl.float32, bitcast=True)
    else:
        low, high = pair.to(tl.int16), (pair >> 16).to(tl.int16)
        return low.to(DTYPE, bitcast=True).to(tl.float32), high.to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _pairs_of_x(x, chunk, stop, PART: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, SPLIT: tl.constexpr):
    """x as words: of each chunk 32 features from its PART · 32 on, (CHUNKS, 16); SPLIT: four tensors (CHUNKS, 4)."""
    word = chunk[:, None] * (CHUNK // 2) + PART * 16 + tl.arange(0, 16)[None, :]
    words = tl.load(x.to(tl.pointer_type(tl.int32)) + word, mask=2 * word < stop, other=0)
    if SPLIT:
        even, odd = tl.split(words.reshape(CHUNKS, 4, 2, 2))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth
    else:
        return (words,)


@triton.jit
def _scales(w, row, chunk, inside, I, CHUNK: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr):
    """Of the chunks of a row, (CHUNKS,) float32."""
    _, largest, outer, code, mean, _, _ = w
    block = row * (I // BLOCK) + (chunk if BLOCK == CHUNK else chunk * CHUNK // BLOCK)
    if NESTED > 0:
        scale = tl.load(code + tl.load(largest + block, mask=inside, other=0).to(tl.int32))
        scale = scale * tl.load(outer + block // NESTED, mask=inside, other=0.0) + tl.load(mean)
        return tl.where(inside, scale, 0.0)
    else:
        return tl.load(largest + block, mask=inside, other=0.0)


@triton.jit
def partial_of_words(x, w, first_row, O, start, stop, I,
                     BLOCK: tl.constexpr, NESTED: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr,
                     TABLE: tl.constexpr, PRODUCT: tl.constexpr,
                     STAGES: tl.constexpr, ROWS: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr):  # fmt: skip
    """rows · x of BO rows over features start..stop, (BO, 1) float32, with `instructions` or without.

    Tiles are of one row and lie as (chunks, words): each thread has the same part of x for all rows, of which ROWS
    are read at once.
    """
    CHUNKS: tl.constexpr = BI // CHUNK
    PARTS: tl.constexpr = CHUNK // 32
    ASSEMBLED: tl.constexpr = TABLE != ""
    words = w[0].to(tl.pointer_type(tl.int32))
    place = tl.arange(0, BO)[None, :]
    sums = tl.zeros([CHUNKS, BO], dtype=tl.float32)
    for first in tl.range(start, stop, BI, num_stages=STAGES):
        chunk = first // CHUNK + tl.arange(0, CHUNKS)
        # x comes first: the compiler lays products out as what it meets last, and W should stay where it is.
        pairs = _pairs_of_x(x, chunk, stop, 0, CHUNK, CHUNKS, ASSEMBLED)
        if PARTS == 2:
            pairs += _pairs_of_x(x, chunk, stop, 1, CHUNK, CHUNKS, ASSEMBLED)
        for step in tl.range(0, BO, ROWS):
            scales, loaded = (), ()
            for r in tl.static_range(ROWS):
                own = first_row + step + r
                row = (own + w[6]).to(tl.int64)
                inside = chunk * CHUNK < tl.where(own < O, stop, 0)
                scales += (_scales(w, row, chunk, inside, I, CHUNK, BLOCK, NESTED),)
                for part in tl.static_range(PARTS):
                    word = chunk[:, None] * (CHUNK // 8) + part * 4 + tl.arange(0, 4)[None, :]
                    row_start = words + row * (I // 32) * 4  # seen to be a multiple of 4
                    loaded += (tl.load(row_start + word, mask=inside[:, None], other=0),)
            for r in tl.static_range(ROWS):
                scale = scales[r][:, None]
                if ASSEMBLED:
                    bytes_ = tl.inline_asm_elementwise(
                        TABLE, _TABLE_REGISTERS, [scale], dtype=(tl.int32,) * 8, is_pure=True, pack=1
                    )
                total = tl.zeros([CHUNKS, 4 if ASSEMBLED else 16], dtype=tl.float32)
                for part in tl.static_range(PARTS):
                    word = loaded[r * PARTS + part]
                    if ASSEMBLED:
                        some = pairs[4 * part], pairs[4 * part + 1], pairs[4 * part + 2], pairs[4 * part + 3]
                        total = tl.inline_asm_elementwise(
                            PRODUCT, _PRODUCT_REGISTERS,
                            [total, word, bytes_[0], bytes_[1], bytes_[2], bytes_[3],
                             bytes_[4], bytes_[5], bytes_[6], bytes_[7], some[0], some[1], some[2], some[3]],
                            dtype=tl.float32, is_pure=True, pack=1,
                        )  # fmt: skip
                    else:
                        byte = (word[:, :, None] >> 8 * tl.arange(0, 4)[None, None, :]).reshape(CHUNKS, 16)
                        first_w, second_w = _two_loaded(w[5], byte, scale, DTYPE)
                        first_x, second_x = _two(pairs[part], DTYPE)
                        total += first_w * first_x + second_w * second_x
                sums = tl.where(place == step + r, sums + tl.sum(total, 1)[:, None], sums)
    return tl.sum(sums, 0)[:, None]


@triton.jit
def _two_loaded(table, byte, scale, DTYPE: tl.constexpr):
    """The numbers in the upper and lower halves of the lowest byte."""
    first = rounded(tl.load(table + ((byte >> 4) & 15)) * scale, DTYPE)
    second = rounded(tl.load(table + (byte & 15)) * scale, DTYPE)
    return first.to(tl.float32), second.to(tl.float32)
