"""The quantised weights of a model folder, one at a time: dequantised, and quantised again.

How a library stores a weight is the library's business, and transformers knows it: its quantiser says which modules are
replaced, reads their parts from a file, quantises a dense weight and gives the parts that `save_pretrained` would
write. All of that happens here on a model without memory (on the meta device), of which one module at a time holds its
weight. The libraries are transformers' to call.

    X.weight, X.weight.absmax, X.weight.quant_state.…     bitsandbytes, 4 bits
    X.weight, X.SCB, X.weight_format                      bitsandbytes, 8 bits
    X._weight_qdata, X._weight_scale, …                   torchao; what they mean is in the header of the file
    X.weight, X.weight_scale_inv                          fine-grained FP8
    X.qweight …, X.weight_packed …                        GPTQ, AWQ, compressed-tensors: `packed_layouts.py`

The dequantised weight is (O, I) whatever it was before: bitsandbytes quantises GPT-2's Conv1D turned round.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto

from theodora.errors import CheckpointError, bullet_list, shown
from theodora.extras import pip_line
from theodora.files.libraries import import_library
from theodora.files.packed_layouts import (
    AWQ_FUNCTIONS,
    LAYOUTS,
    PART,
    VALUES,
    dense_weight,
    why_other_layout,
    why_parts_unfit,
)
from theodora.files.packed_parts import check_parts
from theodora.files.quantisation_config import check_quantisation, method_named

_LIBRARIES = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "hqq": "hqq",
    "compressed-tensors": "compressed-tensors",
    "quanto": "optimum-quanto",
    "eetq": "eetq",
}
_WRITTEN = ("bitsandbytes", "torchao", "fp8")
"""Methods whose weights are read and written here."""
_READ = (*_WRITTEN, *LAYOUTS)
"""Methods whose weights are read here."""
# What is left of a key behind the path of its module, where it is a part of a quantised weight.
_PART = re.compile(
    r"\.(weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.[\w.]+)|SCB|weight_format"
    r"|_weight_\w+|weight_scale_inv|activation_scale)$"
)
_IMPORTED = {"compressed-tensors": "compressed_tensors", "awq": "gptqmodel", "gptq": None, "fp8": None}
"""Method -> the library that is imported for it, where it is called otherwise."""
_MISSES_TOLD = 10


def method_of(config: Mapping[str, Any]) -> str:
    """The name of a quantisation as people say it: bitsandbytes nf4, torchao int4, fp8 …

    Args:
        config: `quantization_config` of a config.json, or what transformers' `to_dict` gives for one.
    """
    method = method_named(config)
    if method is None:
        return "an unknown kind"
    if method == "bitsandbytes":
        return f"bitsandbytes {config.get('bnb_4bit_quant_type', 'fp4') if config.get('load_in_4bit') else 'int8'}"
    if method == "torchao":
        kinds = re.findall(r'"_type": "(\w+)Config"', json.dumps(_plain(config.get("quant_type"))))
        return f"torchao {kinds[0]}" if kinds else "torchao"
    return shown(method)[1:-1]


def bits_of(config: Mapping[str, Any]) -> int:
    """Bits of a weight, as far as its bound of errors goes: 4 (or fewer), or 8."""
    said = f"{method_of(config)} {json.dumps(_plain(config.get('quant_type')))}"
    few = re.search(r"(nf|fp|[iI]nt|[fF]loat)[1-4](?!\d)", said) or config.get("bits") in (1, 2, 3, 4)
    return 4 if few else 8


def why_not_written(config: Mapping[str, Any]) -> str | None:
    """Why weights cannot be quantised again by this `quantization_config`: part of a sentence, or None."""
    if (method := method_named(config)) in _WRITTEN:
        return None
    how = "are found by calibration with data" if method in ("gptq", "awq") else "are not computed here"
    return f"{method_of(config)}, whose numbers {how}"


def group_parts(keys: Iterable[str], method: str | None = None) -> dict[str, dict[str, str]]:
    """The quantised weights that a checkpoint's keys tell of.

    Args:
        keys: of the files.
        method: transformers' name of the quantisation.

    Returns:
        Key of the weight, as an unquantised checkpoint would have it -> part, as the library calls it -> stored key.
    """
    keys = list(keys)
    parts: dict[str, dict[str, str]] = {}
    for key in keys:
        if found := PART.get(method or "", _PART).search(key):
            parts.setdefault(f"{key[: found.start()]}.weight", {})[found.group(1)] = key
    for weight, of_weight in parts.items():
        if weight in keys:
            of_weight["weight"] = weight
    return parts


class PackedWeights:
    """What a quantiser of transformers does to single weights of a model.

    Args:
        model: its class on the meta device, in the dtype of its plain weights; its modules are replaced.
        config: the `quantization_config`.
        stored: whether the model's files are quantised already.
        metadata: of the headers of the files, where they are.
        where: the folder; for messages.

    Raises:
        CheckpointError: the library is missing (with the pip line), cannot run here, or its format is not read here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: Mapping[str, Any],
        *,
        stored: bool,
        metadata: Mapping[str, str] | None = None,
        where: str = "",
    ) -> None:
        self.config, self.method = dict(config), method_of(config)
        self._model, self._metadata, self._where = model, dict(metadata or {}), where
        name = method_named(config) or "bitsandbytes"
        self._layout = name if name in LAYOUTS else None
        reason = f"{', '.join(_READ)} are" if name not in _READ else why_other_layout(name, config)
        if reason is not None:
            raise CheckpointError(
                f"{where} is quantised with {self.method}, whose packed weights are not read one by one here "
                f"({reason}). Merge onto the original weights instead: --onto original, and --base-model with the "
                "unquantised model."
            )
        check_quantisation(config, where)
        self._dtype = _dtype_of(model)
        library = _IMPORTED.get(name, name)
        if library is not None and _installed(library):  # otherwise transformers says so
            import_library(library)
        if name == "gptq":
            return  # plain torch
        try:
            if name == "awq":
                if not _installed("gptqmodel"):
                    raise ImportError("its function dequantises here")
                import_library(AWQ_FUNCTIONS)
                return
            self._quantizer: Any = auto.AutoHfQuantizer.from_config(copy.deepcopy(dict(config)), pre_quantized=stored)
            if name != "fp8":  # it asks for a GPU, which only its products need
                self._quantizer.validate_environment(device_map={"": "cpu"})
            self._quantizer.preprocess_model(model, device_map={"": "cpu"})
        except ImportError as error:
            library = _LIBRARIES.get(name, name)
            line = pip_line("quant") if library in ("bitsandbytes", "torchao") else f"pip install {library}"
            raise CheckpointError(
                f"{where} is quantised with {self.method}, and {library} is not installed: {line}. ({error})"
            ) from error
        except Exception as error:  # transformers and the libraries raise whatever a damaged configuration leads to
            raise CheckpointError(f"{where}: transformers cannot use its quantization_config: {error}") from error

    def wanted(self, parameter: str) -> bool:
        """Whether quantising on load would quantise this parameter of the model."""
        try:
            return bool(self._quantizer.param_needs_quantization(self._model, parameter))
        except (AttributeError, KeyError):
            return False

    def dense(self, parameter: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The dequantised weight, (O, I), in the dtype that the library gives.

        Args:
            parameter: the model's name of the weight.
            parts: as `group_parts` calls them.

        Raises:
            CheckpointError: the parts are not what the library expects.
        """
        module = self._module(parameter)
        expected = _shape_of(module)
        try:
            check_parts(parts)
            if self._layout is not None:
                values = {name: part for name, part in parts.items() if name in VALUES}
                if (told := why_parts_unfit(self._layout, self.config, parts, values, expected)) is not None:
                    raise ValueError(told)
                scheme = getattr(module, "quantization_scheme", None)
                return dense_weight(self._layout, self.config, parts, expected, self._dtype, scheme)
            with self._emptied(module):
                if "weight_scale_inv" in parts:
                    dense = _float8(self._quantizer, parts, self.config.get("weight_block_size"))
                else:
                    weight = self._deserialised(parameter, parts)
                    dense = _dense_of(weight)
        except CheckpointError:
            raise
        except Exception as error:  # whatever a library makes of damaged tensors
            raise CheckpointError(
                f"{parameter}: its packed tensors cannot be read as {self.method}: {error}. They are "
                + ", ".join(f"{name} {tuple(part.shape)} {part.dtype}" for name, part in sorted(parts.items()))
            ) from error
        if dense.shape != expected:
            raise CheckpointError(f"{parameter}: dequantised it is {tuple(dense.shape)}, expected (out, in) {expected}")
        return dense.detach()

    def pack(self, parameter: str, w_OI: Tensor, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Quantise a dense weight as loading would.

        Args:
            parameter: the model's name of the weight.
            w_OI: the weight, in the dtype that the plain model has.
            like: the parts that it replaces, which must come out alike in names, shapes and dtypes; what the weight
                does not tell (scales of static activations) is taken over from them.

        Returns:
            Part -> tensor, on the CPU, as `save_pretrained` would write them.

        Raises:
            CheckpointError: the library cannot quantise it (on this machine), or makes other parts of it.
        """
        module = self._module(parameter)
        try:
            with torch.no_grad(), self._emptied(module):
                parts = self._quantised(parameter, module, w_OI)
        except Exception as error:  # whatever a library raises where a kernel is missing
            raise CheckpointError(f"{parameter}: {self.method} cannot quantise it here: {error}") from error
        for name, old in (like or {}).items():
            if name == "activation_scale":
                parts[name] = old
        if like is not None and (unlike := _unlike(parts, like)):
            raise CheckpointError(
                f"{parameter}: quantised again it has other parts than the folder stores (written by another version "
                f"of {self.method.split()[0]}?):" + bullet_list(unlike, _MISSES_TOLD)
            )
        return parts

    def metadata_of(self, parameter: str) -> dict[str, str]:
        """What the header of the file must say of a weight that `pack` made: its entry, under the model's name."""
        return {parameter: self._metadata[parameter]} if parameter in self._metadata else {}

    @property
    def with_metadata(self) -> bool:
        """Whether files in this format describe their tensors in their headers."""
        return self.method.startswith("torchao")

    def _module(self, parameter: str) -> Any:
        return self._model.get_submodule(parameter.rpartition(".")[0])

    def _quantised(self, parameter: str, module: Any, w_OI: Tensor) -> dict[str, Tensor]:
        path, name = parameter.rpartition(".")[0], parameter.rpartition(".")[2]
        # bitsandbytes' Conv1D was turned round by transformers when it read a plain checkpoint: w is (O, I) already.
        source, module.__dict__["source_cls"] = module.__dict__.get("source_cls"), nn.Linear
        try:
            made = self._quantizer.get_quantize_ops().convert(
                {parameter: w_OI.contiguous()}, full_layer_name=parameter, model=self._model, missing_keys=set()
            )
        finally:
            module.__dict__["source_cls"] = source
        if f"{path}.weight_scale_inv" in made:
            return {key.removeprefix(f"{path}."): tensor.cpu().contiguous() for key, tensor in made.items()}
        if parameter in made:
            module._parameters[name] = made[parameter]
        state = {
            key: tensor
            for key, tensor in module.state_dict(prefix=f"{path}.").items()
            if not tensor.is_meta and key != f"{path}.bias"
        }
        flat, metadata = self._quantizer.get_state_dict_and_metadata(SimpleNamespace(state_dict=lambda: state))
        self._metadata |= {key: value for key, value in metadata.items() if key == parameter}
        whole = state if flat is None else flat
        return {key.removeprefix(f"{path}."): tensor.cpu().contiguous() for key, tensor in whole.items()}

    def _deserialised(self, parameter: str, parts: Mapping[str, Tensor]) -> Tensor:
        if self.with_metadata:
            if parameter not in self._metadata:
                raise ValueError("the header of its file does not describe it")
            # The whole metadata would be searched for each weight.
            of_this = {parameter: self._metadata[parameter], "tensor_names": json.dumps([parameter])}
            self._quantizer.metadata = of_this
        self._quantizer.pre_quantized, was = True, self._quantizer.pre_quantized
        try:
            [operation] = [
                operation
                for converter in self._quantizer.get_weight_conversions()
                for operation in converter.operations
            ][:1]
            made = operation.convert(
                {name: [part] for name, part in parts.items()},
                source_patterns=list(parts),
                full_layer_name=parameter,
                model=self._model,
                missing_keys=set(),
            )
        finally:
            self._quantizer.pre_quantized = was
        return next(iter(made.values()))

    @contextmanager
    def _emptied(self, module: Any) -> Iterator[None]:
        """Give a module its empty weight back, so that one module at a time holds its own."""
        weight: Any = module._parameters.get("weight")
        notes = dict(getattr(weight, "__dict__", {}))
        try:
            yield
        finally:
            module._parameters["weight"] = weight
            if weight is not None:
                weight.__dict__.clear()
                weight.__dict__.update(notes)


def _installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except (ImportError, ValueError):
        return False


def _dtype_of(model: PreTrainedModel) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1), torch.bfloat16)


def _shape_of(module: Any) -> tuple[int, int]:
    """(O, I), whatever holds the weight at the moment."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return getattr(module, "out_features", 0), getattr(module, "in_features", 0)


def _dense_of(weight: Any) -> Tensor:
    """What a library's weight is, (O, I)."""
    kind = type(weight).__name__
    if kind in ("Params4bit", "Int8Params"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        if kind == "Int8Params":
            scales: Any = SimpleNamespace(SCB=weight.SCB)
            return dequantize_bnb_weight(weight, scales)
        # As one long row: on the CPU bitsandbytes 0.50.2 takes the wrong scales where a row is no multiple of a block.
        state = weight.quant_state
        state.shape, shape = torch.Size([math.prod(state.shape)]), state.shape
        return dequantize_bnb_weight(weight).reshape(shape)
    if type(weight).__module__.startswith("torchao"):
        return weight.dequantize()
    raise ValueError(f"it is a {kind}, which nothing here dequantises")


def _float8(quantizer: Any, parts: Mapping[str, Tensor], block: Any) -> Tensor:
    weight, scale = parts["weight"], parts["weight_scale_inv"]
    if block is not None and weight.dim() == 2:
        grid = tuple(-(-size // side) for size, side in zip(weight.shape, block, strict=True))
        if scale.shape != grid:
            raise ValueError(f"its blocks of {block[0]} × {block[1]} have {tuple(scale.shape)} scales; expected {grid}")
        if any(size % side for size, side in zip(weight.shape, block, strict=True)):
            # transformers takes the size of a block from the number of scales, which is another where the last block
            # is a smaller one.
            each = scale.repeat_interleave(block[0], 0)[: weight.shape[0]].repeat_interleave(block[1], 1)
            return (weight.float() * each[:, : weight.shape[1]].float()).to(scale.dtype)
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    made = Fp8Dequantize(quantizer).convert({name: [part] for name, part in parts.items()})
    return next(iter(made.values()))  # pyright: ignore[reportReturnType]


def _unlike(parts: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> list[str]:
    def described(of: Mapping[str, Tensor], name: str) -> str:
        return f"{tuple(of[name].shape)} {str(of[name].dtype).removeprefix('torch.')}" if name in of else "missing"

    # The length of bitsandbytes' own JSON follows the digits of its offset.
    names = sorted({*parts, *like})
    return [
        f"{name}: {described(parts, name)}; stored {described(like, name)}"
        for name in names
        if described(parts, name) != described(like, name) and "quant_state." not in name
    ]


def _plain(value: Any) -> Any:
    """A configuration as JSON takes it; objects of a library by their names."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else f"{type(value).__name__} {value}"
