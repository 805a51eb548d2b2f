"""The papers' formulas in float64, written out once more, naively: what every fast way is held against."""

import torch

from theodora import kernels
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


def goes_around(weight, exact, a, b, rounding):
    """A frozen weight in one autograd step of DoRA, beside a second layer of the same x: outputs and all gradients."""
    m = (exact + 0.5 * b.double() @ a.double()).norm(dim=1).float()
    norm = weight.dora_norm(a, b, 0.5, weight.norm_squared())
    outputs, inputs = exact.shape
    x, dy = torch.randn(5, inputs, device=a.device), torch.randn(5, outputs, device=a.device)
    x, a, b, m = leaves = [t.clone().requires_grad_() for t in (x, a, b, 1.1 * m)]
    y, z = kernels.adapted_linears(x, [kernels.Parts(weight, None, a, b, 0.5, m, norm), kernels.Parts(weight, None)])
    (y * dy + z).sum().backward()
    x64, a64, b64, m64 = (t.detach().double().requires_grad_() for t in leaves)
    y64 = dora(x64, exact, None, a64, b64, 0.5, m64)
    (y64 * dy + x64 @ exact.T).sum().backward()
    found, wanted = [y, *(t.grad for t in leaves)], [y64, *(t.grad for t in (x64, a64, b64, m64))]
    return max(error(one, other) for one, other in zip(found, wanted, strict=True)) < rounding
