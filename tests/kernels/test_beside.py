"""Factors of several layers beside one another, against what puts them there one by one."""

import pytest
import torch

from formula import DEVICE
from registered import opcheck
from theodora.kernels.beside import stacked_rows, times_scaled_b


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(4,), (5, 16), (3, 1, 7), (2, 2, 2, 2)])
def test_rows(ranks, dtype):
    all_a = [normal(rank, 1100) for rank in ranks]
    all_a[0] = all_a[0].T.contiguous().T
    room = torch.full((sum(ranks) + 3, 1101), float("nan"), device=DEVICE, dtype=dtype)
    found, expected = stacked_rows(all_a, room[:, :1100]), torch.cat([*all_a, torch.zeros(3, 1100, device=DEVICE)])
    # Triton's interpreter cuts off where a GPU rounds.
    torch.testing.assert_close(found.float(), expected, rtol=0 if dtype == torch.float32 else 2**-7, atol=0)
    assert bool(room[:, 1100].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(4,), (5, 16), (3, 1, 7), (2, 2, 2, 2)])
def test_products(ranks, dtype):
    outputs, scales = [70, 9, 33, 16][: len(ranks)], [0.5, 2.0, 1.0, 3.0][: len(ranks)]
    all_b = [normal(o, rank) for o, rank in zip(outputs, ranks, strict=True)]
    all_b[-1] = all_b[-1].T.contiguous().T
    room = torch.full((21, sum(outputs) + sum(ranks) + 2), float("nan"), device=DEVICE, dtype=dtype)
    dz, into = room.split([sum(outputs), sum(ranks) + 2], dim=1)
    dz.copy_(normal(21, sum(outputs)))
    times_scaled_b(dz, all_b, scales, into)
    dzs = dz.split(outputs, dim=1)
    each = [d @ (b * s).to(dtype) for d, b, s in zip(dzs, all_b, scales, strict=True)]
    expected = torch.cat([*each, torch.zeros(21, 2, device=DEVICE, dtype=dtype)], dim=1)
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (0.02, 0.1)
    torch.testing.assert_close(into, expected, rtol=rtol, atol=atol)


def test_the_operators_keep_their_word():
    a, b = normal(3, 8), normal(8, 3)
    opcheck(torch.ops.theodora.stacked_rows, (normal(7, 8), [a, a]))
    opcheck(torch.ops.theodora.diagonal, (normal(16, 8), [b, b], [0.5, 2.0]))
