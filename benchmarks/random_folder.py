"""A folder with a model of random weights and a tokenizer, for what loads its models itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from theodora.bench import Workload


def save_random_model(workload: Workload, folder: Path) -> None:
    """A random model of that shape in bf16, which Unsloth may quantise as it loads it, as a folder with a tokenizer.

    In a process of its own, which frees its GPU.
    """
    import multiprocessing

    process = multiprocessing.get_context("spawn").Process(target=write_model, args=(workload, folder))
    process.start()
    process.join()


def write_model(workload: Workload, folder: Path) -> None:
    from theodora.bench.models import load_base

    load_base(replace(workload, quantize=None, memory_limit=None)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def word_tokenizer() -> Any:
    """A tokenizer whose tokens are word4 to word255, and four special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, **{f"word{i}": i for i in range(4, 256)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
