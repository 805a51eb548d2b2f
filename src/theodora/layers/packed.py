"""Linear layers of HQQ, gptqmodel (GPTQ, AWQ), compressed-tensors and transformers' fine-grained FP8; and others' that
cannot be trained on: the second half of `libraries.py`, through which all others ask.

A module is known by the names of its classes, so that no library is imported; how it runs must be that class's own.

| library | module | weight |
|---|---|---|
| hqq | `HQQLinear` | `W_q`, and the numbers in its `meta` |
| gptqmodel | GPTQ: `TorchLinear`, `TritonV2Linear`, `TorchAtenLinear` | `qweight`, `qzeros`, `scales`, `g_idx` |
| | AWQ: `AwqTorchLinear`, `AwqGEMMLinear`, `AwqGEMMTritonLinear`, `TorchAtenAwqLinear` | without `g_idx` |
| compressed-tensors | `nn.Linear` with a `quantization_scheme` | `weight_packed`, or `weight` of 8 bits; scales |
| transformers | `FP8Linear` | `weight` of float8, `weight_scale_inv` |

Shapes: O out features, I in features.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from theodora.kernels.library_weight import LibraryWeight
from theodora.kernels.packed_formats import Awq, BlockFloat8, Compressed, Gptq, Hqq, kernel_for_float8

DTYPE = "_theodora_dtype"
"""Where a module that has forgotten it notes the dtype of the model around it."""
_ASIDE = "_theodora_compressed"
"""Where an adapted module keeps what compressed-tensors has put on it."""
_FORWARD = "_theodora_forward"
"""Where a module that is no longer adapted keeps its forward until it is used."""
_QLINEAR = "gptqmodel.nn_modules.qlinear."
_HALF = (torch.float16, torch.bfloat16)

_Class = tuple[str, str]
"""A class: the beginning of its module's name, and its own."""
_HQQ: tuple[_Class, ...] = (("hqq.", "HQQLinear"),)
_GPTQ: tuple[_Class, ...] = ((_QLINEAR, "TorchLinear"), (_QLINEAR, "TritonV2Linear"), (_QLINEAR, "TorchAtenLinear"))
_AWQ: tuple[_Class, ...] = (
    (_QLINEAR, "AwqTorchLinear"),
    (_QLINEAR, "AwqGEMMLinear"),
    (_QLINEAR, "AwqGEMMTritonLinear"),
    (_QLINEAR, "TorchAtenAwqLinear"),
)
_FLOAT8: tuple[_Class, ...] = (("transformers.integrations.finegrained_fp8", "FP8Linear"),)


def packed_tensor(module: nn.Module) -> Tensor | None:
    """The packed numbers of a module that has no parameter called `weight`; None for any other module."""
    kind = _kind(type(module))
    if kind in (_HQQ, _GPTQ, _AWQ):
        return getattr(module, "W_q" if kind is _HQQ else "qweight", None)
    return None if _scheme(module) is None else getattr(module, "weight_packed", None)


def packed_names(module: Any) -> tuple[str, ...]:
    """What such a module's packed numbers, and all that is beside them but its bias, are called in a state dict."""
    kind = _kind(type(module))
    if kind is _HQQ:
        return tuple(module.state_dict_keys() - {"bias"})
    if kind in (_GPTQ, _AWQ):
        return "qweight", "qzeros", "scales", "g_idx"
    if kind is _FLOAT8:
        return "weight", "weight_scale_inv", "activation_scale"
    if _scheme(module) is None:
        return ()
    return tuple(name for name in (*module._parameters, *module._buffers) if name != "bias")


def runs_as_linear(module: nn.Module) -> bool:
    """Whether the module is one of these, and runs as its class does."""
    kind = _kind(type(module))
    return kind is not None and "forward" not in module.__dict__ and _own_forward(type(module), kind)


def packed_weight(module: Any, tensor: Tensor) -> LibraryWeight | None:
    """The weight of `module` where `tensor`, its packed numbers or its `weight`, is stored as these libraries do.

    Unlike `why_packed_unfit` it checks nothing, as it runs in each pass.
    """
    kind = _kind(type(module))
    if kind is None:
        scheme = _scheme(module)
        return None if scheme is None else _compressed(module, tensor, scheme)
    if kind is _FLOAT8:
        return _block_float8(module, tensor) if tensor.element_size() == 1 else None
    if tensor is not packed_tensor(module):
        return None
    return _hqq(module) if kind is _HQQ else _gptq(module) if kind is _GPTQ else _awq(module)


def why_packed_unfit(module: Any) -> str | None:
    """Why there is no weight in such a module that an adapter can stand beside: part of a sentence."""
    if (reason := refused(module)) is not None:
        return reason
    kind, scheme = _kind(type(module)), _scheme(module)
    if kind is _HQQ:
        return _why_not_hqq(module)
    if kind in (_GPTQ, _AWQ):
        return _why_not_gptqmodel(module)
    if kind is _FLOAT8 and module.weight.dtype == torch.int8:
        return (
            "it is a FP8Linear that holds four bits a number, for which transformers has no gradient. Load the model "
            "with FineGrainedFP8Config(dequantize=True)"
        )
    return None if scheme is None else _why_not_compressed(module, scheme)


def owns_forward(module: nn.Module) -> bool:
    """Whether the forward that was put on this module is one that `begin` takes aside: compressed-tensors'."""
    return _scheme(module) is not None and (_FORWARD in module.__dict__ or _written_in(module, _QUANTIZES))


def why_replaced(module: nn.Module) -> str | None:
    """What to say of a forward that was put on this module, if it is known: part of a sentence."""
    if _written_in(module, _OFFLOADS):
        return (
            "compressed-tensors has decompressed the model's weights for good and put a forward on each module, as it "
            "does when the model first runs. Put the adapter on before, or load the model with "
            "CompressedTensorsConfig(dequantize=True)"
        )
    return None


_QUANTIZES = "compressed_tensors/quantization/lifecycle/forward.py"
_OFFLOADS = "compressed_tensors/offload/module.py"


def _written_in(module: nn.Module, file: str) -> bool:
    forward = module.__dict__.get("forward")
    code = getattr(getattr(forward, "__func__", None), "__code__", None)
    return code is not None and code.co_filename.replace("\\", "/").endswith(file)


def runs_aside(module: nn.Module) -> bool:
    """Whether the forward of the module's class cannot run: what knows how its weight is stored is set aside, or it
    wants a kernel that is not here.
    """
    if _kind(type(module)) is _FLOAT8:
        return not (module.weight.is_cuda and kernel_for_float8())  # pyright: ignore[reportCallIssue]
    return _ASIDE in module.__dict__


def begin(module: nn.Module) -> None:
    """Before `module` is an adapter layer: nothing of a library may change how its weight is stored from now on.

    What compressed-tensors has put on a module, its scheme and a forward, is set aside. gptqmodel's `TorchAten…` repack
    their weight for inference on a CPU, unless they have been used for training.
    """
    own = module.__dict__
    if _scheme(module) is not None and _ASIDE not in own:
        if _FORWARD in own:
            own["forward"] = own.pop(_FORWARD)
        own[_ASIDE] = {name: own.pop(name) for name in ("quantization_scheme", "forward") if name in own}
    if _kind(type(module)) in (_GPTQ, _AWQ) and getattr(module, "linear_mode", "") is None:
        own["linear_mode"] = "train"


def end(module: nn.Module) -> None:
    """Undo `begin`."""
    aside = module.__dict__.pop(_ASIDE, None)
    if aside is not None:
        module.__dict__.update(aside)
        _decompress_later(module)


def _decompress_one_by_one(model: nn.Module) -> None:
    """Have each module decompressed when it is first used, and not all of them when the model is.

    The library's hook on a model makes all of its weights wide, and moves the parameters of all of its modules,
    adapters included, into caches for offloading.
    """
    for holder in [module for module in model.modules() if hasattr(module, "ct_decompress_hook")]:
        hook: Any = holder.ct_decompress_hook
        hook.remove()
        del holder.ct_decompress_hook
    for module in model.modules():
        if _scheme(module) is not None and _ASIDE not in module.__dict__:
            _decompress_later(module)


def _decompress_later(module: nn.Module) -> None:
    own = module.__dict__
    if _status(module) == "compressed" and "forward" in own and _FORWARD not in own:
        own[_FORWARD], own["forward"] = own["forward"], MethodType(_decompressing, module)


def _decompressing(module: Any, x: Tensor) -> Tensor:
    """The forward of a module until it is first used."""
    if _status(module) == "compressed":
        sys.modules["compressed_tensors.compressors"].decompress_module(module)
    module.__dict__["forward"] = module.__dict__.pop(_FORWARD)
    return module.forward(x)


def prepare_model(model: nn.Module, dtype_of_model: Callable[[], torch.dtype]) -> None:
    """Before adapters are put on some of its modules; what the model computes stays."""
    _decompress_one_by_one(model)
    for module in model.modules():
        _prepare(module, dtype_of_model)


def _prepare(module: Any, dtype_of_model: Callable[[], torch.dtype]) -> None:
    """Note what a module has forgotten: the dtype that the model computes in.

    gptqmodel's AWQ layers round their scales to it when they first run, and all of its layers their bias each time;
    here that happens before anything is computed from them. What HQQ has made in inference mode is copied, because
    autograd cannot save it.
    """
    kind = _kind(type(module))
    if kind in (_GPTQ, _AWQ, _FLOAT8):
        dtype = module.__dict__.setdefault(DTYPE, dtype_of_model())
        if kind is _AWQ and not hasattr(module, "linear_mode") and isinstance(module.scales, Tensor):
            module.scales = module.scales.to(dtype if dtype in _HALF else torch.float16)
        if kind is not _FLOAT8 and isinstance(module.bias, Tensor):
            module.bias = module.bias.to(dtype)
    elif kind is _HQQ and module.ready:
        with torch.inference_mode(False):
            for name, value in module.meta.items():
                if isinstance(value, Tensor) and value.is_inference():
                    module.meta[name] = value.clone()
            if module.W_q.is_inference():
                module.W_q = nn.Parameter(module.W_q.clone(), requires_grad=False)


def follow_packed(module: Any) -> None:
    """After a move: HQQ's scales, zeros and bias are no parameters of its module, and go where its weight is."""
    if _kind(type(module)) is not _HQQ or not module.ready:
        return
    device = module.W_q.device
    if device.type == "meta" or module.meta["scale"].device == device:
        return
    for name, value in module.meta.items():
        if isinstance(value, Tensor):
            module.meta[name] = value.to(device)
    if isinstance(module.bias, Tensor):
        module.bias = module.bias.to(device)
    module.device = device


def refused(module: nn.Module) -> str | None:
    """What is to be said of a module of a library's that stores its weight in a way that nobody can train beside."""
    return _refused(type(module))


# functools.cache would be a warning wherever torch.compile comes by, and a miss.
_KINDS: dict[type[nn.Module], tuple[_Class, ...] | None] = {}


def _kind(of: type[nn.Module]) -> tuple[_Class, ...] | None:
    """Which of the libraries' classes a module's class is or was made of."""
    if of not in _KINDS:
        _KINDS[of] = _found_kind(of)
    return _KINDS[of]


def _found_kind(of: type[nn.Module]) -> tuple[_Class, ...] | None:
    for cls in of.__mro__:
        for kind in (_HQQ, _GPTQ, _AWQ, _FLOAT8):
            if _named(cls, kind):
                return kind
        if cls.__module__.startswith(_QLINEAR) or _named(cls, _OTHERS):
            return None  # a class that computes in another way, whatever it inherits from
    return None


def _own_forward(of: type[nn.Module], kind: tuple[_Class, ...]) -> bool:
    return next((_named(cls, kind) for cls in of.__mro__ if "forward" in vars(cls)), False)


def _named(cls: type, names: tuple[_Class, ...]) -> bool:
    return any(cls.__name__ == name and cls.__module__.startswith(module) for module, name in names)


# HQQ -----------------------------------------------------------------------------------------------------------------


def _hqq(module: Any) -> LibraryWeight:
    meta = module.meta
    form = Hqq(
        (int(meta["shape"][0]), int(meta["shape"][1])),
        module.compute_dtype,
        bits=meta["nbits"],
        group=meta["group_size"],
        axis=meta["axis"],
        packing=meta["packing"],
        view=meta["unpack_view_dtype"] if meta["view_as_float"] else None,
    )
    return LibraryWeight(form, module.W_q, meta["scale"], meta["zero"])


def _why_not_hqq(module: Any) -> str | None:
    if not module.ready:
        return "hqq has not quantised its weight yet: call its initialize()"
    if not all(isinstance(module.meta.get(name), Tensor) for name in ("scale", "zero")):
        return (
            "hqq has quantised or offloaded its scales and zeros, too, which it has given up since; expected "
            "quant_zero=False, quant_scale=False and offload_meta=False"
        )
    return None


# gptqmodel -----------------------------------------------------------------------------------------------------------


def _gptq(module: Any) -> LibraryWeight:
    form = Gptq(
        (module.out_features, module.in_features),
        getattr(module, DTYPE, None) or module.scales.dtype,
        bits=module.bits,
        pack=module.pack_dtype_bits,
    )
    return LibraryWeight(form, module.qweight, module.qzeros, module.scales, module.g_idx)


def _awq(module: Any) -> LibraryWeight:
    dtype, half = getattr(module, DTYPE, None) or module.scales.dtype, not hasattr(module, "linear_mode")
    form = Awq(
        (module.out_features, module.in_features),
        dtype if dtype in _HALF or not half else torch.float16,
        bits=module.bits,
        group=module.group_size,
        half=half,
    )
    return LibraryWeight(form, module.qweight, module.qzeros, module.scales)


def _why_not_gptqmodel(module: Any) -> str | None:
    kind = type(module).__name__
    if getattr(module, "_cpu_transformed", False):
        return (
            f"gptqmodel's {kind} has repacked its weight for inference, which cannot be undone. Put the adapter on "
            "before the model first runs"
        )
    if getattr(module, "planar", False):
        return (
            f"gptqmodel stores its {module.bits} bits in planes (gptq_p), which is not read here; expected the format "
            "gptq or gptq_v2 with 2, 3, 4 or 8"
        )
    if getattr(module, "online_full_had", False) or getattr(module, "online_partial_had", False):
        return "gptqmodel rotates its input, which an adapter beside it would not see"
    if getattr(module, "adapter", None) is not None:
        return "gptqmodel has loaded an adapter of its own onto it (EoRA, LoRA). Load the model without"
    if module.qweight is None or module.scales is None:
        return f"the weight of gptqmodel's {kind} was taken away"
    return None


# compressed-tensors --------------------------------------------------------------------------------------------------


def _scheme(module: nn.Module) -> Any:
    """The scheme that compressed-tensors has put on the module, also while it is set aside."""
    if not isinstance(module, nn.Linear):
        return None
    own = module.__dict__
    return own.get("quantization_scheme") or own.get(_ASIDE, {}).get("quantization_scheme")


def _status(module: Any) -> str:
    status = module.__dict__.get("quantization_status")
    return str(getattr(status, "value", status))


def _compressed(module: Any, tensor: Tensor, scheme: Any) -> LibraryWeight | None:
    own: dict[str, Any] = module._parameters
    wide = tensor.is_floating_point() and tensor.element_size() > 1
    aside = getattr(module, "_set_aside", None)
    merged = "weight_packed" in own or (aside is not None and aside[0] is not tensor)
    if wide and (merged or scheme.input_activations is None):
        return None
    scale = own.get("weight_scale")
    dtype = tensor.dtype if wide else scale.dtype if scale is not None else torch.bfloat16
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        dtype = torch.bfloat16
    packed = "weight_packed" in own and tensor is own["weight_packed"]
    shape = _shape(module) if packed else (int(tensor.shape[0]), int(tensor.shape[1]))
    no_scale = ("bias", "weight", "weight_packed", "weight_shape")
    names = [name for name, parameter in own.items() if name not in no_scale and parameter is not None]
    first = "weight_packed" if packed else "weight"
    kind = "" if wide else str(getattr(scheme.format, "value", scheme.format))
    form = Compressed(shape, dtype, names=(first, *names), scheme=scheme, kind=kind)
    return LibraryWeight(form, tensor, *(own[name] for name in names))


def _shape(module: Any) -> tuple[int, int]:
    return int(module.out_features), int(module.in_features)


def _why_not_compressed(module: nn.Module, scheme: Any) -> str | None:
    status = _status(module)
    mend = "Load the model with CompressedTensorsConfig(dequantize=True)"
    if scheme.weights is None or scheme.output_activations is not None:
        return f"compressed-tensors quantises what comes out of it, which would quantise the adapter, too. {mend}"
    if status not in ("compressed", "decompressed"):
        return f"compressed-tensors quantises its weight anew in each pass (it is {status}). {mend}"
    if status == "compressed" and scheme.format is None:
        return f"compressed-tensors does not say how its weight is stored. {mend}"
    return None


# Fine-grained FP8 ----------------------------------------------------------------------------------------------------


def _block_float8(module: Any, tensor: Tensor) -> LibraryWeight:
    bias = module.bias
    dtype = getattr(module, DTYPE, None) or (torch.bfloat16 if bias is None else bias.dtype)
    block = None if module.block_size is None else (int(module.block_size[0]), int(module.block_size[1]))
    outputs, inputs = tensor.shape
    form = BlockFloat8((outputs, inputs), dtype, block=block, deepgemm=not module._deepgemm_disabled)
    of_x = () if module.activation_scale is None else (module.activation_scale,)
    return LibraryWeight(form, tensor, module.weight_scale_inv, *of_x)


# What cannot be trained on -------------------------------------------------------------------------------------------

_TRAINABLE = "bitsandbytes' and torchao's layers, HQQ, GPTQ, AWQ, compressed-tensors and fine-grained FP8 can be"
_INSTEAD = "Take the model before it was quantised, with --quantize"
_TORCH_KERNEL = (
    'Load the model with a kernel that trains: GPTQConfig(…, backend="auto_trainable"), or AwqConfig(…) likewise'
)
_REFUSED: dict[_Class, tuple[str, str]] = {
    ("transformers.integrations.eetq", "EetqLinear"): ("EETQ, in an order that only its GPU kernel reads", _INSTEAD),
    ("transformers.integrations.bitnet", "BitLinear"): ("BitNet, three values a number", _INSTEAD),
    ("transformers.integrations.bitnet", "AutoBitLinear"): ("BitNet, quantised anew in each pass", _INSTEAD),
    ("transformers.integrations.fbgemm_fp8", "FbgemmFp8Linear"): (
        "FBGEMM FP8, which transformers has no gradient for",
        "Load the model with FbgemmFp8Config(dequantize=True), or take it before it was quantised, with --quantize",
    ),
    ("transformers.integrations.higgs", "HiggsLinear"): (
        "HIGGS, on a grid that only its GPU kernel reads",
        "Call model.dequantize() first, or take the model before it was quantised, with --quantize",
    ),
    ("transformers.integrations.compressed_tensors", "CompressedTensorsFP8Linear"): (
        "compressed-tensors FP8 with kernels that are for inference alone",
        "Load the model without use_optimized_inference",
    ),
    ("transformers.integrations.finegrained_fp8", "FP8GroupedLinear"): (
        "several FP8 products side by side",
        "Load the model with FineGrainedFP8Config(dequantize=True)",
    ),
    ("transformers.integrations.nvfp4", "NVFP4Linear"): ("NVFP4, which transformers has no gradient for", _INSTEAD),
    ("transformers.integrations.metal_quantization", "MetalLinear"): ("Metal's, for inference alone", _INSTEAD),
    ("transformers.integrations.gemma_quant", "QuantizedLinear"): ("Gemma's, for inference alone", _INSTEAD),
    ("transformers.integrations.mxfp4", "Mxfp4GptOssExperts"): (
        "MXFP4 experts, which are no linear layers",
        "Load the model with Mxfp4Config(dequantize=True), or adapt its attention alone (--targets)",
    ),
    ("transformers.integrations.mxfp4", "Mxfp4GptOssMLP"): (
        "MXFP4 experts, which are no linear layers",
        "Load the model with Mxfp4Config(dequantize=True), or adapt its attention alone (--targets)",
    ),
    ("optimum.quanto", "QLinear"): ("quanto, whose layers quantise their weight and x themselves", _INSTEAD),
    ("aqlm", "QuantizedLinear"): ("AQLM, sums of codebooks", _INSTEAD),
    ("spqr_quant", "QuantizedLinear"): ("SpQR, with outliers apart", _INSTEAD),
    ("vptq", "VQuantLinear"): ("VPTQ, vectors of a codebook", _INSTEAD),
    ("fp_quant", "FPQuantLinear"): ("FP-Quant, whose layers rotate x", _INSTEAD),
    ("sinq", "SINQLinear"): ("SINQ", _INSTEAD),
    ("auto_round", "QuantLinear"): ("AutoRound's own kernels, for inference alone", _INSTEAD),
    ("quark", "QParamsLinear"): ("Quark, for inference alone", _INSTEAD),
}
_OTHERS = tuple(_REFUSED)


@cache
def _refused(of: type[nn.Module]) -> str | None:
    for cls in of.__mro__:
        for known, (what, mend) in _REFUSED.items():
            if _named(cls, (known,)):
                return f"a {cls.__name__} cannot be trained on ({what}; {_TRAINABLE}). {mend}"
        if any(_named(cls, kind) for kind in (_GPTQ, _AWQ)):
            return None
        if cls.__module__.startswith(_QLINEAR) and "forward" in vars(cls):
            return (
                f"gptqmodel's {cls.__name__} packs its weight for inference alone, in an order that only its kernel "
                f"reads. {_TORCH_KERNEL}"
            )
    return None
