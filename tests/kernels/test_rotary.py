"""Rotary embeddings: against the rotation by complex numbers in float64, forward and backward, in any layout."""

import pytest
import torch

from formula import DEVICE, error
from registered import opcheck
from theodora.kernels import rotary


def angles(batch, tokens, features, dtype):
    """cos and sin, which some models scale."""
    phase = 3 * torch.randn(batch, tokens, features // 2, device=DEVICE).repeat(1, 1, 2)
    return (1.2 * phase.cos()).to(dtype), (1.2 * phase.sin()).to(dtype)


def exact(x, cos, sin):
    """(x₁ + i·x₂)·(cos + i·sin), in float64."""
    half = x.shape[-1] // 2
    angle = torch.complex(cos[:, None, :, :half].double(), sin[:, None, :, :half].double())
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * angle
    return torch.cat((turned.real, turned.imag), -1)


def laid_out(x, layout):
    if layout == "tokens first":  # as q_proj leaves it
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "features first":
        return x.transpose(1, 3).contiguous().transpose(1, 3)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["tokens first", "heads first", "features first"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 16), (1, 1, 1, 2), (3, 5, 7, 80)], ids=str)
@pytest.mark.parametrize("one_for_all", [False, True])
def test_agrees_with_complex_numbers(shape, layout, one_for_all, dtype):
    x = laid_out(torch.randn(shape, device=DEVICE).to(dtype), layout)
    dy = laid_out(torch.randn(shape, device=DEVICE).to(dtype), "heads first")
    cos, sin = angles(1 if one_for_all else shape[0], shape[2], shape[3], dtype)
    x.requires_grad_()
    y = rotary.rotate(x, cos, sin)
    y.backward(dy)
    wanted = exact(x.detach(), cos, sin)
    assert y.stride() == x.stride()
    assert error(y, wanted) < torch.finfo(dtype).eps
    assert error(x.grad, exact(dy, cos, -sin)) < torch.finfo(dtype).eps


def test_halves_that_differ():
    """Some models give each half of a head angles of its own; then it is no rotation, and the gradient shows it."""
    x = torch.randn(2, 3, 5, 8, device=DEVICE, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(2, 2, 5, 8, device=DEVICE, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: rotary.rotate(x, cos, sin), x)
    found = rotary.rotate(x.float(), cos.float(), sin.float())
    assert error(found, rotary.rotate_reference(x, cos, sin)) < 1e-6


def test_the_operator_keeps_its_word():
    x, angle = torch.randn(2, 3, 5, 8, device=DEVICE), torch.randn(1, 5, 8, device=DEVICE)
    for back in (False, True):
        opcheck(torch.ops.theodora.turn, (x, angle, angle, back))
