"""Loading a causal language model and its tokenizer, from a model folder, a hub name, or an adapter folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from theodora.adapters.base_checkpoint import damaged_weights, pickled_weights
from theodora.adapters.checkpoint import read_peft_config
from theodora.adapters.classes import auto_classes, check_kernels, model_alone
from theodora.adapters.model_bounds import bounded_build, check_layers, stored_in
from theodora.adapters.reading import expanded
from theodora.errors import CheckpointError, ConfigError, bullet_list
from theodora.parse import parse_json

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def load_model_and_tokenizer(
    model: str | Path,
    *,
    dtype: str = "auto",
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    device: str | torch.device | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in eval mode, with its adapter if there is one.

    Example:
        `model, tokenizer = load_model_and_tokenizer("runs/first")`: the base model of that adapter, and the adapter.

    Args:
        model: a model folder or hub name; or an adapter folder, whose base model is loaded and the adapter on it.
        dtype: of the base weights: auto (as stored), float32, bfloat16, float16, or bf16, fp16, fp32 for short.
        adapter: folder of an adapter to put on `model`.
        trust_remote_code: run Python code that comes with the model.
        revision: branch, tag or commit on the hub, of the base model.
        device: where the model goes. Default: the accelerator, if there is one.
        model_kwargs: more arguments for transformers' `from_pretrained`.

    Raises:
        ConfigError: an unknown dtype.
        CheckpointError: a folder is missing, holds no model, or lacks weights that the model has.
    """
    named = None  # the adapter that says which model
    if is_adapter_folder(model):
        if adapter is not None:
            raise ConfigError(
                f"{model} is an adapter, and adapter={adapter} is another; expected a model, or one of them"
            )
        model, adapter = base_model_of(model), model
        named = adapter
    with _named_by(named, model):
        tokenizer = load_tokenizer(
            adapter if adapter is not None and has_tokenizer(adapter) else model,
            trust_remote_code=trust_remote_code,
            revision=None if adapter is not None and has_tokenizer(adapter) else revision,
        )
        loaded = load_model(
            model, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision, model_kwargs=model_kwargs
        )
    if adapter is not None:
        from theodora.adapters import load_adapter

        load_adapter(loaded, adapter)
    from theodora.adapters.generation import set_ends

    set_ends(loaded, tokenizer)
    return loaded.to(device or best_device()).eval(), tokenizer  # pyright: ignore[reportArgumentType]


@contextmanager
def _named_by(adapter: str | Path | None, model: str | Path) -> Iterator[None]:
    """Say of a model that does not load which adapter wants it, if it is not there."""
    try:
        yield
    except CheckpointError as error:
        if adapter is None or expanded(model).exists():
            raise
        raise CheckpointError(f"{_not_here(adapter, str(model))}\n{error}") from error


def load_model(
    model: str | Path,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a causal language model on the CPU. Arguments and errors as in `load_model_and_tokenizer`."""
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in ("auto", *DTYPES.values()):
        raise ConfigError(f"dtype is {dtype!r}; expected one of auto, {', '.join([*DTYPES, *DTYPES.values()])}")
    check_model_folder(model)
    bounded = _check_weights(expanded(model))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    try:
        config = AutoConfig.from_pretrained(model, **options)
        check_kernels(config, model, trust_remote_code=trust_remote_code)
        classes = auto_classes(config, model, trust_remote_code=trust_remote_code)
        options |= {
            "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
            "use_safetensors": True,  # the other format is a pickle
            **model_alone(model),
            **(model_kwargs or {}),
        }
        with bounded:
            result: Any = classes[0].from_pretrained(model, **options, output_loading_info=True)
            if result[1]["missing_keys"] and len(classes) > 1:
                result = classes[1].from_pretrained(model, **options, output_loading_info=True)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises whatever a damaged file leads it to
        why = bullet_list(damaged_weights(expanded(model))) or f" {error}"
        if is_adapter_folder(expanded(model)):  # transformers 5.17 minds it all the same
            why += "\nAn adapter lies beside the model; move its adapter_config.json into a folder of its own."
        raise CheckpointError(f"{model} does not load as a causal language model:{why}") from error
    loaded, info = result
    if info["missing_keys"]:
        # transformers would go on with random values in their place.
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{model} lacks {len(missing)} tensors of a {type(loaded).__name__}: {', '.join(missing[:5])}"
            + (", …" if len(missing) > 5 else "")
        )
    return loaded


def load_tokenizer(
    model: str | Path, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; one without a padding token pads with its end-of-text token.

    Raises:
        CheckpointError: the folder is missing or holds no tokenizer.
    """
    if not has_tokenizer(model):  # an adapter's folder may hold one
        check_model_folder(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model, trust_remote_code=trust_remote_code, revision=revision or "main"
        )
    except Exception as error:  # as above; tokenizers raises plain Exceptions
        raise CheckpointError(f"No tokenizer loads from {model}: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_weights(folder: Path) -> AbstractContextManager[None]:
    """Refuse a local folder whose weights are pickles, or which speaks of more layers than it holds.

    Returns:
        what to build the model within, so that it cannot be far larger than the files.
    """
    if not folder.is_dir():
        return nullcontext()
    if pickled_weights(folder):
        raise CheckpointError(pickled_weights(folder))
    stored = stored_in(folder)
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
        raise CheckpointError(_not_here(adapter, base))
    return base


def _not_here(adapter: str | Path, base: str) -> str:
    return (
        f"The adapter in {adapter} names {base} as its base model, and there is no such folder here. Give the base "
        f"that is here: --model BASE --adapter {adapter} (or --from-adapter; --base-model BASE where a command takes "
        "the adapter first), or correct base_model_name_or_path in its adapter_config.json."
    )


def looks_local(model: str | Path) -> bool:
    """Whether a name can only be a path: hub names are `name` or `owner/name`."""
    return Path(model).is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") > 1


def best_device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def check_model_folder(model: str | Path) -> None:
    """Tell a folder that is missing or holds no model from a hub name, before the network is asked.

    Raises:
        CheckpointError: saying which.
    """
    path = expanded(model)
    if path.is_dir() and not (path / "config.json").is_file():
        if is_adapter_folder(path):
            raise CheckpointError(f"{model} holds an adapter, not a model; its base model is {base_model_of(path)}.")
        raise CheckpointError(
            f"{model} holds no config.json. Expected a folder saved by transformers' save_pretrained."
        )
    if looks_local(path if path.is_absolute() else model) and not path.exists():
        raise CheckpointError(f"{model}: there is no such folder.")
