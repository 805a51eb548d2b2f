"""`theodora.kernels.weight_norm` in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from theodora.functional import CANCELLED
from theodora.kernels.triton.common import precision, product, rank_block
from theodora.kernels.triton.float8 import widen

# (output features, input features, warps, stages) of a program, by padded rank; measured on an H100.
_TILES = {16: (16, 128, 4, 3), 32: (16, 128, 4, 3), 64: (16, 64, 4, 3), 128: (16, 64, 4, 2), 256: (16, 32, 4, 2)}
_FORMS = 32
"""Padded ranks up to which the kernel that adds up the terms also forms the rows whose terms cancel. Beyond it the room
that forming wants, which is hardly ever used, would leave few programs under way at once."""
_GRAMS = 32
"""Padded ranks up to which A Aᵀ is added up where A is split, and meets B in the kernel of the norms."""
_SHARES = 32
"""Programs that split one A, each with a share of A Aᵀ."""


@triton.jit
def _load_w(w, o, k, O, I, w_row, w_col, TRANSPOSED: tl.constexpr):
    inside = (o[:, None] < O) & (k[None, :] < I)
    # A stride that is known to be 1 lets the compiler read whole lines.
    if TRANSPOSED:
        return tl.load(w + o[:, None] + k[None, :].to(tl.int64) * w_col, mask=inside, other=0.0)
    else:
        return tl.load(w + o[:, None].to(tl.int64) * w_row + k[None, :], mask=inside, other=0.0)


@triton.jit
def _load_b(b, o, r, O, R, b_row, b_col):
    inside = (o[:, None] < O) & (r[None, :] < R)
    return tl.load(b + o[:, None] * b_row + r[None, :] * b_col, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _formed(w, a, b_tile, row_scale, o, r, O, I, R, w_row, w_col, a_row, scale,
            TRANSPOSED: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr):  # fmt: skip
    """‖W + s·B·A‖² of each row, by forming it."""
    total = tl.zeros((BO,), tl.float32)
    for start in range(0, I, BI):
        k = start + tl.arange(0, BI)
        w_tile = _load_w(w, o, k, O, I, w_row, w_col, TRANSPOSED).to(tl.float32) * row_scale[:, None]
        a_tile = tl.load(a + r[:, None] * a_row + k[None, :], mask=(r[:, None] < R) & (k[None, :] < I), other=0.0)
        adapted = w_tile + scale * tl.dot(b_tile, a_tile.to(tl.float32), input_precision="ieee")
        total += tl.sum(adapted * adapted, axis=1)
    return total


@triton.jit
def _dora_norm(w, a, a3, products, b, gram, w_norm_sq, w_scale, norm, O, I, R,
               w_row, w_col, a_row, b_row, b_col, scale,
               MULTIPLIED: tl.constexpr, PARTS: tl.constexpr, QUANTIZED: tl.constexpr, SPLIT: tl.constexpr,
               PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr, CANCELLED: tl.constexpr, FORM: tl.constexpr,
               SHARES: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """The norm of each row; without FORM, −1 for rows whose terms cancel.

    `gram` is B (A Aᵀ), (O, R); or A Aᵀ as the sum of so many SHARES, each (R, R).
    """
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    r = tl.arange(0, BR)
    w_a = tl.zeros((BO, BR), tl.float32)
    if MULTIPLIED:
        for part in tl.static_range(PARTS):
            w_a += tl.load(
                products + o[:, None] * (PARTS * R) + part * R + r[None, :],
                mask=(o[:, None] < O) & (r[None, :] < R), other=0.0,
            )  # fmt: skip
    else:
        for start in range(0, I, BI):
            k = start + tl.arange(0, BI)
            w_tile = _load_w(w, o, k, O, I, w_row, w_col, TRANSPOSED)
            inside = (r[None, :] < R) & (k[:, None] < I)
            if SPLIT:
                # W is exact in bfloat16, and A as the sum of three: float32 accuracy at the price of bfloat16.
                w_tile = w_tile.to(tl.bfloat16)
                for part in tl.static_range(3):
                    a_tile = tl.load(a3 + (part * R + r[None, :]) * I + k[:, None], mask=inside, other=0.0)
                    w_a += product(w_tile, a_tile, PRECISION)
            else:
                a_tile = tl.load(a + r[None, :] * a_row + k[:, None], mask=inside, other=0.0)
                w_a += product(w_tile.to(tl.float32), a_tile.to(tl.float32), PRECISION)
    row_scale = tl.full((BO,), 1.0, tl.float32)
    if QUANTIZED:
        row_scale = tl.load(w_scale + o, mask=o < O, other=1.0)
    b_tile = _load_b(b, o, r, O, R, b_row, b_col)
    if SHARES > 0:
        square, q = (r[:, None] < R) & (r[None, :] < R), r[:, None] * R + r[None, :]
        gram_tile = tl.zeros((BR, BR), tl.float32)
        for share in tl.static_range(SHARES):
            gram_tile += tl.load(gram + share * R * R + q, mask=square, other=0.0)
        b_gram_tile = tl.dot(b_tile, gram_tile, input_precision="ieee")
    else:
        b_gram_tile = tl.load(gram + o[:, None] * R + r[None, :], mask=(o[:, None] < O) & (r[None, :] < R), other=0.0)
    base = tl.load(w_norm_sq + o, mask=o < O, other=1.0).to(tl.float32)
    update = scale * scale * tl.sum(b_gram_tile * b_tile, axis=1)
    norm_sq = base + 2 * scale * row_scale * tl.sum(b_tile * w_a, axis=1) + update
    # Where the terms cancel, rounding has eaten the digits: those rows are formed after all.
    cancelled = norm_sq < CANCELLED * (base + update)
    if FORM:
        some = tl.max(cancelled.to(tl.int32), axis=0) > 0
        if some:
            formed = _formed(w, a, b_tile, row_scale, o, r, O, I, R, w_row, w_col, a_row, scale, TRANSPOSED, BO, BI)
            norm_sq = tl.where(cancelled, formed, norm_sq)
    found = tl.sqrt_rn(tl.maximum(norm_sq, 0.0))  # as torch rounds it, so that a saved norm is the norm anywhere
    if not FORM:
        found = tl.where(cancelled, -1.0, found)
    tl.store(norm + o, found, mask=o < O)


@triton.jit
def _form_cancelled(w, a, b, w_scale, norm, O, I, R, w_row, w_col, a_row, b_row, b_col, w_next, a_next, b_next, scale,
                    QUANTIZED: tl.constexpr, TRANSPOSED: tl.constexpr,
                    BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """The rows that `_dora_norm` left at −1, of each weight; there are hardly ever any."""
    weight = tl.program_id(1).to(tl.int64)
    w, a, b, norm = w + weight * w_next, a + weight * a_next, b + weight * b_next, norm + weight * O
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    cancelled = tl.load(norm + o, mask=o < O, other=0.0) < 0
    if tl.max(cancelled.to(tl.int32), axis=0) > 0:
        r = tl.arange(0, BR)
        row_scale = tl.full((BO,), 1.0, tl.float32)
        if QUANTIZED:
            row_scale = tl.load(w_scale + o, mask=o < O, other=1.0)
        b_tile = _load_b(b, o, r, O, R, b_row, b_col)
        formed = _formed(w, a, b_tile, row_scale, o, r, O, I, R, w_row, w_col, a_row, scale, TRANSPOSED, BO, BI)
        tl.store(norm + o, tl.sqrt_rn(formed), mask=cancelled)


def dora_norm(w: Tensor, a: Tensor, b: Tensor, scale: float, w_norm_sq: Tensor, w_scale: Tensor | None) -> Tensor:
    """As `dora_norm_reference`, in float32."""
    outputs, inputs = w.shape
    rank = a.shape[0]
    a = a if a.stride(1) == 1 else a.contiguous()
    split = w.dtype == torch.bfloat16 or w_scale is not None
    norm = torch.empty(outputs, dtype=torch.float32, device=w.device)
    block = rank_block(rank)
    bo, bi, warps, stages = _TILES[min(block, 256)]
    shares = _SHARES if split and block <= _GRAMS else 0
    a3, gram = _split_with_gram(a, block) if shares else (_in_three(a) if split else a, _times_gram(b, a))
    products = _multiplied(w, a3, w_scale) if split else None
    forms = products is None or block <= _FORMS
    own = bo if forms else max(1, 1024 // block)  # there is no `tl.dot` then, which wants 16 rows
    _dora_norm[(triton.cdiv(outputs, own),)](
        w, a, a3, products, b, gram, w_norm_sq, w_scale, norm, outputs, inputs, rank,
        w.stride(0), w.stride(1), a.stride(0), b.stride(0), b.stride(1), scale,
        MULTIPLIED=products is not None, PARTS=3, QUANTIZED=w_scale is not None, SPLIT=split,
        PRECISION=precision(torch.bfloat16 if split else torch.float32),
        TRANSPOSED=_transposed(w), CANCELLED=CANCELLED, FORM=forms, SHARES=shares,
        BO=own, BI=bi, BR=block, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if not forms:
        _form_rows(w, a, b, w_scale, norm, scale)
    return norm


def dora_norms(
    ws: Sequence[Tensor],
    a_NRI: Tensor,
    b_NOR: Tensor,
    scale: float,
    w_norm_sq_NO: Tensor,
    w_scale_NO: Tensor | None,
) -> Tensor | None:
    """The norms of several weights of one shape, (N, O), or None if W Aᵀ is not to be had as products of their own.

    Each weight costs one launch, its product; the terms of all are added up in one more.
    """
    count, outputs, rank = b_NOR.shape
    a_NRI, b_NOR = a_NRI.contiguous(), b_NOR.contiguous()
    parts, gram = _in_three(a_NRI), _times_gram(b_NOR, a_NRI)
    scales: Sequence[Tensor | None] = [None] * count if w_scale_NO is None else list(w_scale_NO)
    products = torch.empty(count, outputs, 3 * rank, dtype=torch.float32, device=a_NRI.device)
    for into, w, a3, w_scale in zip(products, ws, parts, scales, strict=True):
        product = _multiplied(w, a3, w_scale)
        if product is None:
            return None
        into.copy_(product)
    norm = norms_of_products(products.unflatten(2, (3, rank)), gram, b_NOR, scale, w_norm_sq_NO, w_scale_NO)
    if bool((norm < 0).any()):
        for w, a, b, w_scale, found in zip(ws, a_NRI, b_NOR, scales, norm, strict=True):
            _form_rows(w, a, b, w_scale, found, scale)
    return norm


def norms_of_products(
    products_NOPR: Tensor,
    gram: Tensor,
    b_NOR: Tensor,
    scale: float,
    w_norm_sq_NO: Tensor,
    w_scale_NO: Tensor | None,
) -> Tensor:
    """The norms, (N, O), from W Aᵀ as the sum of P products; −1 where the terms cancel.

    Args:
        products_NOPR: float32.
        gram: B (A Aᵀ), (N, O, R); or, of one weight, A Aᵀ as the sum of `_SHARES`, (shares, R, R).
        b_NOR: B, contiguous.
        scale: s.
        w_norm_sq_NO: ‖W‖² of each row.
        w_scale_NO: what the rows of the weight that was multiplied are to be multiplied by.
    """
    count, outputs, parts, rank = products_NOPR.shape
    norm = torch.empty(count, outputs, dtype=torch.float32, device=b_NOR.device)
    block = rank_block(rank)
    rows = max(1, 1024 // block)
    _dora_norm[(triton.cdiv(count * outputs, rows),)](
        norm, b_NOR, b_NOR, products_NOPR, b_NOR, gram, w_norm_sq_NO, w_scale_NO, norm,  # (W and A are not read)
        count * outputs, 1, rank, 1, 1, 1, rank, 1, scale,
        MULTIPLIED=True, PARTS=parts, QUANTIZED=w_scale_NO is not None, SPLIT=True,
        PRECISION=precision(torch.bfloat16), TRANSPOSED=False, CANCELLED=CANCELLED, FORM=False,
        SHARES=0 if gram.shape == b_NOR.shape else _SHARES, BO=rows, BI=16, BR=block, num_warps=4, num_stages=1,
    )  # fmt: skip
    return norm


def in_three_with_gram(a_NRI: Tensor, b_NOR: Tensor) -> tuple[Tensor, Tensor]:
    """Each A as the sum of three bfloat16 tensors, (N, 3, R, I), and the `gram` of `norms_of_products`."""
    if len(a_NRI) == 1 and (block := rank_block(a_NRI.shape[1])) <= _GRAMS:
        a3, gram = _split_with_gram(a_NRI[0], block)
        return a3[None], gram
    return _in_three(a_NRI), _times_gram(b_NOR, a_NRI)


def stack_norms(w_NOI: Tensor, a_NRI: Tensor, b_NOR: Tensor, scale: float, w_norm_sq_NO: Tensor) -> Tensor:
    """The norms of several bfloat16 weights that lie in one tensor, (N, O): one product, and nobody waits for it."""
    a_NRI, b_NOR = a_NRI.contiguous(), b_NOR.contiguous()
    a3, gram = _in_three(a_NRI).flatten(1, 2).mT, _times_gram(b_NOR, a_NRI)
    on_gpu = w_NOI.is_cuda
    products = torch.bmm(w_NOI, a3, out_dtype=torch.float32) if on_gpu else w_NOI.float() @ a3.float()
    products = products.unflatten(2, (3, a_NRI.shape[1]))
    norm = norms_of_products(products, gram, b_NOR, scale, w_norm_sq_NO.contiguous(), None)
    _form_rows(w_NOI, a_NRI, b_NOR, None, norm, scale)
    return norm


def _form_rows(w: Tensor, a: Tensor, b: Tensor, w_scale: Tensor | None, norm: Tensor, scale: float) -> None:
    """Put the norms of rows that are at −1 into `norm`, by forming them; of one weight, or of N in one tensor."""
    if w.dim() == 2:
        w, a, b = w[None], a[None], b[None]
    count, outputs, inputs = w.shape
    rank = a.shape[1]
    block = rank_block(rank)
    bo, bi, warps, stages = _TILES[min(block, 256)]
    _form_cancelled[(triton.cdiv(outputs, bo), count)](
        w, a, b, w_scale, norm, outputs, inputs, rank, w.stride(1), w.stride(2), a.stride(1), b.stride(1), b.stride(2),
        w.stride(0), a.stride(0), b.stride(0), scale,
        QUANTIZED=w_scale is not None, TRANSPOSED=_transposed(w[0]),
        BO=bo, BI=bi, BR=block, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _transposed(w: Tensor) -> bool:
    return w.stride(0) == 1 and w.stride(1) != 1


def _multiplied(w: Tensor, a3: Tensor, w_scale: Tensor | None) -> Tensor | None:
    """W with the three parts of A, (O, 3·R) float32, by cuBLAS; None where there is none."""
    if not w.is_cuda:
        return None
    # A float8 weight is exact in bfloat16, too; the copy is gone at once.
    return torch.mm(w if w_scale is None else widen(w), a3.flatten(0, 1).T, out_dtype=torch.float32)


@triton.jit
def _split(a, a3, R, I, a_row, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(a + r * a_row + i, mask=i < I, other=0.0).to(tl.float32)
    for part in tl.static_range(3):
        value = rest.to(tl.bfloat16)
        tl.store(a3 + ((r // R * 3 + part) * R + r % R) * I + i, value, mask=i < I)
        rest -= value.to(tl.float32)


@triton.jit
def _split_and_gram(a, a3, gram, R, I, SHARE, a_row, BI: tl.constexpr, BR: tl.constexpr):
    """A share of the features: A in three parts, and what it adds to A Aᵀ.

    In float32, not from the parts: tensor cores cut off what they add up, always downwards where all of it is positive.
    """
    r = tl.arange(0, BR)
    first = tl.program_id(0) * SHARE
    total = tl.zeros((BR, BR), tl.float32)
    for start in range(first, tl.minimum(first + SHARE, I), BI):
        i = start + tl.arange(0, BI)
        inside = (r[:, None] < R) & (i[None, :] < tl.minimum(first + SHARE, I))
        rest = tl.load(a + r[:, None] * a_row + i[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.dot(rest, tl.trans(rest), input_precision="ieee")
        high = rest.to(tl.bfloat16)
        rest -= high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        at = a3 + r[:, None] * I + i[None, :]
        tl.store(at, high, mask=inside)
        tl.store(at + R * I, middle, mask=inside)
        tl.store(at + 2 * R * I, low, mask=inside)
    square = (r[:, None] < R) & (r[None, :] < R)
    tl.store(gram + (tl.program_id(0) * R + r[:, None]) * R + r[None, :], total, mask=square)


def _split_with_gram(a: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """`_in_three` of one A, and A Aᵀ as the sum of `_SHARES`, (shares, R, R) float32: in one launch."""
    rank, inputs = a.shape
    a3 = torch.empty(3, rank, inputs, dtype=torch.bfloat16, device=a.device)
    gram = torch.empty(_SHARES, rank, rank, dtype=torch.float32, device=a.device)
    share = triton.cdiv(triton.cdiv(inputs, _SHARES), 128) * 128
    _split_and_gram[(_SHARES,)](
        a, a3, gram, rank, inputs, share, a.stride(0), BI=128, BR=block, num_warps=4,
    )  # fmt: skip
    return a3, gram


def _times_gram(b: Tensor, a: Tensor) -> Tensor:
    """B (A Aᵀ), (…, O, R) float32."""
    wide = a.float()
    return b.float() @ (wide @ wide.mT)


def _in_three(a: Tensor) -> Tensor:
    """A as the sum of three bfloat16 tensors, (3, R, I); of several A (N, R, I) each, (N, 3, R, I)."""
    *several, rank, inputs = a.shape
    rows = a.flatten(0, -2)
    a3 = torch.empty(*several, 3, rank, inputs, dtype=torch.bfloat16, device=a.device)
    _split[(rows.shape[0], triton.cdiv(inputs, 1024))](rows, a3, rank, inputs, rows.stride(0), BLOCK=1024, num_warps=4)
    return a3
