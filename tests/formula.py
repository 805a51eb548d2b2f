"""The papers' formulas in float64, written out once more, naively: what every fast way is held against."""

import torch

from theodora.kernels.operators import interpreted

F64 = torch.float64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where kernels are tested: on a GPU, under Triton's interpreter (TRITON_INTERPRET=1), or else their reference."""


def dora(x, w, bias, a, b, scale, m, x_lora=None):
    """m ⊙ (W + s·B·A)/‖W + s·B·A‖ applied to x; the norm a constant; rows without direction act as LoRA."""
    adapted = w + scale * b @ a
    norm = adapted.detach().norm(dim=1)
    g = torch.where(norm == 0, torch.ones_like(m), m / torch.where(norm == 0, torch.ones_like(norm), norm))
    low = x if x_lora is None else x_lora
    y = g * (x @ w.T + scale * (low @ a.T) @ b.T)
    return y if bias is None else y + bias


def lora(x, w, bias, a, b, scale, x_lora=None):
    """(W + s·B·A) applied to x."""
    low = x if x_lora is None else x_lora
    y = x @ w.T + scale * (low @ a.T) @ b.T
    return y if bias is None else y + bias


def error(found, exact):
    """‖found − exact‖ / ‖exact‖ in float64; absolute where the exact value is zero."""
    exact = exact.detach()
    difference = (found.detach().to(F64) - exact).norm()
    return float(difference / exact.norm()) if exact.norm() > 0 else float(difference)


def budget(dtype):
    """What a kernel's error may be of the reference's; Triton's interpreter cuts bfloat16 off where a GPU rounds."""
    return 5 if dtype == torch.bfloat16 and interpreted() and DEVICE == "cpu" else 2


def within_budget(found, plain, exact, dtype):
    """Whether the error of `found` is at most twice that of the reference, `plain`, plus rounding; of equal kind."""
    assert found.shape == plain.shape == exact.shape
    assert found.dtype == plain.dtype or not found.numel()
    allowed = budget(dtype) * (error(plain, exact) + torch.finfo(dtype).eps / 2)
    return error(found, exact) <= allowed + 1e-6  # sums of a few float32 numbers that all but cancel
