"""What the jobs of jobs.py train: the shapes of their models, and rows of random words."""

from __future__ import annotations

import json
import multiprocessing
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
SMOL = LLAMA | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
LLAMA_1B = LLAMA | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
LLAMA_8B = LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINY = LLAMA | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


@dataclass(frozen=True)
class Job:
    """What is to be trained on what."""

    shape: dict[str, Any]
    """Settings of the model's configuration."""
    batch: int
    words: tuple[int, int]
    """Of a row: least and most, drawn evenly."""
    rows: int = 4000


JOBS = {"a": Job(SMOL, 16, (32, 96)), "b": Job(LLAMA_1B, 16, (32, 96)), "c": Job(LLAMA_8B, 4, (64, 1024), 1000)}
EVALUATED = 400  # of a's rows, in job d


def job_of(name: str, *, tiny: bool, rows: int | None) -> Job:
    """The job of that letter; d has a's model and rows, of which it takes some."""
    job = JOBS["a" if name == "d" else name]
    job = replace(job, shape=TINY) if tiny else job
    count = rows or job.rows
    return replace(job, rows=min(count, EVALUATED) if name == "d" else count)


def write_rows(path: Path, job: Job, tokenizer: Any) -> float:
    """Prompts and completions of random words, the same ones every time.

    Returns:
        The tokens that a row has on average, with the one that ends it.
    """
    draw = random.Random(0)
    vocabulary = [w for w in tokenizer.get_vocab() if w.startswith("Ġ") and w[1:].isalpha() and w[1:].isascii()]
    names = [w[1:] for w in sorted(vocabulary)] or [f"word{i}" for i in range(4, 256)]
    rows: list[dict[str, str]] = []
    for _ in range(job.rows):
        said = draw.choices(names, k=draw.randint(*job.words))
        split = max(1, len(said) * 2 // 3)
        rows.append({"prompt": " ".join(said[:split]), "completion": " " + " ".join(said[split:])})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ids: list[list[int]] = tokenizer([row["prompt"] + row["completion"] for row in rows])["input_ids"]
    return sum(len(each) + 1 for each in ids) / len(rows)


def tokenizer_of(folder: Path | None) -> Any:
    """The tokenizer in a folder; without one, 252 words."""
    if folder is None:
        from random_folder import word_tokenizer

        return word_tokenizer()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def write_model(folder: Path, job: Job, tokenizer: Path | None) -> None:
    """The job's model with random weights, in bf16, in a process of its own, which frees its memory."""
    process = multiprocessing.get_context("spawn").Process(target=_write_model, args=(folder, job, tokenizer))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("the model could not be written")


def _write_model(folder: Path, job: Job, tokenizer: Path | None) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = dict(job.shape)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer_of(tokenizer).save_pretrained(folder)
