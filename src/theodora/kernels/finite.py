"""Keys and values stay finite: what one token's would do to others in a shared batch is taken away before it is read.

Attention tells the requests of a batch apart by adding a large negative number to the scores of others' keys, and by
weights of zero for others' values. Neither helps against a key that makes a score infinite, or against 0 · NaN. So a
token whose keys or values are not finite, or so large that a product with them might not be, gets zeros in their place,
and is marked: what its own request says from there on means nothing. All other numbers stay as they are, bit for bit.

Shapes: T tokens, H heads, D features of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from theodora.kernels.operators import interpreted, runs_triton

_MOST = 2.0**96
"""Keys that are larger could make a score infinite where float32 sums it up: it holds their product with 2³¹."""


def keep_finite(key_1HTD: Tensor, value_1HTD: Tensor, ruined_T: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with zeros for the tokens whose own are no finite numbers of usual size.

    On a GPU nothing waits for the host. The tensors given may be overwritten.

    Args:
        key_1HTD: keys of all tokens, of any strides.
        value_1HTD: values, of which a head may have another number of features.
        ruined_T: int32, for at least as many tokens; 1 is written for those that got zeros, and nothing for the others.
    """
    most = bound(key_1HTD.dtype)
    if key_1HTD.device.type == "cpu" and not interpreted():
        # To look is cheap here, and there is nearly always nothing to do.
        if _within(key_1HTD, most) and _within(value_1HTD, most):
            return key_1HTD, value_1HTD
    elif runs_triton(key_1HTD):
        from theodora.kernels.triton.finite import keep_finite as triton

        triton(key_1HTD, value_1HTD, ruined_T, most)
        return key_1HTD, value_1HTD
    return keep_finite_reference(key_1HTD, value_1HTD, ruined_T)


def keep_finite_reference(key_1HTD: Tensor, value_1HTD: Tensor, ruined_T: Tensor) -> tuple[Tensor, Tensor]:
    """`keep_finite` in plain torch, which leaves the tensors given alone."""
    most = bound(key_1HTD.dtype)
    # NaN is not less than anything.
    fine_T = torch.stack([(each.abs() <= most).all(-1).all(1)[0] for each in (key_1HTD, value_1HTD)]).all(0)
    ruined_T[: fine_T.shape[0]].masked_fill_(~fine_T, 1)
    keep = fine_T[:, None]
    return torch.where(keep, key_1HTD, 0), torch.where(keep, value_1HTD, 0)


def bound(dtype: torch.dtype) -> float:
    """The largest size that a key or value may have."""
    return min(_MOST, torch.finfo(dtype).max)


def _within(tensor: Tensor, most: float) -> bool:
    low, high = torch.aminmax(tensor)
    return -most <= float(low) and float(high) <= most  # False for NaN, which aminmax gives if there is any
