"""Bases that other libraries quantise: a specimen whose linear layers are theirs, on the CPU as on a GPU.

The layers of each library are its own, made of the specimen's weights by its own functions. Conv1D, embeddings and the
tied head stay as they are, and so does what a library cannot take.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from theodora.layers.libraries import prepare

LIBRARIES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "hqq": "hqq"}
"""Name of a dtype → the package that stores numbers so."""
_GROUP = 16
"""HQQ's, of the specimen's in features; 13 are left alone."""


def installed(dtype: str) -> bool:
    """Whether what stores numbers so is there."""
    return dtype not in LIBRARIES or find_spec(LIBRARIES[dtype]) is not None


def quantise(model: nn.Module, dtype: str, kinds: tuple[str, ...]) -> None:
    """Put the library's layers in place of the linear layers among `kinds`; what they compute in stays."""
    make = {"nf4": _nf4, "int8": _int8, "hqq": _hqq}[dtype]
    for kind in kinds:
        layer = getattr(model, kind)
        if type(layer) is nn.Linear and kind != "tied_head" and not (dtype == "hqq" and layer.in_features % _GROUP):
            setattr(model, kind, make(layer).requires_grad_(False).eval())
    prepare(model)
    if dtype in ("nf4", "int8"):  # as transformers says of models that it loads so, and PEFT chooses its layers by
        setattr(model, "is_loaded_in_4bit" if dtype == "nf4" else "is_loaded_in_8bit", True)


def _nf4(layer: Any) -> nn.Module:
    library: Any = import_module("bitsandbytes").nn
    dtype, device = layer.weight.dtype, layer.weight.device
    made = library.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, dtype, compress_statistics=True, quant_type="nf4"
    )
    made.load_state_dict(layer.state_dict())
    return made.to(dtype).to(device)


def _int8(layer: Any) -> nn.Module:
    library: Any = import_module("bitsandbytes").nn
    dtype, device = layer.weight.dtype, layer.weight.device
    bias = layer.bias is not None
    made = library.Linear8bitLt(layer.in_features, layer.out_features, bias, has_fp16_weights=False, threshold=6.0)
    made.weight = library.Int8Params(layer.weight.data.half(), requires_grad=False, has_fp16_weights=False)
    if bias:
        made.bias = nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    return made.to(device)


def _hqq(layer: nn.Linear) -> nn.Module:
    library: Any = import_module("hqq.core.quantize")
    config = library.BaseQuantizeConfig(nbits=4, group_size=_GROUP)
    dtype, device = layer.weight.dtype, layer.weight.device
    with torch.no_grad():
        return library.HQQLinear(layer, config, compute_dtype=dtype, device=str(device))
