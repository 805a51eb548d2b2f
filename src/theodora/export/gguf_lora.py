"""A LoRA in GGUF, as llama.cpp's `--lora` takes it, and back onto a model.

    general.type adapter    adapter.type lora    adapter.lora.alpha
    <name>.weight.lora_a    (R, I)
    <name>.weight.lora_b    (O, R)

llama.cpp scales every layer by alpha / (its own rank), and knows neither rsLoRA nor an alpha for each layer. So the
file's alpha is the adapter's rank, and the rest of a layer's scale goes into its B.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from theodora.config import AdapterConfig
from theodora.errors import CheckpointError, UsageError, bullet_list
from theodora.export.gguf_files import open_reader, require_gguf, text_field
from theodora.export.gguf_names import names_of
from theodora.export.gguf_written import write_and_read_back
from theodora.export.served import load_tensors
from theodora.files.adapter import AdapterFile
from theodora.files.base_model import BaseCheckpoint
from theodora.files.finite import finite
from theodora.files.names import KEY_PREFIX
from theodora.merging.plan import changed_copies_on_disk


def check_gguf_lora(file: AdapterFile, base: BaseCheckpoint, *, as_lora: bool = False) -> dict[str, str]:
    """Check that an adapter has a place in such a file.

    Args:
        file: the adapter.
        base: what it belongs to.
        as_lora: whether a DoRA becomes a plain LoRA first.

    Returns:
        Path of each module -> its name in GGUF.

    Raises:
        UsageError: the adapter is a DoRA.
        CheckpointError: listing every module that has no place in such a file.
    """
    if file.config.method == "dora" and not as_lora:
        raise UsageError(
            "GGUF files have no DoRA: export --to gguf, which merges it, or say --lora-rank R for a plain LoRA near it"
        )
    names = names_of(base.model.config)
    problems = [f"{key}: trained in full, for which such a file has no place" for key in file.full]
    problems += [f"{path}: rows of single tokens, for which such a file has no place" for path in file.token_rows]
    problems += [
        f"{key}: a base weight that the adapter changes, for which such a file has no place"
        for key in changed_copies_on_disk(base, file)
    ]
    stored = set(base.keys)
    placed: dict[str, str] = {}
    for path, tensors in file.modules.items():
        if tensors.a.dim() == 3:
            problems.append(f"{path}: experts, which are not written in such a file here")
            continue
        parameter = base.model_name(f"{path}.weight") or f"{path}.weight"
        gguf_name = names.of(parameter)
        if tensors.embedding or gguf_name is None:
            problems.append(f"{path}: an embedding, or no tensor of llama.cpp's {names.family.architecture}")
        elif parameter not in stored:
            problems.append(f"{path}: shares its weight with the embedding, and has none of its own in llama.cpp")
        else:
            placed[path] = gguf_name
    if problems:
        raise CheckpointError(
            "This adapter cannot be a LoRA in GGUF; export --to gguf instead:" + bullet_list(problems, 20)
        )
    return placed


def write_gguf_lora(file: AdapterFile, base: BaseCheckpoint, output: Path, name: str) -> None:
    """Write a plain LoRA adapter as a GGUF file, in float32.

    Raises:
        UsageError, CheckpointError: as `check_gguf_lora` does.
    """
    require_gguf()
    import gguf

    placed, names = check_gguf_lora(file, base), names_of(base.model.config)
    alpha = float(file.config.rank)
    writer = gguf.GGUFWriter(output, names.family.architecture, use_temp_file=False)
    try:
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for path, gguf_name in placed.items():
            tensors = file.modules[path]
            rank = tensors.a.shape[0]
            b = tensors.b.double() * (tensors.scale * rank / alpha)
            for part, tensor in (("a", tensors.a.float()), ("b", names.rows(gguf_name, b.float()))):
                if not finite(tensor):
                    raise CheckpointError(f"{path}: lora_{part} holds NaN or infinite values in float32")
                writer.add_tensor(f"{gguf_name}.lora_{part}", tensor.contiguous().numpy())
        write_and_read_back(writer, output)
    finally:
        writer.close()


def put_gguf_lora_on(model: PreTrainedModel, path: Path) -> None:
    """Load a LoRA in GGUF onto the transformers model it belongs to, by llama.cpp's rules.

    Raises:
        CheckpointError: the file is another model's, or no LoRA.
    """
    reader = open_reader(path)
    names = names_of(model.config)
    architecture, kind = text_field(reader, "general.architecture", ""), text_field(reader, "adapter.type", "")
    if architecture != names.family.architecture or kind != "lora":
        raise CheckpointError(f"{path} is a {kind or 'file without adapter.type'} for {architecture or 'no model'}")
    field: Any = reader.get_field("adapter.lora.alpha")
    alpha = float(field.contents()) if field is not None else 0.0
    paths: dict[str, str] = {}
    for module_path, module in model.named_modules():
        known = names.of(f"{module_path}.weight") if hasattr(module, "weight") else None
        if known is not None:
            paths[known] = module_path
    tensors: dict[str, Any] = {}
    ranks: dict[str, int] = {}
    for entry in reader.tensors:
        gguf_name, _, part = entry.name.rpartition(".")
        if gguf_name not in paths or part not in ("lora_a", "lora_b"):
            raise CheckpointError(f"{path}: {entry.name} has no place in this {architecture} model")
        array = torch.from_numpy(entry.data.copy()).float()
        if part == "lora_b":
            array = names.rows_back(gguf_name, array)
        else:
            ranks[paths[gguf_name]] = array.shape[0]
        key = f"{KEY_PREFIX}{paths[gguf_name]}.lora_{part[-1].upper()}.weight"
        tensors[key] = array.contiguous()
    # alpha 0 stands for a scale of 1. Every rank has its own alpha / rank, as in PEFT.
    config = AdapterConfig(
        method="lora",
        rank=max(ranks.values(), default=1),
        alpha=alpha or float(max(ranks.values(), default=1)),
        targets=tuple(ranks),
        rank_pattern=ranks,
        alpha_pattern={} if alpha else {p: float(rank) for p, rank in ranks.items()},
    )
    load_tensors(model, config, tensors)
