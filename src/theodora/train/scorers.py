"""Reward models that reward completions: an adapter for sequence classification, or a whole model of that kind.

Nothing of theirs runs as code: weights are read from safetensors, and no file of Python in their folders is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from theodora.adapters.conditions import hash_of_weights
from theodora.adapters.models import best_device, load_model_and_tokenizer
from theodora.adapters.quantized import weight_bytes
from theodora.adapters.scoring import scorer_beside, scores, set_padding
from theodora.config import TrainConfig
from theodora.data.answered import encode_answered
from theodora.data.messages import Message
from theodora.errors import ConfigError, DataError
from theodora.files.adapter import AdapterFile, read_adapter
from theodora.files.classes import check_kernels
from theodora.files.distrust import expanded
from theodora.files.model_folder import base_model_of, has_tokenizer, is_adapter_folder, is_scorer
from theodora.files.ours import sha256
from theodora.files.peft_options import PEFTS_HEADS
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
        policy: the run that it rewards. An adapter on the same frozen weights needs no model of its own: it scores once
            `place` has been called.

    Raises:
        ConfigError: the folder holds something that gives no score.
        CheckpointError: it cannot be loaded.
    """

    def __init__(
        self,
        folder: str,
        device: torch.device | None = None,
        dtype: str = "auto",
        policy: TrainConfig | None = None,
    ) -> None:
        self.folder, self._place = folder, expanded(folder)
        self._device, self._dtype = device or best_device(), dtype
        self._adapter: AdapterFile | None = None
        self._base, self._quantize = str(self._place), None
        self.model: PreTrainedModel | None = None
        if not is_scorer(self._place):
            raise ConfigError(
                f"The reward {folder} gives no score; expected an adapter of --objective reward (task_type SEQ_CLS), "
                "or a whole model for sequence classification, as theodora merge makes of one"
            )
        if is_adapter_folder(self._place):
            self._adapter = read_adapter(self._place, for_model=True)
            self._base, on = base_model_of(self._place), self._adapter.trained_on
            self._quantize = None if on is None else on.quantize
        self.tokenizer = load_tokenizer(self._place if has_tokenizer(self._place) else self._base)
        self.shares = policy is not None and self._on_weights_of(policy)
        """Whether the policy's frozen weights are to be its own."""
        if not self.shares:
            self._load()

    @property
    def sha256(self) -> str:
        """A hash of what makes its scores: the file of an adapter, or the weights of a whole model."""
        if self._adapter is not None:
            return sha256(self._adapter.weights)
        assert self.model is not None
        return hash_of_weights(self.model)

    @property
    def note(self) -> str:
        """What there is to say of it."""
        if self.shares or self.model is None:
            return f"the reward model {self.folder} scores on the policy's own frozen weights"
        size = as_size(weight_bytes(self.model))
        return f"the reward model {self.folder} is a second model in memory ({size} of weights)"

    def place(self, policy: PreTrainedModel) -> None:
        """Let a reward model that shares its weights score, when those of the policy are where they stay."""
        if self.model is None and self._adapter is not None:
            self.model = scorer_beside(policy, self._adapter, _config_of(self._base))
            if self.model is None:
                self.shares = False
                self._load()
            else:
                set_padding(self.model, self.tokenizer)

    def __call__(self, prompts: Sequence[str | list[Message]], answers: Sequence[str], tools: Sequence[Any]) -> Tensor:
        """The score of each answer, float32 on the CPU; 0 as long as it has no weights to share.

        Raises:
            DataError: its chat template refuses one, or one is longer than it reads.
        """
        ids = encode_answered(prompts, answers, self.tokenizer, tools)
        if self.model is None:
            return torch.zeros(len(ids))
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, ids), default=0)
        if most is not None and longest > most:
            raise DataError(
                f"The reward model {self.folder} reads {most:,} tokens, and a completion with its prompt has "
                f"{longest:,}; lower max_length"
            )
        return scores(self.model, ids)

    def _on_weights_of(self, policy: TrainConfig) -> bool:
        """Whether a run trains on the very weights that this adapter was trained on, and adds no tokens to them."""
        file = self._adapter
        if file is None or policy.trains_all or policy.resize_embeddings or policy.model == "":
            return False
        only_heads = {key.partition(".")[0] for key in file.full} <= {*PEFTS_HEADS["SEQ_CLS"]}
        quantize = "fp8" if policy.base_dtype == "fp8" else None if policy.quantize == "none" else policy.quantize
        here = _resolved(self._base)
        same = self._base == policy.model or (here is not None and here == _resolved(policy.model))
        more = bool(file.token_rows or file.base_copies or file.added_biases)
        of_revision = policy.revision is None or policy.revision == file.base_revision
        return same and of_revision and only_heads and not more and quantize == self._quantize

    def _load(self) -> None:
        """Load it as a model of its own."""
        self.model, self.tokenizer = load_model_and_tokenizer(
            self._place, dtype=self._dtype, device=self._device, scores=True
        )
        self.model.requires_grad_(False)


def _config_of(model: str | Path) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.from_pretrained(model, trust_remote_code=False)
    check_kernels(config, model)
    return config


def _resolved(name: str) -> object:
    """A folder as the one that it is; None for what is none here."""
    folder = expanded(name)
    return folder.resolve() if folder.is_dir() else None
