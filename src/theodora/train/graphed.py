"""A micro-batch's forward and backward pass as a CUDA graph: which runs can have one, and what of a batch goes into it.

A graph reads tensors alone. What else the host knows of a batch decides whether the batch fits at all; the others run
as always. See `theodora.kernels.graph`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.training_args import OptimizerNames

from theodora.data.packing import packed_batch
from theodora.layers.libraries import why_not_captured
from theodora.train.fused_loss import LEARNED, Head, Learned
from theodora.train.processes import Processes
from theodora.train.tried import is_true, tried

_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_TARGETS, _POSITIONS, _ITEMS = "learned.targets", "learned.positions", "num_items_in_batch"
_SEQUENCES, _REAL, _WEIGHT = "learned.bounds", "learned.real", "weight of the balancing loss"


def graphs_pay(device: torch.device) -> bool:
    """Whether there are CUDA graphs on the device."""
    return device.type == "cuda"


def why_no_graph(trainer: Trainer) -> str | None:
    """What about a run, whose optimizer may not exist yet, keeps its steps from being graphs."""
    arguments, accelerator = trainer.args, trainer.accelerator
    model: Any = trainer.model
    config = model.config.get_text_config()
    reasons = {
        "the weights are sharded": Processes.here().sharding is not None,
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
    return next((reason for reason, holds in reasons.items() if holds), None) or why_not_captured(model)


def draws_at_random(model: PreTrainedModel) -> bool:
    """Whether a forward pass in training may draw random numbers (dropout, noise on a router)."""
    return any(
        isinstance(value, float) and value > 0 and (name == "p" or "drop" in name or "jitter" in name)
        for module in model.modules()
        for name, value in vars(module).items()
    )


def reads_bounds(model: PreTrainedModel) -> bool:
    """Whether the model needs to be told where the sequences of a packed row begin otherwise than by their positions.

    Some layers (flash attention, linear attention) do. There are as many bounds as sequences, so that no two batches
    have one shape.
    """
    attention = model.config.get_text_config()._attn_implementation  # pyright: ignore[reportPrivateUsage]
    if attention not in ("sdpa", "eager"):
        return True
    return not tried("bounds-unread", model, lambda: not _reads_bounds(model), is_true)


def _reads_bounds(model: PreTrainedModel) -> bool:
    device = next(model.get_input_embeddings().parameters()).device
    ids = torch.arange(3, 16, device=device) % model.config.get_text_config().vocab_size
    batch = packed_batch([ids[:6], ids[6:]])
    without = {name: value for name, value in batch.items() if name not in _BOUNDS}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits: list[Tensor] = [model(**given, use_cache=False).logits for given in (batch, without)]
    finally:
        model.train(was_training)
    return not torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3 * float(logits[0].abs().max()))


def graph_inputs(
    inputs: Mapping[str, Any], num_items: Any, head: Head, reads_bounds: bool, weight: float
) -> dict[str, Tensor] | None:
    """A batch with the fused loss as tensors alone, or None if a graph cannot take it.

    Args:
        inputs: what the collator made, on the device.
        num_items: learned tokens in the whole step.
        head: how the loss is computed.
        reads_bounds: `reads_bounds` of the model.
        weight: of the loss that keeps experts balanced, which may be another in an epoch's last step.
    """
    learned = inputs.get(LEARNED)
    if learned is None or not isinstance(num_items, Tensor):
        return None
    left_out = {"labels", LEARNED} | ({"attention_mask"} if head.maskless and learned["maskless"] else set())
    tensors = {name: value for name, value in inputs.items() if name not in left_out}
    if "attention_mask" in tensors:  # the host looks at it
        return None
    if "position_ids" in tensors:
        if reads_bounds:
            return None
        tensors = {name: value for name, value in tensors.items() if name not in _BOUNDS}
        if not learned["packed"]:
            del tensors["position_ids"]  # they count the tokens, as the model does by itself
    tensors |= {_TARGETS: learned["targets"], _POSITIONS: learned["positions"], _ITEMS: num_items}
    if learned["positions"] is None:
        del tensors[_POSITIONS]
    if learned["bounds"] is not None:
        tensors[_SEQUENCES] = learned["bounds"]
    if learned["real"] is not None:
        tensors[_REAL] = learned["real"]
    if head.balancing is not None:
        tensors[_WEIGHT] = torch.full((), weight, device=num_items.device)
    return tensors if all(isinstance(value, Tensor) for value in tensors.values()) else None


def batch_of(tensors: Mapping[str, Tensor], longest: int | None) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """From `graph_inputs`: the model's inputs, the number of learned tokens in the whole step, and the weight of the
    loss that keeps experts balanced.

    Args:
        tensors: what a graph reads.
        longest: tokens that a sequence has at most; None if there is no bound.
    """
    length = tensors["input_ids"].shape[1]
    learned = Learned(
        targets=tensors[_TARGETS],
        positions=tensors.get(_POSITIONS),
        tokens=0,
        maskless=False,
        packed="position_ids" in tensors,
        bounds=tensors.get(_SEQUENCES),
        longest=min(longest or length, length),
        real=tensors.get(_REAL),
    )
    told = (_TARGETS, _POSITIONS, _ITEMS, _SEQUENCES, _REAL, _WEIGHT)
    inputs = {name: t for name, t in tensors.items() if name not in told}
    return {**inputs, LEARNED: learned}, tensors[_ITEMS], tensors.get(_WEIGHT)
