"""A merged model folder as one GGUF file, by the package `gguf`, or by llama.cpp's own converter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from theodora.errors import CheckpointError, ConfigError, UsageError, bullet_list
from theodora.export.gguf_files import open_reader, require_gguf
from theodora.export.gguf_names import Names, llama3_factors, names_of, write_sizes
from theodora.export.gguf_tokenizer import write_tokenizer
from theodora.export.gguf_written import check_finite, quantized, write_and_read_back
from theodora.files.adapter import AdapterFile
from theodora.files.base_model import BaseCheckpoint
from theodora.files.model_folder import has_tokenizer
from theodora.merging.plan import plan_merge

DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
_LONG = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# Buffers that transformers stores with the weights of some models, and that llama.cpp computes.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def gguf_dtype(name: str | None) -> str:
    """`Q8_0` for `q8_0`.

    Raises:
        ConfigError: none of `DTYPES`.
    """
    name = name or "fp16"
    name = _LONG.get(name, name)
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def check_gguf(file: AdapterFile, base: BaseCheckpoint) -> None:
    """Check that a base with an adapter merged in can be written as a GGUF file, before it is merged.

    Raises:
        CheckpointError: adapter and base do not fit; or as `write_gguf` does.
    """
    import gguf

    config: Any = base.model.config
    names = names_of(config)
    _placed(base, names)
    plan = plan_merge(base, file, torch.float32)
    base.close()
    writer = gguf.GGUFWriter(None, names.family.architecture)  # keeps in memory what it is given
    write_sizes(writer, config)
    tokenizer = file.path if has_tokenizer(file.path) else base.folder  # as in the merged folder
    write_tokenizer(writer, tokenizer, plan.vocabulary or config.vocab_size)


def write_gguf(model: Path, output: Path, name: str, dtype: str | None) -> None:
    """Write a model folder as a GGUF file: matrices in `dtype`, vectors in float32.

    Args:
        model: a plain model folder in float32.
        output: the file, which will be overwritten.
        name: of the model, for the header.
        dtype: one of `DTYPES`; default fp16.

    Raises:
        CheckpointError: a family, a tokenizer or a tensor that has no place in llama.cpp as far as is known here.
    """
    require_gguf()
    import gguf

    kind = getattr(gguf.GGMLQuantizationType, gguf_dtype(dtype))
    base = BaseCheckpoint(model)
    config: Any = base.model.config
    names = names_of(config)
    placed = _placed(base, names)
    writer = gguf.GGUFWriter(output, names.family.architecture, use_temp_file=False)
    try:
        writer.add_type("model")
        # transformers 5.23 takes a llama file of the very name "mistral" for an architecture it cannot read.
        writer.add_name(name if name != "mistral" else "Mistral")
        writer.add_file_type(getattr(gguf.LlamaFileType, _file_type(kind.name)))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_sizes(writer, config)
        write_tokenizer(writer, model, config.vocab_size)
        kinds = {to: kind if _is_matrix(base, key, kind) else gguf.GGMLQuantizationType.F32 for to, key in placed}
        for to, array in _arrays(base, names, placed, config):
            stored = kinds.get(to, gguf.GGMLQuantizationType.F32)
            data = quantized(to, array, stored)
            writer.add_tensor(to, data, raw_dtype=stored)
        write_and_read_back(writer, output)
    finally:
        writer.close()
        base.close()
    _check_tensors(output, base, names, placed)


def convert_with_llama_cpp(llama_cpp: Path, model: Path, output: Path, dtype: str | None) -> None:
    """Have llama.cpp's own converter write the file.

    Raises:
        UsageError: it is not there.
        CheckpointError: it failed.
    """
    script = converter_of(llama_cpp)
    outtype = {"F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "q8_0"}[gguf_dtype(dtype)]
    command = [sys.executable, str(script), str(model), "--outfile", str(output), "--outtype", outtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not output.is_file():
        raise CheckpointError(f"llama.cpp's converter failed:\n{done.stderr[-2000:]}")
    check_finite(output)


def has_converter(llama_cpp: Path) -> bool:
    """Whether a folder of llama.cpp is a checkout, and not its programs alone."""
    return (llama_cpp / "convert_hf_to_gguf.py").is_file()


def converter_of(llama_cpp: Path) -> Path:
    """The converter in a checkout of llama.cpp.

    Raises:
        UsageError: it is not there.
    """
    script = llama_cpp / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise UsageError(f"{llama_cpp} holds no convert_hf_to_gguf.py; name a checkout of llama.cpp")
    return script


def _placed(base: BaseCheckpoint, names: Names) -> list[tuple[str, str]]:
    """(name in GGUF, key in the checkpoint) of every tensor that is written.

    Raises:
        CheckpointError: listing the tensors that have no name there.
    """
    parameter_of = {key: name for name, key in base.keys.items()}
    tied = {name for name, _ in base.model.named_parameters(remove_duplicate=False)} - base.keys.keys()
    placed: list[tuple[str, str]] = []
    problems: list[str] = []
    for key in base.tensors:
        parameter = parameter_of.get(key, key)
        if key.endswith(_BUFFERS) or parameter in tied:
            continue
        name = names.of(parameter)
        if name is None:
            problems.append(f"{key}: no such tensor in llama.cpp's {names.family.architecture}")
        else:
            placed.append((name, key))
    problems += [f"{', '.join(keys)}: stored in pieces for {name}" for name, keys in base.converted.items()]
    if problems:
        raise CheckpointError(f"{base.folder} cannot be written as GGUF:" + bullet_list(problems, 20))
    return placed


def _is_matrix(base: BaseCheckpoint, key: str, kind: Any) -> bool:
    """Whether a tensor is stored in the dtype asked for: matrices, in whole blocks."""
    import gguf

    shape = base.tensors[key].shape
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return len(shape) == 2 and all(size % block == 0 for size in shape)


def _arrays(
    base: BaseCheckpoint, names: Names, placed: list[tuple[str, str]], config: Any
) -> Iterator[tuple[str, Any]]:
    """Name and float32 array of every tensor, as llama.cpp wants it."""
    factors = llama3_factors(config)
    if factors is not None:
        yield "rope_freqs.weight", torch.tensor(factors).numpy()
    for name, key in placed:
        yield name, _translated(base, names, name, key).numpy()


def _translated(base: BaseCheckpoint, names: Names, name: str, key: str) -> Tensor:
    tensor = base.read(key).float()
    parameter = next((p for p, k in base.keys.items() if k == key), key)
    if tensor.ndim == 2 and "embd" not in name and base.is_transposed(parameter):
        tensor = tensor.T  # GPT-2's Conv1D; embeddings stay (V, O)
    if names.family.norm_shift and name.endswith("norm.weight"):
        tensor = tensor + names.family.norm_shift
    return names.rows(name, tensor).contiguous()


def _check_tensors(path: Path, base: BaseCheckpoint, names: Names, placed: list[tuple[str, str]]) -> None:
    """Read back what was written: every tensor's name, shape, and values to its dtype's precision.

    Raises:
        CheckpointError: listing what differs.
    """
    from gguf import dequantize

    # Relative rounding error of each kind, and some room.
    bounds = {"F32": 0.0, "F16": 1e-3, "BF16": 8e-3, "Q8_0": 2e-2}
    stored = {tensor.name: tensor for tensor in open_reader(path).tensors}
    problems: list[str] = []
    for name, key in placed:
        expected = _translated(base, names, name, key)
        if name not in stored:
            problems.append(f"{name}: missing")
            continue
        values = torch.from_numpy(dequantize(stored[name].data, stored[name].tensor_type).copy()).reshape(
            expected.shape
        )
        error = float(torch.linalg.vector_norm(values - expected))
        if not error <= bounds[stored[name].tensor_type.name] * float(torch.linalg.vector_norm(expected)):
            problems.append(f"{name}: other values than were written")
    base.close()
    if problems:
        raise CheckpointError(f"{path} does not read back right:" + bullet_list(problems, 20))


def _file_type(kind: str) -> str:
    return {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}[kind]
