"""What a merged model's config.json says of a head that scores texts."""

from __future__ import annotations

from pathlib import Path

from theodora.files.base_model import BaseCheckpoint
from theodora.files.distrust import read_object
from theodora.files.model_folder import has_tokenizer
from theodora.files.read_back import write_json
from theodora.files.tokenizer import load_tokenizer

NOTE = "It scores texts: transformers' AutoModelForSequenceClassification loads it, with its head."


def describe_head(folder: Path, base: BaseCheckpoint) -> None:
    """Say in config.json that the model scores texts, how many numbers it gives, and which token pads.

    Args:
        folder: the merged model's, with its config.json and tokenizer.
        base: what was merged onto, opened with the head.
    """
    path = folder / "config.json"
    config = read_object(path)
    config["architectures"] = [type(base.model).__name__]
    if base.heads:
        labels = range(base.model.config.num_labels or 0)
        config["id2label"] = {str(n): f"LABEL_{n}" for n in labels}
        config["label2id"] = {f"LABEL_{n}": n for n in labels}
        config.pop("num_labels", None)
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    if text.get("pad_token_id") is None and has_tokenizer(folder):
        config["pad_token_id"] = text["pad_token_id"] = load_tokenizer(folder).pad_token_id
    write_json(path, config, ensure_ascii=False)
