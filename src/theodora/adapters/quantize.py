"""A frozen base in float8, for training adapters on it: `--base-dtype fp8`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from theodora.adapters.state import Model, find_state
from theodora.adapters.targets import frozen_linear
from theodora.errors import ConfigError
from theodora.files.fingerprint import fingerprint_of_rows, weight_fingerprint
from theodora.kernels.experts_weight import ExpertsWeight
from theodora.kernels.library_weight import LibraryWeight
from theodora.layers import base_weight
from theodora.layers.float8 import Float8Layer, quantize
from theodora.layers.kinds import is_conv1d

_MULTIPLE = 16  # the GPU's float8 products take sizes that are multiples of this
_FINGERPRINT = "_theodora_fingerprint"


def quantize_base(model: Model, dtype: str = "fp8", *, exclude: tuple[str, ...] = ()) -> Model:
    """Put the frozen weights of the linear layers into float8, in place: half the memory, and float8 products.

    Each output row of a weight is stored as float8_e4m3fn with one float32 scale, and each token's input is quantised
    as it comes. GPUs from compute capability 8.9 on (Hopper, Ada) multiply float8 at up to twice the speed of bfloat16;
    anywhere else the same numbers are computed from widened copies, slower. The embeddings, the output head, layers
    whose sizes are no multiples of 16, and weights that two modules share stay as they are. Adapters put on the model
    afterwards stay in their own dtype, and DoRA's magnitudes start at the norms of the quantised weights.

    An adapter trained so belongs to the original base model: it is saved as always, and loads onto either. As with
    QLoRA, `theodora merge` adds it to the original weights, on which it acts very nearly as it did in training;
    `merge_adapter` in memory adds it to the quantised ones, widened, and says so.

    Example:
        `model = inject_adapter(quantize_base(model), AdapterConfig(rank=16))`

    Args:
        model: a model without adapters, in float32, bfloat16 or float16, on any device.
        dtype: fp8, the only one there is.
        exclude: names of modules to leave alone with all that is in them, such as those that will be trained in full.

    Returns:
        The same model.

    Raises:
        ConfigError: an unknown dtype, a model with adapters, or one without a layer to quantise; nothing was changed.
    """
    if dtype != "fp8":
        raise ConfigError(f"dtype is {dtype!r}; expected fp8")
    if find_state(model) is not None or any(type(m).__module__.startswith("peft.") for m in model.modules()):
        raise ConfigError(
            "The model carries an adapter, which was made for its weights as they are: quantise it first."
        )
    paths = _quantizable(model, exclude)
    if not paths and not any(isinstance(module, Float8Layer) for module in model.modules()):
        raise ConfigError(
            f"A {type(model).__name__} holds no linear layer that can be put into float8: expected some beside the "
            f"output head, in a floating point dtype, whose sizes are multiples of {_MULTIPLE}."
        )
    for path in paths:
        module = model.get_submodule(path)
        fingerprint = weight_fingerprint(base_weight(module).dense())
        quantize(module, stored_transposed=is_conv1d(module))
        setattr(module, _FINGERPRINT, fingerprint)
    return model


def module_fingerprint(module: nn.Module) -> list[float]:
    """`weight_fingerprint` of the base weight; of the original one, if it was put into float8 since."""
    original = module.__dict__.get(_FINGERPRINT)
    if original is not None:
        return original
    weight = base_weight(module)
    if isinstance(weight, ExpertsWeight):
        experts, outputs, inputs = weight.shape
        dense = weight.dense()
        return fingerprint_of_rows((experts * outputs, inputs), lambda at: dense[at // outputs, at % outputs])
    if isinstance(weight, LibraryWeight) and weight.format.cuts:  # a few rows instead of the whole matrix
        return fingerprint_of_rows(weight.shape, weight.rows)
    return weight_fingerprint(weight.dense())


def _quantizable(model: nn.Module, exclude: tuple[str, ...]) -> list[str]:
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    modules: dict[str, Any] = {path: model.get_submodule(path) for path in frozen_linear(model, exclude)}
    return [
        path
        for path, module in modules.items()
        if not isinstance(module, Float8Layer)
        and uses[id(module.weight)] == 1
        and not any(size % _MULTIPLE for size in module.weight.shape)
    ]
