"""`generation_config.json` beside a model or an adapter, which says the tokens that end its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from theodora.ends import as_ids, end_token_ids
from theodora.errors import CheckpointError
from theodora.files.distrust import read_object
from theodora.files.model_folder import has_tokenizer
from theodora.files.read_back import copy_file, write_json
from theodora.files.tokenizer import load_tokenizer

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
)
"""What a tokenizer may consist of."""


def set_ends(model: Any, tokenizer: Any) -> None:
    """Let `model.generate` stop at all tokens that end an answer, in place."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    ends = list(end_token_ids(settings, tokenizer))
    if set(ends) - set(as_ids(settings.eos_token_id)):
        settings.eos_token_id = ends


def write_ends(folder: Path, adapter: Path | None = None, *, trust_remote_code: bool = False) -> list[str]:
    """Name in a model folder's generation_config.json all tokens that end an answer.

    Args:
        folder: holds config.json and, perhaps, a tokenizer, without which nothing is done.
        adapter: the folder of an adapter that was merged into it, whose own settings count, too.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        What there is to say about it.

    Raises:
        CheckpointError: the file that is there cannot be read.
    """
    if not has_tokenizer(folder):
        return []
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        return [f"generation_config.json stays as it is, because the tokenizer does not load: {error}"]
    path = folder / GENERATION_CONFIG
    settings = _read(path)
    if settings is None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        settings = GenerationConfig.from_model_config(config).to_diff_dict()
        settings.pop("_from_model_config", None)  # the file does not follow config.json from now on
    known = as_ids(settings.get("eos_token_id"))
    trained = _read(adapter / GENERATION_CONFIG) if adapter is not None else None
    ends = [*end_token_ids(settings, tokenizer), *as_ids((trained or {}).get("eos_token_id"))]
    ends = list(dict.fromkeys(ends))
    if not set(ends) - set(known):
        return []
    write_json(path, {**settings, "eos_token_id": ends})
    names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(ends)))
    return [f"Answers end with {names}; generation_config.json says so."]


def save_ends(model: Any, folder: Path) -> None:
    """Write a model's generation settings into an adapter's folder: what ends its answers need not be what ends its
    base's."""
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        stored = {key: value for key, value in settings.to_diff_dict().items() if key != "_from_model_config"}
        write_json(folder / GENERATION_CONFIG, stored)


def new_ends(model: Any, tokenizer: Any) -> list[str]:
    """The tokens that end an answer although neither the model's settings nor the tokenizer's EOS name them."""
    settings = getattr(model, "generation_config", None)
    known = {*as_ids(getattr(settings, "eos_token_id", None)), *as_ids(tokenizer.eos_token_id)}
    ends = [end for end in end_token_ids(settings, tokenizer) if end not in known]
    return [str(token) for token in tokenizer.convert_ids_to_tokens(ends)]


def copy_manners(adapter: Path, folder: Path) -> None:
    """Copy the tokenizer and the generation settings that lie in an adapter's folder: how to ask it, and its ends."""
    for pattern in (*TOKENIZER_FILES, GENERATION_CONFIG):
        for file in adapter.glob(pattern):
            if file.is_file() and not file.is_symlink():
                (folder / file.relative_to(adapter)).parent.mkdir(exist_ok=True)
                copy_file(file, folder / file.relative_to(adapter))


def ends_elsewhere(adapter: Path, base: Path, program: str) -> list[str]:
    """What to say of a form that has no place for the tokens that end answers, where they are not the base's own.

    Args:
        adapter: the adapter's folder.
        base: the base model's.
        program: what has to be told.
    """
    trained = as_ids((_read(adapter / GENERATION_CONFIG) or {}).get("eos_token_id"))
    known = as_ids((_read(base / GENERATION_CONFIG) or {}).get("eos_token_id"))
    known += as_ids((_read(base / "config.json") or {}).get("eos_token_id"))
    more = [end for end in trained if end not in known]
    if not more or not has_tokenizer(adapter):
        return []
    names = ", ".join(map(str, load_tokenizer(adapter).convert_ids_to_tokens(more)))
    return [f"Answers of this adapter end with {names}, which its base's files do not say: tell {program}."]


def _read(path: Path) -> dict[str, Any] | None:
    return read_object(path) if path.is_file() else None
