"""A model's folder before anything of it is loaded: what it holds, what it lacks, and whether its sizes can be true."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from theodora.errors import CheckpointError, bullet_list, shown
from theodora.files.distrust import expanded, read_object
from theodora.files.folder import OpenFile, Seen, read_file
from theodora.files.model_bounds import bounded_build, check_layers, stored_in
from theodora.files.peft_config import read_peft_config, scores_texts
from theodora.files.safetensors import read_header
from theodora.parse import parse_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""What dtypes of weights are called for short → torch's names."""
_PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its file's header describes it."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    """The safetensors name: F32, BF16, I64, …"""
    seen: Seen | None = None
    """The file whose header it was."""


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Describe every tensor of the checkpoint; all files that are missing or damaged are named at once."""
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for file, expected in weight_files(folder).items():
        if not file.is_file():
            problems.append(f"{file.name} is missing")
            continue
        try:
            with OpenFile.at(file) as opened:
                described = read_header(opened).tensors
            for key, tensor in sorted(described.items(), key=lambda item: item[1].begin):
                tensors[key] = StoredTensor(key, file, tensor.shape, tensor.kind, opened.seen)
        except (ValueError, OSError, CheckpointError) as error:
            problems.append(f"{file.name} is damaged or cut short ({error})")
            continue
        problems += [f"{file.name} lacks {key}, which the index promises" for key in expected if key not in tensors]
    if problems:
        raise CheckpointError(f"The base model {folder} is not whole:" + bullet_list(problems))
    return tensors


def damaged_weights(folder: Path) -> list[str]:
    """Which safetensors files of a model folder are damaged, and why."""
    damaged: list[str] = []
    for path in sorted(path for path in folder.glob("*.safetensors") if path.is_file()):
        try:
            with OpenFile.at(path) as file:
                read_header(file)
        except (ValueError, OSError, CheckpointError) as error:
            damaged.append(f"{path.name} is damaged or cut short ({error})")
    return damaged


def hqq_folder(name: object) -> str:
    """What to say of a folder that HQQ quantised, whichever of hqq and transformers wrote it."""
    return (
        f"{name} is quantised with HQQ, and transformers {version('transformers')} loads no such folder, not even one "
        "that it saved. Name the model that it was made from: --quantize nf4 makes it small as it loads. (In Python, "
        "adapters go onto what hqq's AutoHQQHFModel makes with quantize_model or from_quantized.)"
    )


def pickled_weights(folder: Path) -> str:
    """What to say of a model folder whose weights are pickles only; empty if it is none."""
    if (folder / "qmodel.pt").is_file() and not any(folder.glob("*.safetensors")):
        return hqq_folder(folder)
    if any(folder.glob("*.safetensors")) or not any(path for kind in _PICKLES for path in folder.glob(kind)):
        return ""
    return (
        f"The model {folder} has its weights only as pickles, which can run code when opened and cannot be streamed. "
        "If you trust them, load the model once with transformers and save it with save_pretrained, which writes "
        "safetensors; then name that folder."
    )


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """The files that hold the weights, and the keys that the index expects in each."""
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: []}
    if (folder / INDEX).is_file():
        try:
            weight_map: Any = parse_json(read_file(folder / INDEX).decode("utf-8"))["weight_map"]
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ValueError("weight_map does not say which file holds which tensor")
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(f"{folder / INDEX} is not a valid index ({error!r}).") from error
        strange = sorted({name for name in weight_map.values() if Path(name).name != name or "\0" in name})
        if strange:
            raise CheckpointError(
                f"{folder / INDEX} names files elsewhere than in its folder: {shown(strange)[1:-1]}. A model's weights "
                "lie beside their index."
            )
        files: dict[Path, list[str]] = {}
        for key, name in weight_map.items():
            files.setdefault(folder / name, []).append(key)
        return files
    if pickled := pickled_weights(folder):
        raise CheckpointError(pickled)
    raise CheckpointError(f"{folder} holds no weights: expected {WEIGHTS} or {INDEX}.")


def check_weights(folder: Path) -> AbstractContextManager[None]:
    """Refuse a local folder whose weights are pickles, or which speaks of more layers than it holds.

    Returns:
        what to build the model within, so that it cannot be far larger than the files.
    """
    if not folder.is_dir():
        return nullcontext()
    if pickled_weights(folder):
        raise CheckpointError(pickled_weights(folder))
    stored = stored_in(folder)
    if stored.hqq:
        raise CheckpointError(hqq_folder(folder))
    try:
        config = parse_json((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is not valid JSON ({error}).") from error
    if not isinstance(config, dict) or not any(folder.glob("*.safetensors")):
        return nullcontext()  # transformers refuses it before it builds anything
    try:
        check_layers(folder, config, stored.tensors)
    except CheckpointError as error:
        if why := damaged_weights(folder):  # whose tensors do not count
            raise CheckpointError(f"{error} Some of its files do not count:{bullet_list(why)}") from error
        raise
    return bounded_build(folder, config, stored)


def is_adapter_folder(path: str | Path) -> bool:
    """Whether `path` is a local folder with an adapter in PEFT's format."""
    return (Path(path) / "adapter_config.json").is_file()


def is_scorer(path: str | Path) -> bool:
    """Whether `path` is a local folder of a model, or an adapter, that scores texts, as far as its files say.

    Raises:
        CheckpointError: adapter_config.json, or config.json, cannot be read.
    """
    folder = expanded(path)
    if not is_whole_model(folder):
        return scores_texts(folder)
    return scoring_name(read_object(folder / "config.json").get("architectures")) is not None


def scoring_name(architectures: object) -> str | None:
    """The class among those that a config.json names (`architectures`) that scores texts."""
    names = architectures if isinstance(architectures, list) else []
    return next((name for name in names if isinstance(name, str) and name.endswith("ForSequenceClassification")), None)


def is_whole_model(path: str | Path) -> bool:
    """Whether `path` is a local folder with a model that is no adapter."""
    return (Path(path) / "config.json").is_file() and not is_adapter_folder(path)


def has_tokenizer(path: str | Path) -> bool:
    """Whether `path` is a local folder with a tokenizer."""
    return (Path(path) / "tokenizer_config.json").is_file()


def base_model_of(adapter: str | Path) -> str:
    """The base model that an adapter folder names.

    Raises:
        CheckpointError: it names none.
    """
    config = read_peft_config(adapter)
    if not config.get("base_model_name_or_path"):
        raise CheckpointError(f"{adapter}/adapter_config.json names no base model (base_model_name_or_path): name one")
    base = config["base_model_name_or_path"]
    if looks_local(base) and not expanded(base).exists():
        raise CheckpointError(not_here(adapter, base))
    return base


def not_here(adapter: str | Path, base: str) -> str:
    """What to say of an adapter whose base model is named by a path that is not here."""
    return (
        f"The adapter in {adapter} names {base} as its base model, and there is no such folder here. Give the base "
        f"that is here: --model BASE --adapter {adapter} (or --from-adapter; --base-model BASE where a command takes "
        "the adapter first), or correct base_model_name_or_path in its adapter_config.json."
    )


def looks_local(model: str | Path) -> bool:
    """Whether a name can only be a path: hub names are `name` or `owner/name`."""
    return Path(model).is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") > 1


def check_no_gguf(model: str | Path) -> None:
    """Refuse a GGUF file, or a folder with no other weights, which transformers would take for a hub name.

    Raises:
        CheckpointError: with the way to a folder that can be loaded, and quantised again.
    """
    path = expanded(model)
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not files or any(path.glob("*.safetensors")):
        return
    raise CheckpointError(
        f"{files[0]} is a GGUF file; weights are read from safetensors here. transformers writes a folder of it, "
        f"dequantised: AutoModelForCausalLM.from_pretrained({str(files[0].parent)!r}, gguf_file={files[0].name!r}, "
        "quantization_config=GgufConfig(dequantize=True)).save_pretrained(FOLDER), and AutoTokenizer likewise. Then "
        "name that folder; quantize: nf4 makes it as small as the file was."
    )


def check_model_folder(model: str | Path) -> None:
    """Refuse a name that can only be a folder's, if there is no model in it, before the hub is asked for that name.

    Raises:
        CheckpointError: saying whether the folder is missing or what it holds.
    """
    check_no_gguf(model)
    path = expanded(model)
    if path.is_dir() and not (path / "config.json").is_file():
        if is_adapter_folder(path):
            raise CheckpointError(f"{model} holds an adapter, not a model; its base model is {base_model_of(path)}.")
        raise CheckpointError(
            f"{model} holds no config.json. Expected a folder saved by transformers' save_pretrained."
        )
    if looks_local(path if path.is_absolute() else model) and not path.exists():
        raise CheckpointError(f"{model}: there is no such folder.")
