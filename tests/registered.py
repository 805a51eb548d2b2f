"""Whether operators are what they were registered as: `from registered import opcheck`."""

from typing import Any

import torch

from theodora.kernels.operators import interpreted

# What a kernel writes and gives. How the operator is traced and differentiated is the same whatever computes it, and is
# checked where the reference does.
_OF_KERNELS = ("test_schema", "test_faketensor")


def opcheck(operator: Any, arguments: tuple[Any, ...]) -> None:
    """`torch.library.opcheck`, and under Triton's interpreter what depends on the kernel of it."""
    if interpreted():
        torch.library.opcheck(operator, arguments, test_utils=_OF_KERNELS)
    else:
        torch.library.opcheck(operator, arguments)
