"""Loading the tokenizer of a model's folder or name."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from theodora.errors import CheckpointError
from theodora.files.model_folder import check_model_folder, has_tokenizer


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
    except Exception as error:  # of any kind: transformers and tokenizers raise what they come to
        raise CheckpointError(f"No tokenizer loads from {model}: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
