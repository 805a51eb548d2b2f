"""A base model on disk, read tensor by tensor, and which stored tensor is which parameter of the transformers model.

The names in a checkpoint and those in the loaded model differ more often than one would think: GPT-2's files lack the
prefix `transformer.`, GPT-NeoX's head is stored as `embed_out`, experts are stored one by one and loaded fused. The
model class itself knows: it is built here without memory (on the meta device), and its own loading rules are asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key, revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from theodora.errors import CheckpointError, shown
from theodora.files.classes import auto_classes, check_kernels, scores_texts
from theodora.files.distrust import FLOAT_DTYPES, expanded
from theodora.files.folder import OpenFile, read_file
from theodora.files.model_bounds import Stored, bounded_build, check_layers
from theodora.files.model_folder import StoredTensor, read_headers, scoring_name
from theodora.files.packed import group_parts, method_of
from theodora.files.peft_options import PEFTS_HEADS
from theodora.files.pieces import Piece, pieces_of
from theodora.files.quantisation_config import method_named
from theodora.files.quantised_store import QuantisedStore, plain_view, quantisation_of, store_of
from theodora.files.safetensors import Header, read_header, read_tensor
from theodora.layers.experts import stored_transposed
from theodora.parse import parse_json
from theodora.synonyms import Names

# What a merge needs of a model on the hub; left out are the weights' copies in other formats.
_HUB_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
_HUB_IGNORED = ("*/*.safetensors", "consolidated*")


def find_base(name: str | None, *, revision: str | None = None, download: bool = False) -> Path:
    """The folder of a base model given by its folder or its hub name.

    Args:
        name: what the adapter's configuration names as its base, or what the user gave instead.
        revision: branch, tag or commit, for a model on the hub.
        download: whether a model that is not in the local hub cache may be fetched.

    Raises:
        CheckpointError: there is no such folder, and no such model in the cache (or on the hub).
    """
    if not name:
        raise CheckpointError("The adapter does not say which base model it belongs to. Name it with --base-model.")
    folder = expanded(name)
    if folder.is_dir():
        return folder.resolve()
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise CheckpointError(
            f"The base model {shown(name)[1:-1]} is not a folder on this machine. Name it with --base-model."
        )
    try:
        snapshot = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(_HUB_PATTERNS),
            ignore_patterns=list(_HUB_IGNORED),
            local_files_only=not download,
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:  # HFValidationError is the last
        where = "a folder, in the local hub cache, or on the hub" if download else "a folder or in the local hub cache"
        raise CheckpointError(f"The base model {name} is not {where}. Name its folder with --base-model.") from error
    return Path(snapshot)


class BaseCheckpoint:
    """A model folder with safetensors weights, opened without loading them.

    Args:
        folder: the model's folder.
        trust_remote_code: whether Python code in the folder may run.
        dequantise: whether a quantised folder is read as if its weights were stored dequantised, each as one tensor
            under the key of the plain weight, which is dequantised as it is read.
        quantised_as: what an unquantised folder is quantised with as it is read, and dequantised again: transformers'
            `quantization_config` as a mapping. Implies `dequantise`.
        quantised_from: what its weights are rounded to before. Default: they stay as they are.
        heads: parameter -> its values, of an adapter for sequence classification: the model is of that class, its head
            among the tensors with these values if the folder has none, and the language model's own head not.

    Raises:
        CheckpointError: the folder holds no usable safetensors weights; they are quantised, and that was not asked for;
            or the library that reads them is missing.
    """

    folder: Path
    config: dict[str, Any]
    """config.json as it stands."""
    tensors: dict[str, StoredTensor]
    """Every tensor by its key, file by file in the order of their bytes; a quantised weight is one tensor."""
    stored: dict[str, StoredTensor]
    """Every tensor of the files by its key: of a quantised weight its parts."""
    model: PreTrainedModel
    """The model class, without weights (on the meta device)."""
    keys: dict[str, str]
    """Parameter of the model -> key in the checkpoint."""
    converted: dict[str, list[str]]
    """Parameter of the model -> keys it is computed from, where loading does more than rename."""
    pieces: dict[str, Piece]
    """Key -> what it holds of such a parameter, where that is known: experts stored one by one, or turned."""
    quantised: QuantisedStore | None
    """How the weights are packed that `read` dequantises; None where nothing is quantised."""

    def __init__(
        self,
        folder: Path,
        *,
        trust_remote_code: bool = False,
        dequantise: bool = False,
        quantised_as: Mapping[str, Any] | None = None,
        quantised_from: torch.dtype | None = None,
        heads: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.folder = folder
        self.config = read_config(folder)
        dequantise = dequantise or quantised_as is not None
        quantisation = quantisation_of(self.config)
        if quantisation is not None and not dequantise:
            raise CheckpointError(
                f"The base model {folder} is quantised ({method_of(quantisation)}): merging into it would round every "
                "weight again. Name the unquantised model it was made from with --base-model."
            )
        self.stored, self._trusted = read_headers(folder), trust_remote_code
        parts = {} if quantisation is None else group_parts(self.stored, method_named(quantisation))
        self.tensors = plain_view(self.stored, parts)
        self._labels, self.heads = _labels(heads), {}
        for model in self._meta_models():
            self.model = model
            self._to_model_name, self.keys, self.converted, self.pieces = _map_names(model, self.tensors)
            if not _missing(model, {*self.keys, *self.converted}):
                break
        if self._labels is not None and heads is not None:
            self._take_heads(heads)
        self.quantised = None
        if quantisation is not None or quantised_as is not None:
            config: Mapping[str, Any] = quantisation or quantised_as or {}
            self.quantised = store_of(
                self, self.twin(), config, parts, stored=quantisation is not None, plain=quantised_from
            )
            self.tensors |= self.quantised.described()
        self._names = Names([*self.keys, *self.converted, *self._tied()])
        self._unloaded = Names(self.unloaded())
        self._open: tuple[OpenFile, Header] | None = None
        self._of_experts: dict[str, tuple[int, ...]] | None = None

    @property
    def scores(self) -> bool:
        """Whether the model is of a class for sequence classification, as `heads` asked for."""
        return self._labels is not None and scoring_name([type(self.model).__name__]) is not None

    def model_name(self, name: str) -> str | None:
        """The model's own name for a parameter that an adapter or an older checkpoint may call otherwise.

        Where the model holds it in another form (experts are stored one by one and loaded fused), but the checkpoint
        has it under just this name, that name: adapters of older transformers were trained on such modules. Names that
        other classes of the same weights give to it are known, too (see `synonyms.py`).
        """
        renamed = self._to_model_name(name)
        if renamed in self.keys or renamed in self._tied():
            return renamed
        if name in self.tensors:
            return name
        if renamed in self.converted:
            return renamed
        return self._names.find(name) or self._unloaded.find(name)

    def unloaded(self) -> list[str]:
        """Keys of what the model does not load: a vision tower, where the class is the language model alone."""
        loaded = {*self.keys.values(), *(key for keys in self.converted.values() for key in keys)}
        return [key for key in self.tensors if key not in loaded]

    def key_of(self, parameter: str) -> str | None:
        """The key that holds `parameter`, perhaps under the name of the parameter that it is tied to."""
        if parameter in self.keys:
            return self.keys[parameter]
        tied = next((self.keys[other] for other in self.tied_to(parameter) if other in self.keys), None)
        return parameter if tied is None and parameter in self.tensors else tied

    def tied_to(self, parameter: str) -> list[str]:
        """The other parameters that share their values with `parameter`."""
        groups = self._tied()
        source = groups.get(parameter, parameter)
        family = [source, *(target for target, other in groups.items() if other == source)]
        return [other for other in family if other != parameter] if parameter in family else []

    def new_key(self, parameter: str) -> str:
        """The key to store `parameter` under when the checkpoint has none for it yet."""
        key = next(iter(revert_weight_conversion(self.model, {parameter: torch.empty(0)})))
        return key if self._to_model_name(key) == parameter else parameter

    def is_transposed(self, parameter: str) -> bool:
        """Whether the weight is stored (in, out), as that of GPT-2's Conv1D and of embeddings is."""
        if parameter not in self.keys and parameter not in self._tied():
            return False
        module = self.model.get_submodule(parameter.rpartition(".")[0])
        if parameter in self.experts():
            return stored_transposed(module)
        return isinstance(module, Conv1D | nn.Embedding)

    def weight_name(self, path: str) -> str | None:
        """The parameter that is the weight at a path: of a module, or one of several experts, which is its own path."""
        name = self.model_name(path)
        if name is not None and name in self.experts():
            return name
        return self.model_name(f"{path}.weight")

    def pieces_of(self, parameter: str) -> dict[str, Piece]:
        """Key -> what it holds of a parameter that is stored in pieces."""
        return {key: self.pieces[key] for key in self.converted.get(parameter, ()) if key in self.pieces}

    def read_whole(self, parameter: str) -> Tensor | None:
        """A parameter as the model has it, put together from its pieces; None if the base does not store it so."""
        key = self.key_of(parameter)
        if key is not None:
            return self.read(key)
        pieces = self.pieces_of(parameter)
        dtype = FLOAT_DTYPES.get(self.tensors[next(iter(pieces))].dtype) if pieces else None
        if dtype is None:
            return None
        whole = torch.empty(self.experts()[parameter], dtype=dtype)
        for key, piece in pieces.items():
            piece.put_into(whole, self.read(key))
        return whole

    def experts(self) -> dict[str, tuple[int, ...]]:
        """Parameters of three dimensions, but those of convolutions: experts -> their shapes in the model."""
        if self._of_experts is None:
            self._of_experts = {
                f"{path}.{name}".lstrip("."): tuple(parameter.shape)
                for path, module in self.model.named_modules()
                if not isinstance(module, nn.Conv1d | nn.ConvTranspose1d)
                for name, parameter in module.named_parameters(recurse=False)
                if parameter.dim() == 3
            }
        return self._of_experts

    def read(self, key: str) -> Tensor:
        """One tensor, in memory of its own; a quantised weight dequantised."""
        if key in self.heads:
            return self.heads[key].clone()
        if self.quantised is not None and key in self.quantised.parameters:
            return self.quantised.read(key)
        return self.read_stored(key)

    def read_stored(self, key: str) -> Tensor:
        """One tensor as it stands in the files, in memory of its own."""
        stored = self.stored[key]
        try:
            if self._open is None or self._open[0].path != stored.file:
                self.close()
                self._open = (file := OpenFile.at(stored.file)), read_header(file)
            file, header = self._open
            if file.seen != stored.seen:
                raise ValueError("it is another file than before")
            return read_tensor(file, header, header.tensors[key])
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{stored.file} changed while the model was read: {error}") from error

    def twin(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model once more, without weights (on the meta device); in `dtype`, if one is given."""
        return next(model for model in self._meta_models(dtype) if type(model) is type(self.model))

    def _meta_models(self, dtype: torch.dtype | None = None) -> Iterator[PreTrainedModel]:
        return _meta_models(self.folder, self._trusted, self.config, _stored(self.stored), dtype, self._labels)

    def _take_heads(self, heads: Mapping[str, Tensor]) -> None:
        """Take a head that the folder does not have among the tensors, and leave out what the class does not load."""
        for key in self.unloaded():
            del self.tensors[key]
        file = next(iter(self.stored.values())).file
        for name in _missing(self.model, {*self.keys, *self.converted}):
            if name in heads:
                tensor = self.heads[name] = heads[name]
                self.tensors[name] = StoredTensor(name, file, tuple(tensor.shape), _NAMES[tensor.dtype])
                self.keys[name] = name

    def close(self) -> None:
        """Let go of the file read last."""
        if self._open is not None:
            self._open[0].close()
        self._open = None

    def __del__(self) -> None:
        if getattr(self, "_open", None) is not None:  # somebody failed on the way to close()
            self.close()

    def _tied(self) -> dict[str, str]:
        return self.model.all_tied_weights_keys


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
        CheckpointError: there is none, it is no JSON object, or the folder is an adapter.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is an adapter, not a model. Name the adapter's base model instead.")
    try:
        config = parse_json(read_file(folder / "config.json").decode("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a model folder: it has no config.json.") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is not valid JSON ({error}).") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} holds {type(config).__name__}; expected an object.")
    return config


def _stored(tensors: dict[str, StoredTensor]) -> Stored:
    return Stored(len(tensors), sum(file.stat().st_size for file in {stored.file for stored in tensors.values()}))


def _labels(heads: Mapping[str, Tensor] | None) -> int | None:
    """How many numbers a head for sequence classification gives; None without one."""
    names = (f"{name}.weight" for name in PEFTS_HEADS["SEQ_CLS"])
    return next((len(heads[name]) for name in names if heads and name in heads), None)


def _meta_models(
    folder: Path,
    trust_remote_code: bool,
    fields: dict[str, Any],
    stored: Stored,
    dtype: torch.dtype | None = None,
    labels: int | None = None,
) -> Iterator[PreTrainedModel]:
    """The model as each class that `load_model` would try, in the same order: adapters are trained on its choice."""
    try:
        check_layers(folder, fields, stored.tensors)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        check_layers(folder, config.to_dict(), stored.tensors)
        check_kernels(config, folder, trust_remote_code=trust_remote_code)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        try:
            if labels is not None and scores_texts(config):
                config.num_labels = labels
                classes = [AutoModelForSequenceClassification]
            else:
                classes = auto_classes(config, folder, trust_remote_code=trust_remote_code)
        except CheckpointError:
            if named is None:
                raise
            classes = []  # no language model: merging asks for names alone
        builders = [partial(chosen.from_config, config, trust_remote_code=trust_remote_code) for chosen in classes]
        for build in builders or [partial(named._from_config, config)]:  # pyright: ignore[reportOptionalMemberAccess]
            with torch.device("meta"), bounded_build(folder, fields, stored):
                model = build() if dtype is None else build(dtype=dtype)
            yield model
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises whatever a damaged configuration leads it to
        hint = "" if trust_remote_code else " If it brings its own code and you trust it, pass --trust-remote-code."
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot build the model in {folder}: {error}{hint}"
        ) from error


def _missing(model: PreTrainedModel, stored: set[str]) -> list[str]:
    """Parameters of the model that no stored tensor holds, themselves or through what they are tied to."""
    tied = model.all_tied_weights_keys
    filled = stored | {source for target, source in tied.items() if target in stored}
    return [name for name, _ in model.named_parameters() if name not in filled and tied.get(name) not in filled]


def _map_names(
    model: PreTrainedModel, stored: Mapping[str, StoredTensor]
) -> tuple[Callable[[str], str], dict[str, str], dict[str, list[str]], dict[str, Piece]]:
    """Follow transformers' own loading rules from each key of the checkpoint to a parameter of the model."""
    state = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def rename(key: str, *, convert: bool = True) -> tuple[str, str | None]:
        wanted = converters if convert else []
        name, pattern = rename_source_key(key, renamings, wanted, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        return name, pattern

    direct: dict[str, str] = {}
    converted: dict[str, dict[str, str]] = {}
    for key in stored:
        name, pattern = rename(key)
        if pattern is not None:
            converted.setdefault(name, {})[key] = pattern
        elif name in state:
            direct[name] = key
    pieces: dict[str, Piece] = {}
    for name, patterns in converted.items():
        first = next(iter(patterns.values()))
        converter = next(rule for rule in converters if first in rule.source_patterns)
        if name in state and not stored_transposed(model.get_submodule(name.rpartition(".")[0])):
            parts = {key: (pattern, stored[key].shape) for key, pattern in patterns.items()}
            pieces |= pieces_of(name, state[name].shape, parts, converter)
    keys = {name: list(patterns) for name, patterns in converted.items()}
    return lambda name: name if name in state else rename(name, convert=False)[0], direct, keys, pieces
