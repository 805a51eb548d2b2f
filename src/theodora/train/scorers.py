"""Reward models that reward completions: an adapter for sequence classification, or a whole model of that kind.

Nothing of theirs runs as code: weights are read from safetensors, and no file of Python in their folders is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from theodora.adapters.load import load_adapter
from theodora.adapters.models import best_device, load_model
from theodora.adapters.quantized import weight_bytes
from theodora.adapters.scoring import scores, set_padding
from theodora.data.answered import encode_answered
from theodora.data.messages import Message
from theodora.errors import ConfigError, DataError
from theodora.files.adapter import read_trained_on
from theodora.files.classes import is_scoring
from theodora.files.distrust import expanded
from theodora.files.model_folder import base_model_of, has_tokenizer, is_adapter_folder
from theodora.files.peft_config import read_peft_config
from theodora.files.peft_options import task_of
from theodora.files.tokenizer import load_tokenizer
from theodora.train.progress import as_size


def is_model_folder(name: str) -> bool:
    """Whether a reward is named by the folder of a model or an adapter."""
    folder = expanded(name)
    return is_adapter_folder(folder) or (folder / "config.json").is_file()


class Scorer:
    """A reward model, in eval mode.

    Args:
        folder: of an adapter (ours or PEFT's, task_type SEQ_CLS), or of a whole model for sequence classification.
        device: where it is put. Default: the accelerator.
        dtype: of its plain weights: float32, bfloat16, float16, or auto.

    Raises:
        ConfigError: the folder holds something that gives no score.
        CheckpointError: it cannot be loaded.
    """

    def __init__(self, folder: str, device: torch.device | None = None, dtype: str = "auto") -> None:
        place, device = expanded(folder), device or best_device()
        self.folder, base = folder, str(place)
        adapter = is_adapter_folder(place)
        if adapter:
            task, base = task_of(read_peft_config(place)), base_model_of(place)
            if task != "SEQ_CLS":
                raise ConfigError(
                    f"The reward {folder} is an adapter of task {task or 'unknown'}, which gives no score; expected "
                    "one of --objective reward (task_type SEQ_CLS)"
                )
        elif not is_scoring(AutoConfig.from_pretrained(place)):
            raise ConfigError(
                f"The reward {folder} is a model that gives no score; expected one for sequence classification, as "
                "theodora merge makes of a reward adapter"
            )
        on = read_trained_on(place) if adapter else None
        quantize = None if on is None else on.quantize
        self.model = load_model(base, dtype=dtype, quantize=quantize, device=device, adapted=adapter, scores=True)
        if adapter:
            load_adapter(self.model, place)
        self.tokenizer = load_tokenizer(place if has_tokenizer(place) else base)
        set_padding(self.model, self.tokenizer)
        if self.model.device.type != device.type:
            self.model.to(device)  # pyright: ignore[reportArgumentType]
        self.model.eval().requires_grad_(False)

    @property
    def note(self) -> str:
        """What there is to say of it."""
        size = as_size(weight_bytes(self.model))
        return f"the reward model {self.folder} is a second model in memory ({size} of weights)"

    def __call__(self, prompts: Sequence[str | list[Message]], answers: Sequence[str], tools: Sequence[Any]) -> Tensor:
        """The score of each answer, float32 on the CPU.

        Raises:
            DataError: its chat template refuses one, or one is longer than it reads.
        """
        ids = encode_answered(prompts, answers, self.tokenizer, tools)
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, ids), default=0)
        if most is not None and longest > most:
            raise DataError(
                f"The reward model {self.folder} reads {most:,} tokens, and a completion with its prompt has "
                f"{longest:,}; lower max_length"
            )
        return scores(self.model, ids)
