"""A micro-batch's forward and backward pass as a CUDA graph: which runs can have one, and what of a batch goes into it.

A graph reads tensors alone. What else the host knows of a batch decides whether the batch fits at all; the others run
as always. See `theodora.kernels.graph`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.training_args import OptimizerNames

from theodora.train.fused_loss import LEARNED, Head, Learned

_TARGETS, _POSITIONS, _ITEMS = "learned.targets", "learned.positions", "num_items_in_batch"


def graphs_pay(device: torch.device) -> bool:
    """Whether there are CUDA graphs on the device."""
    return device.type == "cuda"


def why_no_graph(trainer: Trainer) -> str | None:
    """What about a run, whose optimizer may not exist yet, keeps its steps from being graphs."""
    arguments, accelerator = trainer.args, trainer.accelerator
    model: Any = trainer.model
    config = model.config.get_text_config()
    reasons = {
        "several processes or GPUs": arguments.world_size > 1 or arguments.n_gpu > 1,
        "the model is not on one device": any(p.device != arguments.device for p in model.parameters()),
        "torch.compile": arguments.torch_compile,
        "fp16 scales its losses": accelerator.scaler is not None,
        "activation_offloading": getattr(arguments, "activation_offloading", False),
        "torch_empty_cache_steps": arguments.torch_empty_cache_steps is not None,
        "layers are dropped at random": any(getattr(config, name, 0) for name in ("layerdrop", "decoder_layerdrop")),
        "the optimizer steps within the backward pass": str(OptimizerNames(arguments.optim).value).endswith(
            ("lomo", "layerwise")
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def graph_inputs(inputs: Mapping[str, Any], num_items: Any, head: Head) -> dict[str, Tensor] | None:
    """A batch with the fused loss as tensors alone, or None if a graph cannot take it."""
    learned = inputs.get(LEARNED)
    if learned is None or not isinstance(num_items, Tensor):
        return None
    left_out = {"labels", LEARNED} | ({"attention_mask"} if head.maskless and learned["maskless"] else set())
    tensors = {name: value for name, value in inputs.items() if name not in left_out}
    # A mask is looked at by the host, and so are positions that are given.
    if "attention_mask" in tensors or "position_ids" in tensors:
        return None
    tensors |= {_TARGETS: learned["targets"], _POSITIONS: learned["positions"], _ITEMS: num_items}
    if learned["positions"] is None:
        del tensors[_POSITIONS]
    return tensors if all(isinstance(value, Tensor) for value in tensors.values()) else None


def batch_of(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
    """The model's inputs, and the number of learned tokens in the whole step, from `graph_inputs`."""
    learned = Learned(targets=tensors[_TARGETS], positions=tensors.get(_POSITIONS), tokens=0, maskless=False)
    inputs = {name: t for name, t in tensors.items() if name not in (_TARGETS, _POSITIONS, _ITEMS)}
    return {**inputs, LEARNED: learned}, tensors[_ITEMS]
