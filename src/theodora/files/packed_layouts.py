"""GPTQ, AWQ and compressed-tensors in a model folder: which tensors are one weight, whether they fit, what they mean.

    X.qweight, X.qzeros, X.scales, X.g_idx                         GPTQ; AWQ without g_idx
    X.weight_packed, X.weight_scale, X.weight_shape, …             compressed-tensors, whole numbers in int32
    X.weight, X.weight_scale, …                                    compressed-tensors, 8 bits

What dequantises them in training does so here (`kernels/packed_formats.py`), so that the numbers are the same.

Shapes: O out features, I in features, G groups of in features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from theodora.errors import CheckpointError, bullet_list, shown
from theodora.files.folder import OpenFile
from theodora.files.safetensors import Described, read_header, read_tensor
from theodora.kernels.packed_formats import Awq, Compressed, Gptq, unpacked
from theodora.kernels.packed_sizes import WORD, Parts, why_groups_beyond, why_not_awq, why_not_compressed, why_not_gptq

LAYOUTS = ("gptq", "awq", "compressed-tensors")
"""The methods that are read here."""
_QWEIGHT = re.compile(r"\.(qweight|qzeros|scales|g_idx)$")
_COMPRESSED = re.compile(
    r"\.(weight_packed|weight_scale|weight_zero_point|weight_shape|weight_g_idx|weight_global_scale|input_scale"
    r"|input_zero_point|input_global_scale)$"
)
PART = {"gptq": _QWEIGHT, "awq": _QWEIGHT, "compressed-tensors": _COMPRESSED}
"""What is left of a key behind the path of its module, where it is a part of a quantised weight."""
VALUES = ("g_idx", "weight_g_idx", "weight_shape")
"""Parts whose numbers are looked at, not their sizes alone."""
AWQ_FUNCTIONS = "gptqmodel.quantization.awq.utils.packing_utils"
_TOLD = 5
_GPTQ_BITS = (2, 3, 4, 8)
_COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def why_other_layout(method: str | None, config: Mapping[str, Any]) -> str | None:
    """What of a `quantization_config` says that its tensors lie otherwise than is read here: part of a sentence."""
    told = _told_format(method, config)
    if method == "gptq":
        if told not in ("gptq", "gptq_v2"):
            return f"its format is {shown(told)}; expected gptq or gptq_v2"
        if config.get("bits") not in _GPTQ_BITS or config.get("dynamic"):
            return f"bits is {shown(config.get('bits'))}; expected one of 2, 3, 4 and 8, the same in all layers"
        if config.get("pack_dtype") not in (None, "int32"):
            return f"pack_dtype is {shown(config.get('pack_dtype'))}; expected int32"
    elif method == "awq" and (told != "gemm" or config.get("bits", 4) != 4):
        return f"its format is {shown(told)}, bits {shown(config.get('bits', 4))}; expected gemm, 4"
    elif method == "compressed-tensors":
        others = sorted({str(each) for _, each in _schemes(config)} - {*_COMPRESSED_FORMATS})
        if others or not _schemes(config):
            return f"its format is {', '.join(others) or shown(told)}; expected one of {', '.join(_COMPRESSED_FORMATS)}"
    return None


def why_parts_unfit(
    method: str, config: Mapping[str, Any], parts: Parts, values: Mapping[str, Tensor], shape: tuple[int, int] | None
) -> str | None:
    """Why the parts of one weight do not fit each other, or its shape: part of a sentence.

    Args:
        method: one of `LAYOUTS`, of which `why_other_layout` has nothing to say.
        config: the `quantization_config`.
        parts: name -> tensor, or its sizes.
        values: those of `VALUES`.
        shape: (O, I) as the model has them, if known.
    """
    if method == "compressed-tensors":
        return _why_not_compressed(config, parts, values, shape)
    group = _group(config)
    if method == "awq":
        return why_not_awq(parts, 4, group, shape)
    told = why_not_gptq(parts, config["bits"], group, shape)
    return told or why_groups_beyond(values["g_idx"], parts["scales"].shape[0])


def check_layout_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """See that the packed weights of a folder are whole, by the headers of its files, before a library reads them.

    Args:
        folder: of the model.
        config: its `quantization_config`, of one of `LAYOUTS`.

    Raises:
        CheckpointError: they are not; the first few are named.
    """
    method = str(config.get("quant_method"))
    if why_other_layout(method, config) is not None:
        return  # nothing is known here of how its tensors lie
    found: dict[str, dict[str, Described]] = {}
    values: dict[str, dict[str, Tensor]] = {}
    for path in sorted(path for path in folder.glob("*.safetensors") if path.is_file()):
        with suppress(OSError, ValueError, CheckpointError), OpenFile.at(path) as file:  # whoever loads it says so
            header = read_header(file)
            for key, described in header.tensors.items():
                module, _, name = key.rpartition(".")
                found.setdefault(module, {})[name] = described
                if name in VALUES and PART[method].search(key):
                    values.setdefault(module, {})[name] = read_tensor(file, header, described)
    own = {name for parts in found.values() for name in parts if PART[method].search(f".{name}")}
    packed = {module: parts for module, parts in found.items() if _is_one(method, own & parts.keys())}
    problems = {
        module: why_parts_unfit(method, config, parts, values.get(module, {}), None) for module, parts in packed.items()
    }
    if told := [f"{module}: {problem}" for module, problem in problems.items() if problem is not None]:
        raise CheckpointError(f"{folder} holds packed weights that are not whole:" + bullet_list(told, _TOLD))


def _is_one(method: str, names: set[str]) -> bool:
    """Whether the parts of a module are a weight's: `scales` alone are those of an activation, in AWQ."""
    if method == "compressed-tensors":
        return any(name.startswith("weight_") for name in names)
    return bool(names - {"scales"})


def dense_weight(
    method: str,
    config: Mapping[str, Any],
    parts: Mapping[str, Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    scheme: Any,
) -> Tensor:
    """The numbers (O, I), in `dtype`, that products are computed with in a model of that dtype.

    Args:
        method: one of `LAYOUTS`.
        config: the `quantization_config`.
        parts: of the weight, which fit.
        shape: (O, I).
        dtype: the model's.
        scheme: what compressed-tensors has put on the module.
    """
    if method == "gptq":
        bits = config["bits"]
        zeros = parts["qzeros"]
        if _told_format(method, config) == "gptq":
            zeros = _second_version(zeros, bits, shape[0])
        form = Gptq(shape, dtype, bits=bits, pack=WORD)
        return form.dense((parts["qweight"], zeros, parts["scales"], parts["g_idx"]), dtype)
    if method == "awq":
        half = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16
        group = _group(config)
        form = Awq(shape, half, bits=4, group=shape[1] if group <= 0 else group, half=True)
        return form.dense((parts["qweight"], parts["qzeros"], parts["scales"]), dtype)
    if scheme is None or scheme.weights is None:
        raise ValueError("its quantization_config names no scheme for this layer")
    if scheme.output_activations is not None:
        raise ValueError("its scheme quantises what comes out of the layer, which no weight can stand for")
    kind = str(getattr(scheme.format, "value", scheme.format))
    names = tuple(name for name in parts if name != "weight_shape")
    return Compressed(shape, dtype, names, scheme, kind).dense(tuple(parts[name] for name in names), dtype)


def _group(config: Mapping[str, Any]) -> int:
    told = config.get("group_size")
    return 128 if told is None else int(told)  # as transformers and optimum


def _told_format(method: str | None, config: Mapping[str, Any]) -> Any:
    """By any of the names that transformers takes it by."""
    names, default = (("version", "format"), "gemm") if method == "awq" else (("checkpoint_format", "format"), "gptq")
    told = next((config[name] for name in names if config.get(name) is not None), default)
    return told.lower() if isinstance(told, str) else told


def _second_version(qzeros_GP: Tensor, bits: int, outputs: int) -> Tensor:
    """Zeros that are stored less one, as the library takes them: by whole words, where numbers do not go across."""
    if WORD % bits == 0:
        one = sum(1 << at for at in range(0, WORD, bits))
        return qzeros_GP + one
    codes = (unpacked(qzeros_GP.T, bits, WORD, outputs) + 1) & (2**bits - 1)  # (O, G)
    stream = (codes[:, None] >> torch.arange(bits)[:, None]) & 1  # (O, bits, G)
    words = stream.flatten(0, 1).unflatten(0, (-1, WORD))
    return (words << torch.arange(WORD)[:, None]).sum(1).to(torch.int32).T.contiguous()


def _schemes(config: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Any]]:
    """How compressed-tensors stores weights: a group's `weights`, and its format."""
    groups = config.get("config_groups")
    found = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    return [
        (group["weights"], group.get("format") or config.get("format"))
        for group in found
        if isinstance(group.get("weights"), Mapping)
    ]


def _why_not_compressed(
    config: Mapping[str, Any], parts: Parts, values: Mapping[str, Tensor], shape: tuple[int, int] | None
) -> str | None:
    if "weight_shape" in values:
        told = values["weight_shape"]
        if told.numel() != 2 or told.is_floating_point() or (shape is not None and tuple(told.tolist()) != shape):
            return f"its weight_shape is {told.flatten()[:8].tolist()}; expected (out, in) {shape or ''}".rstrip()
        shape = (int(told[0]), int(told[1]))
    if shape is None and "weight" in parts and len(parts["weight"].shape) == 2:
        shape = (parts["weight"].shape[0], parts["weight"].shape[1])
    if shape is None or min(shape) < 1 or math.prod(shape) >= 2**62:
        return f"nothing says which shape it has (weight_shape: {shape})"
    # Which group a layer is of the library knows alone: one that fits is enough.
    problems = [_why_unlike(weights, parts, shape) for weights, _ in _schemes(config)]
    if (told := next(iter(problems), None)) is not None and None not in problems:
        return told
    if "weight_g_idx" in values and "weight_scale" in parts:
        return why_groups_beyond(values["weight_g_idx"], parts["weight_scale"].shape[-1])
    return None


def _why_unlike(weights: Mapping[str, Any], parts: Parts, shape: tuple[int, int]) -> str | None:
    scales: Sequence[int]
    group, strategy = weights.get("group_size") or 0, weights.get("strategy")
    strategy = strategy or ("group" if group > 0 else "channel" if group < 0 else "tensor")
    if strategy == "block":
        scales = weights.get("block_structure") or ()
    else:
        scales = {"tensor": (0, 0), "channel": (1, 0), "group": (1, group)}.get(str(strategy), ())
    if len(scales) != 2 or not all(isinstance(each, int) for each in scales):
        return f"its strategy is {shown(strategy)}; expected tensor, channel, group or block"
    return why_not_compressed(
        parts, int(weights.get("num_bits") or 8), scales, weights.get("symmetric") is not False, shape
    )
