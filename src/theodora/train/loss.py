"""The loss at the positions that are learned, from the model's own forward. Legend: B rows, T tokens, V vocabulary.

TRL computes the loss from the output head's weight. Without Triton (on CPUs) it does so at every position, although of
a prompt and its completion few are learned; and an adapter on the head it would pass by. Here the model itself is
asked for the logits at the positions that are learned in any row of the batch, so that whatever it does to them
(adapters, scales, soft caps) is in the loss.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from theodora.kernels.cross_entropy import IGNORED, LossSums, TokenLosses
from theodora.plan.paper import MOST_LOGITS
from theodora.train.sequence_losses import SequenceLosses, summed
from theodora.train.tried import is_true, tried


def can_choose_positions(model: nn.Module) -> bool:
    """Whether the model's forward takes the positions whose logits are wanted."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def trl_reads_logits(trainer: Trainer) -> bool:
    """Whether TRL's loss, which it computes from the states before the head, is that of the model's own logits.

    Tried out, because TRL knows only some of what models do to their logits (scales, soft caps), and not where each
    keeps its backbone.
    """
    model: Any = trainer.model
    return tried("trl-reads-logits", model, lambda: _trl_reads_logits(model), is_true)


@torch.no_grad()
def _trl_reads_logits(model: Any) -> bool:
    vocabulary = model.config.get_text_config().vocab_size
    ids_1T = (torch.arange(8) * 7919 % max(1, vocabulary // 2) + vocabulary // 4)[None].to(model.device) % vocabulary
    training = model.training
    model.eval()
    try:
        theirs_1T = model(input_ids=ids_1T, labels=ids_1T, fused_lm_head=True).log_probs
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
        return False
    else:
        own_1TV = model(input_ids=ids_1T, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        own_1T = own_1TV.gather(-1, ids_1T[:, 1:, None]).squeeze(-1)
        return bool((theirs_1T - own_1T).abs().mean() <= (1e-3 if model.dtype == torch.float32 else 0.1))
    finally:
        model.train(training)


def logits_fit(labels_BT: Tensor, vocabulary: int) -> bool:
    """Whether the logits at the learned positions are few enough to be held at once."""
    return _learned_positions(labels_BT).numel() * labels_BT.shape[0] * vocabulary <= MOST_LOGITS


def token_losses(model: nn.Module, inputs: dict[str, Any], takes_positions: bool) -> LossSums:
    """Run the model on a batch and add up the losses of its learned tokens.

    Args:
        model: a causal language model, wrapped for several processes perhaps.
        takes_positions: `can_choose_positions` of the model itself.
        inputs: what TRL's collator makes, with `labels` (B, T), each at the place of its token (not shifted).
    """
    tokens, _, _ = _losses_of_tokens(model, inputs, takes_positions)
    return LossSums(*(value.sum() for value in (tokens.nats, tokens.entropy, tokens.correct, tokens.learned)))


def row_losses(
    model: nn.Module, inputs: dict[str, Any], takes_positions: bool, balanced: bool = False, temperature: float = 1.0
) -> SequenceLosses:
    """The same of each row by itself.

    Args:
        model: as of `token_losses`.
        inputs: likewise.
        takes_positions: likewise.
        balanced: with the model's own loss that keeps experts balanced.
        temperature: what the logits are divided by.
    """
    wanted = {"output_router_logits": True} if balanced else {}
    tokens, at_N, outputs = _losses_of_tokens(model, inputs | wanted, takes_positions, temperature)
    rows, length = inputs["labels"].shape
    return summed(tokens, at_N, at_N // length, rows, outputs.aux_loss if balanced else None)


def _losses_of_tokens(
    model: nn.Module, inputs: dict[str, Any], takes_positions: bool, temperature: float = 1.0
) -> tuple[TokenLosses, Tensor, Any]:
    """Of each learned token, (N,), its place in the flattened batch, and what the model returned."""
    labels_BT = inputs["labels"]
    learned_at = _learned_positions(labels_BT)
    arguments = {key: value for key, value in inputs.items() if key != "labels"}
    # One position at least, so that a batch without a learned token still has a (zero) gradient.
    wanted = learned_at if learned_at.numel() else torch.zeros(1, dtype=torch.long, device=labels_BT.device)
    chosen = {"logits_to_keep": wanted} if takes_positions else {}
    outputs = model(**arguments, use_cache=False, **chosen)
    logits_BKV = outputs.logits if takes_positions else outputs.logits.index_select(1, wanted)
    targets_BK = labels_BT[:, wanted + 1].to(logits_BKV.device)
    learned = targets_BK != IGNORED
    targets_N = targets_BK[learned]
    log_probs_NV = (logits_BKV[learned].float() / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(log_probs_NV.exp() * log_probs_NV).sum(-1)
        correct = log_probs_NV.argmax(-1) == targets_N
    nats = -log_probs_NV.gather(1, targets_N[:, None])[:, 0]
    row_N, chosen_N = learned.nonzero(as_tuple=True)
    at_N = row_N * labels_BT.shape[1] + wanted.to(chosen_N.device)[chosen_N] + 1
    return TokenLosses(nats, entropy, correct, learned[learned]), at_N, outputs


def _learned_positions(labels_BT: Tensor) -> Tensor:
    """Positions whose next token is learned in any row: the token at t is predicted from the state at t-1."""
    return (labels_BT[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
