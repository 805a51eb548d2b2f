"""Models that give a text one number: their head, the token that pads, and their scores.

transformers reads the number at the rightmost token that is not padding, which it tells by the token alone. So the
token that pads is part of what a reward model is: where the model's configuration names one, that one; the tokenizer's
own otherwise, and its EOS only where it has none.

Legend: S texts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from theodora.adapters.heads import head_paths
from theodora.adapters.load import load_file
from theodora.adapters.reference import reference_model
from theodora.adapters.remove import remove_adapter
from theodora.adapters.state import require_state, set_adapter
from theodora.errors import ConfigError
from theodora.files.adapter import AdapterFile

_NAME = "scores"
_AT_ONCE = 16_384
"""Tokens in a pass without gradients, padding included, at most; a longer text is a pass of its own."""


def new_heads(model: PreTrainedModel) -> list[str]:
    """Paths of the heads that no file had weights for, drawn anew by torch's random numbers as the model draws them."""
    drawn: list[str] = []
    for path in head_paths(model):
        head = model.get_submodule(path)
        if all(getattr(parameter, "_is_hf_initialized", False) for parameter in head.parameters()):
            continue
        for module in head.modules():
            module._is_hf_initialized = False  # pyright: ignore[reportArgumentType]
            model._init_weights(module)  # pyright: ignore[reportPrivateUsage, reportCallIssue]
        drawn.append(path)
    return drawn


def widen_heads(model: PreTrainedModel) -> None:
    """Hold the heads in float32, in place, beside weights of any dtype: bfloat16 would swallow their small updates."""
    for path in head_paths(model):
        head = model.get_submodule(path)
        dtype = next(head.parameters()).dtype
        if dtype in (torch.bfloat16, torch.float16):
            head.float()
            head.register_forward_pre_hook(_as_wide)


def scorer_beside(policy: PreTrainedModel, file: AdapterFile, config: PreTrainedConfig) -> PreTrainedModel | None:
    """A reward model on the frozen weights of a language model that trains: it has only its adapter to itself.

    Args:
        policy: with the adapter that trains; unchanged afterwards.
        file: the reward model's adapter, whose modules trained in full are its head alone.
        config: of the base, as its folder has it.

    Returns:
        It, frozen and in eval mode, or None where transformers builds the two models around different backbones.
    """
    config = copy.deepcopy(config)
    config.num_labels = 1
    with torch.device("meta"):
        model: Any = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    heads = head_paths(model)
    plain = replace(file, full={}, full_names=(), config=replace(file.config, modules_to_save=()), task=None)
    own = require_state(policy).active
    load_file(policy, plain, _NAME)
    try:
        backbone = reference_model(policy, _NAME).base_model
    finally:
        remove_adapter(policy, _NAME)
        set_adapter(policy, own)
    if not isinstance(backbone, type(model.base_model)):
        return None
    setattr(model, model.base_model_prefix, backbone)
    for path in heads:
        head = model.get_submodule(path).to_empty(device=policy.device)
        for name, parameter in head.named_parameters():
            parameter.data = file.full[f"{path}.{name}"].to(policy.device, torch.float32, copy=True)
        head.register_forward_pre_hook(_as_wide)
    return model.eval().requires_grad_(False)


def _as_wide(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(head.parameters()).dtype
    return tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in inputs)


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Let model and tokenizer name the same token to pad with, in place; what there is to say about it.

    Raises:
        ConfigError: neither of them has one, nor an EOS token.
    """
    config: Any = model.config.get_text_config()
    named: int | None = getattr(config, "pad_token_id", None)
    pad: Any = named
    notes: list[str] = []
    if pad is None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise ConfigError("The tokenizer has no token to pad with, and no EOS token; set its pad_token")
    token = tokenizer.convert_ids_to_tokens(pad)
    if not isinstance(token, str):
        raise ConfigError(
            f"The model's config.json pads with token {pad}, which the tokenizer does not have; correct pad_token_id "
            "there: the score is read at the last token that is not padding"
        )
    if named is None:
        notes.append(
            f"config.json names no token to pad with: it is {token} ({pad}) here. Whoever loads the base by hand says "
            f"so (pad_token_id={pad})"
        )
    if pad == tokenizer.eos_token_id:
        notes.append(f"texts are padded with {token}, which also ends them: the score is read at the token before it")
    model.config.pad_token_id = config.pad_token_id = pad
    tokenizer.pad_token = token
    return notes


def padded(ids: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Texts as a batch, padded on the right: `input_ids` and `attention_mask`, (S, T)."""
    rows = [torch.tensor(row) for row in ids]
    ids_ST = pad_sequence(rows, batch_first=True, padding_value=pad)
    mask_ST = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids_ST.to(device), "attention_mask": mask_ST.to(device)}


@torch.no_grad()
def scores(model: PreTrainedModel, ids: Sequence[Sequence[int]]) -> Tensor:
    """The score of each text, (S,) float32 on the CPU, with the model in eval mode meanwhile.

    Args:
        model: with its padding set (`set_padding`).
        ids: tokens of each text, one at least.
    """
    order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
    found = torch.empty(len(ids), dtype=torch.float32)
    pad: int = model.config.get_text_config().pad_token_id
    training = model.training
    model.eval()
    try:
        while order:
            rows = max(1, _AT_ONCE // len(ids[order[-1]]))
            part, order = order[-rows:], order[:-rows]
            batch = padded([ids[n] for n in part], pad, model.device)
            logits: Tensor = model(**batch, use_cache=False).logits
            found[part] = logits[:, 0].float().cpu()
    finally:
        model.train(training)
    return found
