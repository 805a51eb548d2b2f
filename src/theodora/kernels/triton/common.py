"""What the kernels share. Shapes as in `theodora.functional`; a name with two underscores is fixed when compiling."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from theodora.kernels.operators import interpreted


def rank_block(rank: int) -> int:
    """Ranks are padded to a power of two; `tl.dot` needs 16."""
    return max(16, triton.next_power_of_2(rank))


def precision(dtype: torch.dtype) -> str:
    """How `product` is to multiply operands of this dtype: float32 as it is, not rounded to tf32."""
    if dtype == torch.bfloat16 and interpreted():
        return "widen"  # Triton's interpreter keeps bfloat16 as integers, and multiplies those
    return "ieee" if dtype == torch.float32 else "tf32"


def row_contiguous(t: Tensor) -> Tensor:
    """`t`, or a copy whose rows are contiguous, as the kernels read them; rows themselves may lie apart."""
    return t if t.stride(-1) == 1 else t.contiguous()


@lru_cache
def processors(device: torch.device) -> int:
    """How many of them a GPU has; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def chunks_of_tokens(tokens: int, blocks: int, block_t: int, programs: int) -> tuple[int, int]:
    """(chunks, tokens of each) such that `blocks` × chunks are about so many programs."""
    chunks = max(1, min(triton.cdiv(tokens, block_t), triton.cdiv(programs, blocks)))
    size = max(block_t, triton.cdiv(triton.cdiv(tokens, chunks), block_t) * block_t)
    return triton.cdiv(tokens, size), size


def fitting(tile: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[int, int, int, int]:
    """A tile (tokens, features, warps, stages) chosen for half precision, in the shared memory that small GPUs have."""
    bt, bo, warps, stages = tile
    return tile if dtype.itemsize < 4 else (bt, min(bo, 64), min(warps, 4), min(stages, 2))


@triton.jit
def product(left, right, PRECISION: tl.constexpr):
    """left @ right with float32 sums."""
    if PRECISION == "widen":
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def row_scale(magnitude, norm, o, inside):
    """g = m / norm, and 1 where the norm is 0 (see `functional.dora_scale`).

    Divided exactly: a fresh magnitude is the norm, and its g is 1 to the bit.
    """
    m = tl.load(magnitude + o, mask=inside, other=1.0).to(tl.float32)
    n = tl.load(norm + o, mask=inside, other=1.0).to(tl.float32)
    return tl.where(n == 0, 1.0, tl.div_rn(m, tl.where(n == 0, 1.0, n)))


@triton.jit
def load_scaled_b(b, o, r, O, R, b_row, b_col, scale, dtype):
    """A tile of s·B, (BO, BR), rounded once to the dtype of the products."""
    inside = (o[:, None] < O) & (r[None, :] < R)
    tile = tl.load(b + o[:, None] * b_row + r[None, :] * b_col, mask=inside, other=0.0).to(tl.float32)
    return (tile * scale).to(dtype)


@triton.jit
def load_xa(xa, t, r, T, R, xa_row):
    """A tile of xa, (BT, BR)."""
    return tl.load(xa + t[:, None] * xa_row + r[None, :], mask=(t[:, None] < T) & (r[None, :] < R), other=0.0)


@triton.jit(do_not_specialize=["COUNT"])
def _sum_chunks(parts, out, COUNT, SIZE, COLS, out_row, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = parts + i
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(COUNT):
        total += tl.load(at, mask=i < SIZE, other=0.0)
        at += SIZE
    tl.store(out + i // COLS * out_row + i % COLS, total.to(out.dtype.element_ty), mask=i < SIZE)


def sum_chunks(parts: Tensor, out: Tensor) -> Tensor:
    """The sum over the first dimension of float32 `parts` (count, rows, columns), in a fixed order, into `out`."""
    count, rows, columns = parts.shape
    size = rows * columns
    if size:
        grid = (triton.cdiv(size, 512),)
        _sum_chunks[grid](parts, out, count, size, columns, out.stride(0), BLOCK=512, num_warps=4)
    return out


@triton.jit(do_not_specialize=["CHUNKS"])
def _sum_rows(db_parts, dg_parts, norm, db, dm, O, SIZE, CHUNKS, scale, LOW: tl.constexpr, SCALED: tl.constexpr,
              BLOCK: tl.constexpr, TOGETHER: tl.constexpr):  # fmt: skip
    """Programs for dB come first, those for dm behind them. TOGETHER chunks are loaded at once, to wait once."""
    program = tl.program_id(0)
    own = 0
    if LOW:
        own = tl.cdiv(SIZE, BLOCK)
        if program < own:
            i = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            tl.store(db + i, _sum_of_parts(db_parts, i, SIZE, CHUNKS, BLOCK, TOGETHER) * scale, mask=i < SIZE)
    if SCALED:  # noqa: SIM102 - it is known when compiling, and what is inside is not
        if program >= own:
            o = (program - own).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            total = _sum_of_parts(dg_parts, o, O, CHUNKS, BLOCK, TOGETHER)
            n = tl.load(norm + o, mask=o < O, other=1.0).to(tl.float32)
            tl.store(dm + o, tl.where(n == 0, 0.0, total / tl.where(n == 0, 1.0, n)), mask=o < O)


@triton.jit
def _sum_of_parts(parts, i, SIZE, CHUNKS, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    total = tl.zeros((TOGETHER, BLOCK), tl.float32)
    for start in range(0, CHUNKS, TOGETHER):
        chunk = (start + tl.arange(0, TOGETHER)).to(tl.int64)
        inside = (chunk < CHUNKS)[:, None] & (i < SIZE)[None, :]
        total += tl.load(parts + chunk[:, None] * SIZE + i[None, :], mask=inside, other=0.0)
    return tl.sum(total, axis=0)


def rounded_b(b_OR: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """s·B, rounded once to the dtype of the products."""
    return torch.mul(b_OR, scale, out=torch.empty_like(b_OR, dtype=dtype))


def sum_rows(
    db_parts: Tensor | None, dg_parts: Tensor | None, norm: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """dB = s·Σ parts (O, R) and dm = Σ parts / norm (O,), over the chunks of tokens; empty where there is none."""
    parts = db_parts if db_parts is not None else dg_parts
    assert parts is not None
    chunks, out_features = parts.shape[:2]
    rank = db_parts.shape[2] if db_parts is not None else 1
    empty = parts.new_empty(0)
    db = empty if db_parts is None else parts.new_empty(out_features, rank)
    dm = empty if dg_parts is None else parts.new_empty(out_features)
    size = out_features * rank
    programs = triton.cdiv(size, 256) * (db_parts is not None) + triton.cdiv(out_features, 256) * (dg_parts is not None)
    _sum_rows[(programs,)](
        db_parts, dg_parts, norm, db, dm, out_features, size, chunks, scale,
        LOW=db_parts is not None, SCALED=dg_parts is not None, BLOCK=256,
        TOGETHER=min(16, triton.next_power_of_2(chunks)), num_warps=4,
    )  # fmt: skip
    return db, dm
