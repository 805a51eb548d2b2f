"""A quantised checkpoint seen as a plain one: each packed weight is one tensor, dequantised as it is read."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from theodora.errors import CheckpointError
from theodora.files.distrust import FLOAT_DTYPES
from theodora.files.folder import OpenFile
from theodora.files.model_folder import StoredTensor
from theodora.files.packed import PackedWeights
from theodora.files.quantisation_config import check_named
from theodora.files.safetensors import read_header
from theodora.kernels.float8 import dequantized, quantize_rows

OWN_FLOAT8 = "theodora-float8"
"""The `quant_method` that stands for our own float8."""
_MULTIPLE = 16  # as in `quantize_base`
_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}


class Checkpoint(Protocol):
    """What is needed of a `BaseCheckpoint`."""

    folder: Any
    model: PreTrainedModel
    tensors: dict[str, StoredTensor]
    stored: dict[str, StoredTensor]
    keys: dict[str, str]

    def read_stored(self, key: str) -> Tensor:
        """One tensor as it stands in the files."""
        ...


def quantisation_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` of a config.json; None of a plain model. Errors as those of `check_named`."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and (found := part.get("quantization_config")) is not None:
            check_named(found)
            return dict(found)
    return None


def plain_view(stored: Mapping[str, StoredTensor], parts: Mapping[str, Mapping[str, str]]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, of a quantised weight one, where the first of its parts stands."""
    weight_of = {key: weight for weight, of_weight in parts.items() for key in of_weight.values()}
    view: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        view.setdefault(weight_of.get(key, key), replace(tensor, key=weight_of.get(key, key)))
    return view


def store_of(
    base: Checkpoint,
    twin: PreTrainedModel,
    config: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, str]],
    *,
    stored: bool,
    plain: torch.dtype | None = None,
) -> QuantisedStore:
    """The quantised weights of a checkpoint; arguments and errors as those of `QuantisedStore`."""
    where = f"The base model {base.folder}"
    if config.get("quant_method") == OWN_FLOAT8 and not stored:
        return QuantisedStore(base, RowFloat8(twin), config, parts, stored=False, plain=plain)
    metadata = _metadata(base) if stored else {}
    packed = PackedWeights(twin, config, stored=stored, metadata=metadata, where=where)
    return QuantisedStore(base, packed, config, parts, stored=stored, plain=plain)


class RowFloat8:
    """Our own float8 (`quantize_base`), which no folder stores: a scale for each row."""

    method = "float8 with a scale for each row"
    with_metadata = False

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def wanted(self, parameter: str) -> bool:
        """Whether `quantize_base` puts this parameter into float8."""
        module = self._model.get_submodule(parameter.rpartition(".")[0])
        return (
            parameter.endswith(".weight")
            and isinstance(module, nn.Linear | Conv1D)
            and module is not self._model.get_output_embeddings()
            and parameter not in self._model.all_tied_weights_keys
            and not any(size % _MULTIPLE for size in module.weight.shape)
        )

    def pack(self, parameter: str, w_OI: Tensor, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """W8 and its scales."""
        w8_OI, scale_O = quantize_rows(w_OI)
        return {"weight": w8_OI, "weight_scale": scale_O}

    def dense(self, parameter: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The numbers that they stand for, (O, I), float32."""
        return dequantized(parts["weight"], parts["weight_scale"], torch.float32)

    def metadata_of(self, parameter: str) -> dict[str, str]:
        """None."""
        return {}


class QuantisedStore:
    """The quantised weights of a checkpoint.

    Args:
        base: the checkpoint.
        packed: what reads and makes one of them.
        config: the `quantization_config`.
        parts: as `group_parts` finds them; empty for a plain checkpoint, whose weights are quantised as they are read.
        stored: whether the files are quantised.
        plain: what weights of plain files are rounded to before they are quantised. Default: they stay as they are.

    Raises:
        CheckpointError: see `PackedWeights`; or a packed weight is none of the model's.
    """

    def __init__(
        self,
        base: Checkpoint,
        packed: PackedWeights | RowFloat8,
        config: Mapping[str, Any],
        parts: Mapping[str, Mapping[str, str]],
        *,
        stored: bool,
        plain: torch.dtype | None = None,
    ) -> None:
        # (weakly: the checkpoint holds this)
        self._of: Callable[[], Any] = weakref.ref(base)
        self.stored, self.parts, self.packed, self.config = stored, parts, packed, dict(config)
        by_key = {key: name for name, key in base.keys.items()}
        if stored:
            if lost := [key for key in parts if key not in by_key]:
                raise CheckpointError(
                    f"{base.folder} holds packed weights that its model does not have: {', '.join(lost[:5])}"
                )
            weights = {name for name, _ in base.model.named_parameters(remove_duplicate=False)}
            alone = {key for key, name in by_key.items() if name in weights and key not in parts}
            bare = sorted(key for key in alone if base.tensors[key].dtype not in FLOAT_DTYPES)
            if bare:
                raise CheckpointError(
                    f"{base.folder} holds packed weights without what they were packed with (scales, states): "
                    + ", ".join(bare[:5])
                )
            self.parameters = {key: by_key[key] for key in parts}
        else:
            floats = (key for key in by_key if base.tensors[key].dtype in FLOAT_DTYPES)
            self.parameters = {key: by_key[key] for key in floats if self.packed.wanted(by_key[key])}
        if not self.parameters:
            raise CheckpointError(f"{base.folder} holds no weight quantised with {self.packed.method}")
        self._dtype, self._plain = _plain_dtype(base), plain

    def _base(self) -> Checkpoint:
        return self._of()

    def described(self) -> dict[str, StoredTensor]:
        """The quantised weights by their keys, as a plain checkpoint would have them."""
        tensors = self._base().tensors
        return {
            key: replace(
                tensors[key],
                shape=tuple(self._base().model.get_parameter(name).shape),
                dtype=_NAMES[self._dtype] if self.stored else tensors[key].dtype,
            )
            for key, name in self.parameters.items()
        }

    def read(self, key: str) -> Tensor:
        """A weight dequantised, in the layout of the plain model: (in, out) for a Conv1D."""
        return self.dense(key, self.read_parts(key))

    def dense(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        """What the parts of a weight stand for, in the layout of the plain model."""
        dense = self.packed.dense(self.parameters[key], parts)
        return dense.T.contiguous() if self.turned(key) else dense

    def read_parts(self, key: str) -> dict[str, Tensor]:
        """Part -> tensor of a weight: as they are stored, or as quantising a plain one makes them."""
        if self.stored:
            return {part: self._base().read_stored(stored) for part, stored in self.parts[key].items()}
        weight = self._base().read_stored(key)
        return self.pack(key, weight if self._plain is None else weight.to(self._plain))

    def pack(self, key: str, weight: Tensor, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Quantise a weight in the layout of the plain model; see `PackedWeights.pack`."""
        w_OI = weight.T.contiguous() if self.turned(key) else weight
        return self.packed.pack(self.parameters[key], w_OI, like)

    def part_key(self, key: str, part: str) -> str:
        """The key that a part is stored under."""
        return self.parts[key][part] if self.stored else f"{key.removesuffix('.weight')}.{part}"

    def turned(self, key: str) -> bool:
        """Whether the plain model stores the weight as (in, out)."""
        return isinstance(self._base().model.get_submodule(self.parameters[key].rpartition(".")[0]), Conv1D)


def _metadata(base: Checkpoint) -> dict[str, str]:
    """What the headers of all files say."""
    metadata: dict[str, str] = {}
    for path in sorted({tensor.file for tensor in base.stored.values()}):
        with OpenFile.at(path) as file:
            metadata |= read_header(file).metadata
    return metadata


def _plain_dtype(base: Checkpoint) -> torch.dtype:
    dtype = base.model.config.dtype or base.model.config.get_text_config().dtype
    return dtype if dtype in _NAMES else torch.bfloat16
