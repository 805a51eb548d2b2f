"""Bases whose frozen weights another library stores in few bits: quantised as they are loaded, or found so.

`transformers` does the loading, tensor by tensor and onto the device, so that the model is never whole in bfloat16,
neither on the host nor on the GPU. What stands here is what has to be said before that: which configuration
`--quantize` means, and why a base cannot be loaded or trained on. Afterwards it is told from the model itself what it
is stored in. (`quantize.py` has float8, which is ours.)
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers import auto
from transformers.quantizers.base import get_keys_to_not_convert

from theodora.adapters.targets import find_modules_to_save, frozen_linear
from theodora.errors import CheckpointError, ConfigError, shown
from theodora.extras import pip_line
from theodora.files.distrust import expanded
from theodora.files.libraries import import_library
from theodora.files.model_folder import hqq_folder
from theodora.files.packed_layouts import LAYOUTS, check_layout_folder
from theodora.files.packed_parts import check_packed_folder
from theodora.files.quantisation_config import check_named, check_quantisation, method_named
from theodora.files.trained_on import KINDS, TrainedOn
from theodora.kernels.base_weight import PlainWeight
from theodora.kernels.formats import inner_tensors
from theodora.kernels.sharded_weight import here
from theodora.layers import LowRank, base_weight
from theodora.layers.base_weights import FLOATS
from theodora.layers.experts import ExpertParameter, named_places
from theodora.layers.float8 import Float8Layer

_INT4_GROUP = 128
"""Weights that share a scale: torchao's own choice."""
_INT4_CAPABILITY = (8, 0)
_PIP = {
    "bitsandbytes": pip_line("quant"),
    "torchao": pip_line("quant"),
    "gptqmodel": "pip install gptqmodel --no-build-isolation",
    "optimum": "pip install optimum",
    "compressed_tensors": "pip install compressed-tensors",
}
_OF_KIND = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int4": "torchao"}
_OF_METHOD = {
    "bitsandbytes": ("bitsandbytes",),
    "torchao": ("torchao",),
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed_tensors",),
    "fp8": (),
    "mxfp4": (),
}
"""How a folder may be quantised for adapters to be put on it, by transformers' names → the libraries that it takes."""


@dataclass(frozen=True)
class Quantization:
    """What the linear layers of a model are stored in."""

    name: str
    """In words: "bitsandbytes nf4, double-quantised"."""
    kind: str | None
    """What `quantize` calls it (`KINDS`), if it was quantised as it was loaded; None if its folder holds it so."""
    bytes: int
    """All weights of the model, the plain ones included."""

    def __str__(self) -> str:
        size = f"{self.bytes / 1e9:,.2f} GB" if self.bytes >= 1e9 else f"{self.bytes / 1e6:,.2f} MB"
        return f"{self.name}, {size} in all"


def quantization_of(model: nn.Module) -> Quantization | None:
    """What a model's weights are stored in; None if all of them are plain."""
    if any(isinstance(module, Float8Layer) for module in model.modules()):
        return Quantization("float8 with a scale for each row", "fp8", weight_bytes(model))
    quantizer: Any = getattr(model, "hf_quantizer", None)
    config: Any = getattr(quantizer, "quantization_config", None)
    if config is None or getattr(config, "dequantize", False):
        return None
    fields = config if isinstance(config, dict) else config.to_dict()
    kind = None if getattr(quantizer, "pre_quantized", True) else _kind_of(fields)
    return Quantization(name_of(fields), kind, weight_bytes(model))


def trained_on(model: nn.Module) -> TrainedOn:
    """What an adapter that is trained on this model has to remember of it."""
    found, config = quantization_of(model), getattr(model, "config", None)
    return TrainedOn(
        model=getattr(config, "_name_or_path", None) or None,
        revision=getattr(config, "_commit_hash", None),
        quantization=None if found is None else found.name,
        quantize=None if found is None else found.kind,
        dtype=None if found is None or found.kind is None else str(_dtype_of(config)).removeprefix("torch."),  # pyright: ignore[reportArgumentType]
    )


def name_of(fields: Mapping[str, Any]) -> str:
    """The quantisation that a `quantization_config` describes, in words."""
    method = _method(fields) or "an unknown kind"
    if method == "bitsandbytes":
        if not fields.get("load_in_4bit"):
            return "bitsandbytes int8"
        kind = f"bitsandbytes {fields.get('bnb_4bit_quant_type', 'fp4')}"
        return f"{kind}, double-quantised" if fields.get("bnb_4bit_use_double_quant") else kind
    if method == "torchao":
        return f"torchao {_torchao_type(fields).removesuffix('Config')}"
    if method == "hqq":
        weight = _mapping(_mapping(fields.get("quant_config")).get("weight_quant_params"))
        return f"HQQ{_bits(weight.get('nbits'), weight.get('group_size'))}"
    if method == "compressed-tensors":
        return f"compressed-tensors {fields['format']}" if isinstance(fields.get("format"), str) else method
    if method == "fp8":
        return "fine-grained FP8"
    if method in ("gptq", "awq", "mxfp4"):
        return f"{method.upper()}{_bits(fields.get('bits'), fields.get('group_size'))}"
    return method


def stored_quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The `quantization_config` of a model's config.json, as it stands there; None for a model of plain weights.

    Raises:
        CheckpointError: it is empty.
    """
    for part in (config, config.get_text_config()):
        fields = getattr(part, "quantization_config", None)
        if fields is not None:
            stored = fields if isinstance(fields, dict) else fields.to_dict() if hasattr(fields, "to_dict") else {}
            check_named(stored)
            return stored
    return None


def loading_options(
    config: PreTrainedConfig,
    model: object,
    *,
    quantize: str | None,
    dtype: torch.dtype | str,
    compute: torch.dtype | None,
    device: torch.device,
    keep: tuple[str, ...],
    auto_class: Any,
    adapted: bool,
    trust_remote_code: bool,
    remembered: bool = False,
    plain_for: str | None = None,
    sharded: bool = False,
) -> dict[str, Any]:
    """What `from_pretrained` has to be given for a quantised base; everything that speaks against it is said here.

    Args:
        config: the model's.
        model: its folder or hub name, for messages.
        quantize: a kind of `KINDS`, none, or None; fp8 is ours, done afterwards, and only checked here.
        dtype: of the weights that stay plain; auto for the model's own.
        compute: dtype of the products. Default: the plain weights'.
        device: where the model is going to be.
        keep: names of modules that stay plain, beside the embeddings and the output head.
        auto_class: of transformers, for this model.
        adapted: whether an adapter comes onto it.
        trust_remote_code: whether Python code that comes with the model may run.
        remembered: whether `quantize` is what an adapter remembers, which a folder of quantised weights stands above.
        plain_for: what else wants plain weights, for the message.
        sharded: whether the weights are going to be cut over processes: packed numbers are then stored as numbers of
            the plain weights' dtype, which `fully_shard` can cut.

    Raises:
        ConfigError: `quantize` on a model that is quantised already, a library that is not installed, or a device that
            lacks what it takes.
        CheckpointError: a folder whose quantisation no adapter can be put on, or that lacks its library.
    """
    stored = stored_quantization(config)
    if stored is not None:
        wanted = plain_for or (f"quantize is {quantize}" if quantize not in (None, "none") else None)
        if wanted is not None and not remembered:
            raise ConfigError(
                f"{wanted}, but {model} is quantised already ({name_of(stored)}): quantising it again "
                "would round every weight twice. Leave that out, or say none, to use it as it is, or name the model "
                "that it was made from."
            )
        _check_stored(stored, model, device, adapted=adapted)
        return _device_map(device)
    if quantize in (None, "none", "fp8"):
        return {}
    if quantize not in KINDS:
        raise ConfigError(f"quantize is {shown(quantize)}; expected one of none, {', '.join(KINDS)}")
    library = _OF_KIND[quantize]
    if not _installed(library):
        raise ConfigError(f"quantize={quantize} wants {library}, which is not installed: {_PIP[library]}")
    plain = _dtype_of(config) if isinstance(dtype, str) else dtype
    skipped = _plain_modules(config, auto_class, keep, trust_remote_code) if keep else None
    import_library(library)
    made = _config_for(quantize, plain, compute or plain, device, skipped, plain if sharded else torch.uint8)
    _check_environment(made.to_dict() if quantize != "int4" else made, model, device, stored=False)
    return {"quantization_config": made, **_device_map(device)}


def left_plain(model: nn.Module, keep: tuple[str, ...] = ()) -> str | None:
    """Which linear layers of a quantised model are not quantised, in words; None where all are that should be.

    Args:
        model: quantised.
        keep: names of modules that were to stay plain.
    """
    linear = frozen_linear(model, keep)
    plain = [path for path in linear if isinstance(base_weight(model.get_submodule(path)), PlainWeight)]
    if not plain:
        return None
    names = Counter(path.rpartition(".")[2] for path in plain)
    shapes = {tuple(base_weight(model.get_submodule(path)).shape) for path in plain}
    told = ", ".join(f"{count} × {name}" for name, count in names.items())
    sizes = ", ".join(f"{outputs} × {inputs}" for outputs, inputs in sorted(shapes)[:4])
    return f"{len(plain)} of {len(linear)} linear layers are not quantised ({told}; out × in: {sizes})"


def experts_left_plain(model: nn.Module) -> str | None:
    """What to say of fused experts that are not quantised, as loading leaves them; None where there are none."""
    places = named_places(model).values()
    weights = [place.weight for place in places if isinstance(place, ExpertParameter)]
    plain = [weight for weight in weights if type(weight.data) is Tensor and weight.dtype in FLOATS]
    if not plain:
        return None
    size = sum(weight.nbytes for weight in plain) / 1e9
    dtypes = ", ".join(dict.fromkeys(str(weight.dtype).removeprefix("torch.") for weight in plain))
    return f"{len(plain)} weights of fused experts are not quantised: {size:.1f} GB of {dtypes}"


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a base model's parameters and buffers as they lie in memory here, packed ones with their scales."""
    seen: dict[Any, int] = {}
    for module in (module for module in model.modules() if not isinstance(module, LowRank)):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False), *_beside(module)):
            for part in _plain_parts(here(tensor)):
                seen[part.data_ptr() or id(part)] = part.nbytes
    return sum(seen.values())


def count_parameters(model: PreTrainedModel) -> int:
    """Numbers in a model's weights, those that are packed counted one by one."""
    counted, packed = {id(p): p.numel() for p in model.parameters()}, 0
    for module in model.modules():
        if _is_packed(module):
            counted |= {id(p): 0 for name, p in module.named_parameters(recurse=False) if name != "bias"}
            packed += int(module.out_features) * int(module.in_features)  # pyright: ignore[reportArgumentType]
    return packed + sum(counted.values())


def _kind_of(fields: Mapping[str, Any]) -> str | None:
    """The kind of `KINDS` that means this very configuration."""
    method = _method(fields)
    if method == "bitsandbytes" and fields.get("load_in_8bit"):
        return "int8" if fields.get("llm_int8_threshold") == 6.0 else None
    if method == "bitsandbytes":
        double = fields.get("bnb_4bit_use_double_quant")
        return "nf4" if fields.get("bnb_4bit_quant_type") == "nf4" and double else None
    return "int4" if method == "torchao" and _torchao_type(fields) == "Int4WeightOnlyConfig" else None


def _config_for(
    kind: str,
    plain: torch.dtype,
    compute: torch.dtype,
    device: torch.device,
    skipped: list[str] | None,
    storage: torch.dtype = torch.uint8,
) -> Any:
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_quant_storage=storage,
            llm_int8_skip_modules=skipped,
        )
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _INT4_CAPABILITY:
        raise ConfigError(
            f"quantize=int4 computes by kernels of torchao for NVIDIA GPUs from compute capability 8.0 on, and this "
            f"run is on {device.type}. Write quantize: nf4, which takes as little memory."
        )
    if plain != torch.bfloat16:
        raise ConfigError(
            f"quantize=int4 computes in bfloat16 alone, and the base here is {str(plain).removeprefix('torch.')} (as "
            "bf16, fp16 or modules_to_save have it). Write quantize: nf4."
        )
    # The one layout whose kernels come with torch itself.
    data = {"group_size": _INT4_GROUP, "int4_packing_format": "tile_packed_to_4d"}
    int4 = {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": data}
    return TorchAoConfig.from_dict({"quant_type": {"default": int4}, "modules_to_not_convert": skipped})


def _check_stored(fields: Mapping[str, Any], model: object, device: torch.device, *, adapted: bool) -> None:
    method = _method(fields)
    if method == "hqq":
        raise CheckpointError(hqq_folder(model))
    if adapted and method not in _OF_METHOD:
        raise CheckpointError(
            f"{model} is quantised ({name_of(fields)}), and no adapter can be put on that here; expected one of "
            f"{', '.join(_OF_METHOD)}. Name the model that it was made from; --quantize nf4 makes it small as it loads."
        )
    missing = [library for library in _OF_METHOD.get(method or "", ()) if not _installed(library)]
    if missing:
        raise CheckpointError(
            f"{model} is quantised ({name_of(fields)}), which takes {' and '.join(missing)}, not installed here: "
            + " && ".join(_PIP[library] for library in missing)
        )
    check_quantisation(fields, model)
    if (folder := expanded(model)).is_dir():  # pyright: ignore[reportArgumentType]
        if method == "bitsandbytes":
            check_packed_folder(folder)
        elif method in LAYOUTS:
            check_layout_folder(folder, fields)
    for library in _OF_METHOD.get(method or "", ()):
        import_library(library)
    _check_environment(dict(fields), model, device, stored=True)


def _check_environment(fields: Any, model: object, device: torch.device, *, stored: bool) -> None:
    """What transformers itself has against this machine, before it reads weights for minutes."""
    try:
        quantizer = auto.AutoHfQuantizer.from_config(fields, pre_quantized=stored)
        quantizer.validate_environment(device_map=_device_map(device).get("device_map"), weights_only=True)
    except Exception as error:  # ImportError, ValueError, RuntimeError, and what a strange configuration leads to
        name = name_of(fields if isinstance(fields, Mapping) else fields.to_dict())
        kind = CheckpointError if stored else ConfigError
        raise kind(f"{model} cannot be loaded as {name} on this machine ({device.type}): {error}") from error


def _device_map(device: torch.device) -> dict[str, Any]:
    """Straight to the device, where weights are packed by the layout that its kernels read."""
    # (To the CPU they go by themselves, if there is nothing else.)
    alone = device.type == "cpu" and torch.accelerator.current_accelerator(check_available=True) is None
    return {} if alone else {"device_map": {"": device}}


def _plain_modules(
    config: PreTrainedConfig, auto_class: Any, keep: tuple[str, ...], trust_remote_code: bool
) -> list[str]:
    """Paths of the modules that stay plain: those that are named, and those that transformers leaves alone."""
    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=trust_remote_code)
    return [*get_keys_to_not_convert(model), *find_modules_to_save(model, keep)]


def _dtype_of(config: PreTrainedConfig) -> torch.dtype:
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    return getattr(torch, found, torch.float32) if isinstance(found, str) else found


def _installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except (ImportError, ValueError):
        return False


def _method(fields: Mapping[str, Any]) -> str | None:
    method = method_named(fields)
    return method if method is not None and method.isprintable() and len(method) < 40 else None


def _torchao_type(fields: Mapping[str, Any]) -> str:
    name = _mapping(_mapping(fields.get("quant_type")).get("default")).get("_type")
    return name if isinstance(name, str) and name.isidentifier() else "weights"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _bits(bits: Any, group: Any) -> str:
    text = f" {bits} bits" if isinstance(bits, int) else ""
    return f"{text}, groups of {group}" if isinstance(group, int) and group > 0 else text


def _is_packed(module: nn.Module) -> bool:
    """Whether a linear layer's weight has another shape than (O, I), or other names."""
    sizes = [getattr(module, name, None) for name in ("out_features", "in_features")]
    weight = getattr(module, "weight", None)
    if not all(isinstance(size, int) for size in sizes):
        return False
    return not isinstance(weight, Tensor) or sorted(weight.shape) != sorted(sizes)  # pyright: ignore[reportArgumentType]


def _beside(module: nn.Module) -> Iterator[Tensor]:
    """Tensors that libraries keep outside parameters and buffers."""
    for holder in (getattr(module, "state", None), getattr(module, "weight", None)):  # bitsandbytes int8
        yield from (t for name in ("CB", "SCB") if isinstance(t := getattr(holder, name, None), Tensor))
    meta = getattr(module, "meta", None)  # HQQ
    for value in meta.values() if isinstance(meta, dict) else ():
        if isinstance(value, Tensor):
            yield value


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that one is made of: a subclass's inner ones, the scales of bitsandbytes' 4 bits."""
    yield from inner_tensors(tensor)
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        yield from (t for name in ("absmax", "offset") if isinstance(t := getattr(state, name, None), Tensor))
        state = getattr(state, "state2", None)
