"""How a module stores its base weight: the one file that recognises it.

A new kind of weight is a class in `theodora.kernels.base_weight` and a line in `weight_in`; `base_weight_of` says what
else a module must be for its weight to be one.

Shapes: O out features, I in features; of a convolution I is all that one output reads, (I / groups · k …).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from theodora.errors import ConfigError
from theodora.kernels.base_weight import BaseWeight, Float8Weight, PlainWeight
from theodora.kernels.conv_weight import ConvWeight
from theodora.kernels.float8 import FLOAT8
from theodora.kernels.operators import is_on_paper
from theodora.kernels.sharded_weight import managed, managed_weight
from theodora.layers import libraries
from theodora.layers.float8 import Float8Layer
from theodora.layers.kinds import is_conv1d, is_convolution, is_embedding, is_linear

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes of a plain weight."""
CONVOLUTION = nn.modules.conv._ConvNd  # pyright: ignore[reportPrivateUsage]


@dataclass(frozen=True, slots=True)
class Unfit:
    """A module without a base weight that an adapter can stand beside."""

    reason: str
    """Part of a sentence: "its weight is not loaded yet …"."""


def base_weight_of(module: nn.Module) -> BaseWeight | Unfit:
    """The weight that the module's forward multiplies by, or why there is none for an adapter.

    Args:
        module: a linear layer, `Conv1D`, embedding or convolution, as it came, quantised by us, or adapted; any other
            is unfit.
    """
    transposed = stored_transposed(module)
    if transposed is None:
        return Unfit(f"{type(module).__name__} is no linear layer, embedding or convolution")
    weight: Any = libraries.held_weight(module)
    if is_float8(module, weight):
        return weight_in(module, weight, transposed)
    if (reason := libraries.why_unfit(module, weight)) is not None:
        return Unfit(reason)
    library = libraries.library_weight(module, weight) if isinstance(weight, Tensor) else None
    if library is not None and transposed:
        return Unfit(f"its weight is quantised ({library.format.name}), which is read in linear layers alone")
    if library is not None and (is_on_paper() or not library.tensors()[0].is_meta):
        return library
    if not isinstance(weight, Tensor) or type(weight.data) is not Tensor or weight.dtype not in FLOATS:
        dtype = getattr(weight, "dtype", "no dtype")
        return Unfit(f"its weight is quantised or special ({type(weight).__name__}, {dtype})")
    if weight.is_meta and not is_on_paper():
        return Unfit("its weight is not loaded yet (it is on the meta device)")
    if isinstance(module, CONVOLUTION) and module.__dict__["_parameters"].get("weight") is None:
        return Unfit(
            "its weight is made anew in each pass, of parameters by another name (by weight_norm, say): make it a "
            "plain one first (torch.nn.utils.parametrize.remove_parametrizations, or torch.nn.utils.remove_weight_norm)"
        )
    if getattr(module, "max_norm", None) is not None:
        return Unfit(f"{type(module).__name__} with max_norm rescales its weight while it is used")
    return weight_in(module, weight, transposed)


def weight_in(module: nn.Module, tensor: Tensor, transposed: bool) -> BaseWeight:
    """`tensor`, which is or was the module's weight (O, I), or (I, O) if `transposed`: for a module known to have one.

    Unlike `base_weight_of` it checks nothing, as it runs in each pass.
    """
    if is_float8(module, tensor):
        return Float8Weight(tensor, module.weight_scale, module.plain_dtype, transposed)  # pyright: ignore[reportArgumentType]
    if isinstance(module, CONVOLUTION):
        return _of_convolution(module, tensor)
    if managed(module) and (weight := managed_weight(module, tensor, transposed, libraries.library_weight)) is not None:
        return weight
    return libraries.library_weight(module, tensor) or PlainWeight(tensor, transposed)


def _of_convolution(module: nn.Module, tensor: Tensor) -> ConvWeight:
    if managed(module):
        raise ConfigError(
            f"fully_shard has sharded an adapted {type(module).__name__}, which is not supported for convolutions: "
            "leave its parameters out of the sharding (ignored_params)"
        )
    return ConvWeight(tensor)


def stored_transposed(module: nn.Module) -> bool | None:
    """Whether the module stores its weight as (I, O); None if it has no weight to stand beside."""
    own = getattr(module, "stored_transposed", None)  # an adapter layer's, or a float8 layer's
    if own is not None:
        return own
    if is_linear(module) or is_convolution(module):
        return False
    return True if is_conv1d(module) or is_embedding(module) else None


def filter_shape(module: nn.Module) -> tuple[int, ...] | None:
    """(C / groups, k, …) of a convolution: a row of its weight as the module stores it. None for any other module."""
    own: Any = module
    return (own.in_channels // own.groups, *own.kernel_size) if isinstance(module, CONVOLUTION) else None


def is_float8(module: nn.Module, tensor: Any) -> bool:
    """Whether `tensor`, the module's weight, is float8 with a scale for each row; what is merged into one is plain."""
    return isinstance(module, Float8Layer) and tensor.dtype == FLOAT8
