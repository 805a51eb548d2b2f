"""The loss that keeps the experts of a mixture balanced: what TRL has to know for it, and how a model computes it.

Legend: B rows, T tokens, E experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.sft_config import SFTConfig

from theodora.train.tried import is_true, tried

OF_SCORES = "the loss that keeps experts balanced is off: a reward model's loss goes by its scores alone, as in TRL"
Balancing = Callable[[tuple[Tensor, ...], Tensor], Tensor]
"""Router logits of each layer, (B·T, E), and which tokens count, (B, T), to the balancing loss, a scalar."""

# TRL's name of a number → what else configurations call it.
_NAMES = {
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"),
    "num_experts_per_tok": ("moe_topk", "moe_k", "top_k_experts", "num_experts_per_token", "moe_top_k"),
}


def name_experts(config: Any) -> None:
    """Give the configuration of a language model TRL's names for its numbers, where it has others."""
    for wanted, others in _NAMES.items():
        value = next((theirs for name in others if (theirs := getattr(config, name, None)) is not None), None)
        if not hasattr(config, wanted) and value is not None:
            setattr(config, wanted, value)


def balances(model: Any) -> bool:
    """Whether a model's configuration asks for a loss that keeps experts balanced."""
    config = model.config.get_text_config()
    return hasattr(config, "output_router_logits") and bool(getattr(config, "router_aux_loss_coef", 0.0))


def why_unbalanced(model: Any, arguments: SFTConfig) -> str | None:
    """What to say where the balancing loss has to be off, because the model does not return what it is computed from.

    None where it can be on, where there is none, and where it was asked for.
    """
    config = model.config.get_text_config()
    if not balances(model) or arguments.router_aux_loss_coef is not None or _returns_router_logits(model, config):
        return None
    return "the loss that keeps experts balanced is off: the model does not return what it is computed from"


@torch.no_grad()
def _returns_router_logits(model: Any, config: Any) -> bool:
    ids_1L = torch.arange(4)[None].to(model.device) + config.vocab_size // 4
    try:
        routed = model.base_model(input_ids=ids_1L, use_cache=False, output_router_logits=True).router_logits
    except (AttributeError, TypeError):
        return False
    experts = getattr(config, "num_experts", None)
    return bool(routed) and all(logits is not None and logits.shape[-1] == experts for logits in routed)


def balancing_of(model: PreTrainedModel) -> Balancing | str:
    """How the model's forward computes its `aux_loss`, or why that is not known.

    It is `load_balancing_loss_func` of the file that the model stands in (Switch Transformer, arXiv 2101.03961,
    equations 4 to 6), with its own numbers of experts; compared with what the model returns for a few tokens.
    It always gets a mask: without one, transformers 5.17 counts by `bincount`, for which the host waits for the GPU.
    """
    files = [sys.modules.get(kind.__module__) for kind in type(model).__mro__]
    functions = (getattr(file, "load_balancing_loss_func", None) for file in files)
    function: Any = next((found for found in functions if found is not None), None)
    text = model.config.get_text_config()
    names = ("num_experts", "num_experts_per_tok")
    experts, chosen = (getattr(model, name, None) or getattr(text, name, None) for name in names)

    def balancing(logits: tuple[Tensor, ...], counted_BT: Tensor) -> Tensor:
        return function(logits, experts, chosen, counted_BT)

    if function is None or not tried("balancing", model, lambda: _balances(model, balancing), is_true):
        return f"a {type(model).__name__} balances its experts in a way of its own"
    return balancing


@torch.no_grad()
def _balances(model: Any, balancing: Balancing) -> bool:
    ids_BT = torch.arange(3, 19).view(2, 8).to(model.device) % model.config.get_text_config().vocab_size
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 4:] = 0
    given = {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False, "output_router_logits": True}
    was_training = model.training
    model.eval()
    try:
        expected = model(**given).aux_loss
        found: Any = balancing(model.base_model(**given).router_logits, mask_BT.bool())
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
        return False
    finally:
        model.train(was_training)
    same = isinstance(found, Tensor) and isinstance(expected, Tensor) and found.shape == expected.shape
    return same and torch.allclose(found, expected.to(found), rtol=1e-4, atol=0)
