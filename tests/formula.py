"""The papers' formulas in float64, written out once more, naively: what every fast way is held against."""

import torch

F64 = torch.float64


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
