"""Reading GGUF files: what one is, and the model in it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from theodora.errors import CheckpointError, UsageError
from theodora.export.gguf_bounds import check_bounds, checked_config, shapes_of
from theodora.extras import pip_line
from theodora.files.classes import capped_attention, check_kernels, model_alone

# From exact to coarse: what writing a form may have rounded to. "unknown" is a server's.
PRECISIONS = ("float32", "float16", "bfloat16", "quantised", "unknown")


FILE_TYPES = {
    "q2_k": 10,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_0": 2,
    "q4_1": 3,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_0": 8,
    "q5_1": 9,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
    "q8_0": 7,
}
"""Kind -> its number in llama.cpp's `llama_ftype`. (The IQ kinds want an importance matrix, for which there is no place
here.)"""


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself."""

    type: str
    """model or adapter."""
    architecture: str
    precision: str
    """Of its matrices: float32, float16, bfloat16 or quantised."""
    kind: str | None = None
    """One of `FILE_TYPES`, if it says that it is."""


def require_gguf() -> None:
    """Raise a UsageError if the package is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(f"GGUF files are read and written with the package gguf, which is missing: {pip_line('demo')}")


def open_reader(path: Path) -> Any:
    """`gguf.GGUFReader`, with a damaged file as our own error."""
    require_gguf()
    import gguf

    check_bounds(path)
    try:
        return gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a GGUF file, or is damaged: {error}") from error


def text_field(reader: Any, key: str, otherwise: str) -> str:
    """A text of the header."""
    field = reader.get_field(key)
    return otherwise if field is None else str(field.contents())


def read_gguf_header(path: Path) -> GgufHeader:
    """What kind of GGUF file this is.

    Raises:
        CheckpointError: it is none, or is damaged.
        UsageError: the package `gguf` is missing.
    """
    reader = open_reader(path)
    matrices = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    return GgufHeader(
        text_field(reader, "general.type", "model"),
        text_field(reader, "general.architecture", ""),
        coarsest(matrices),
        file_type(reader),
    )


def file_type(reader: Any) -> str | None:
    """The kind that a file's header names, as in `FILE_TYPES`; None for another."""
    field = reader.get_field("general.file_type")
    number = None if field is None else int(field.contents())
    return next((kind for kind, own in FILE_TYPES.items() if own == number), None)


def coarsest(dtypes: set[str]) -> str:
    """The coarsest of some dtypes, by their names in safetensors and GGUF, as one of `PRECISIONS`."""
    names = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    whole = {name for name in dtypes if name[0] in "IUB" and name != "BF16"}  # buffers of integers and truth values
    precisions = {names.get(name, "quantised") for name in dtypes - whole}
    return max(precisions, key=PRECISIONS.index, default="float32")


class UnreadArchitecture(CheckpointError):
    """transformers has no reader for GGUF files of this architecture."""


def load_gguf(
    path: Path, dtype: str, base_model: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, str | None]:
    """The model of a GGUF file through transformers, which dequantises it; its tokenizer if that loads; and a note.

    Args:
        path: the file.
        dtype: of the weights.
        base_model: whose configuration to take for what can be read neither by transformers nor here.

    Raises:
        UnreadArchitecture: transformers does not read files of this architecture.
        CheckpointError: it does not load this one.
    """
    open_reader(path)  # says what is damaged
    try:
        model, note = _load(path, dtype, base_model)
    except (ValueError, OSError, NotImplementedError, KeyError, RuntimeError) as error:
        if "not supported" in str(error):
            raise UnreadArchitecture(f"transformers does not read {path}: {error}") from error
        if base_model is None:
            raise CheckpointError(f"transformers does not load {path}: {error}") from error
        try:
            config = AutoConfig.from_pretrained(base_model, trust_remote_code=False)
            check_kernels(config, base_model)
            model = _model(path, dtype, config, shapes_of(config))
        except (ValueError, OSError, NotImplementedError, KeyError, RuntimeError) as again:
            raise CheckpointError(f"transformers does not load {path}: {again}") from again
        note = (
            "transformers reads too little of this file's header to build the model, so the base's configuration stood "
            "in: the weights were compared, the header was not."
        )
    try:
        with redirect_stderr(StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except Exception:  # whatever an unfinished converter raises: the weights can be compared without a tokenizer
        tokenizer = None
    return model, tokenizer, note


def _load(path: Path, dtype: str, base_model: str | None) -> tuple[PreTrainedModel, str | None]:
    """The model as the file's own header describes it, and what of that transformers did not read."""
    with _silent():
        described = checked_config(path)
    notes: list[str] = []
    if described.completed:
        fields = ", ".join(described.completed)
        notes.append(f"transformers leaves out a part of this file's header, which was read here: {fields}.")
    if described.scaling is not None:
        left_out = f"transformers leaves out this file's scaling of positions ({described.scaling})"
        base = AutoConfig.from_pretrained(base_model, trust_remote_code=False) if base_model is not None else None
        if (rope := getattr(base, "rope_parameters", None)) is None:
            notes.append(f"{left_out}; llama.cpp does not.")
        else:
            described.config.rope_parameters = rope
            notes.append(f"{left_out}, so the base's stood in: the weights were compared, the scaling was not.")
    return _model(path, dtype, described.config, described.shapes), " ".join(notes) or None


def _model(path: Path, dtype: str, config: Any, shapes: dict[str, torch.Size]) -> PreTrainedModel:
    with _silent():
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=getattr(torch, dtype),
            config=config,
            trust_remote_code=False,
            **model_alone(path.parent),
            **capped_attention(config),
        )
    # Some versions of transformers take tensors of other shapes than the configuration's without a word.
    wrong = [name for name, p in model.named_parameters() if p.shape != shapes.get(name, p.shape)]
    if wrong:
        raise ValueError(f"{wrong[0]} is of another shape than the header says")
    return model


@contextmanager
def _silent() -> Iterator[None]:
    """transformers shows a bar here that no setting turns off, and a table of what did not fit before it raises."""
    level = get_verbosity()
    set_verbosity_error()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        set_verbosity(level)
