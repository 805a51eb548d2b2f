"""What TRL has to know of a mixture of experts for the loss that keeps its experts balanced."""

from __future__ import annotations

from typing import Any

import torch
from trl.trainer.sft_config import SFTConfig

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


def why_unbalanced(model: Any, arguments: SFTConfig) -> str | None:
    """What to say where the balancing loss has to be off, because the model does not return what it is computed from.

    None where it can be on, where there is none, and where it was asked for.
    """
    config = model.config.get_text_config()
    wanted = hasattr(config, "output_router_logits") and getattr(config, "router_aux_loss_coef", 0.0)
    if not wanted or arguments.router_aux_loss_coef is not None or _returns_router_logits(model, config):
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
