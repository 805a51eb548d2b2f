"""A variant as a function that computes the loss of a batch: the model, its adapter, and what makes it fast.

Runs in the worker's process. Shapes: B sequences, T tokens, H hidden size.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from theodora.adapters import inject_adapter
from theodora.adapters.quantize import quantize_base
from theodora.bench.models import decoder_blocks, load_base
from theodora.bench.variants import Variant, Workload
from theodora.config import AdapterConfig
from theodora.fastpath.accelerate import accelerate, checkpoint_activations, recompute_less
from theodora.fastpath.masks import whole_rows
from theodora.kernels.cross_entropy import linear_cross_entropy
from theodora.layers.experts import expert_parameters


@dataclass
class Step:
    """A training step without its backward pass."""

    loss: Callable[[], Tensor]
    """Runs the forward pass on the batch: the mean loss of a predicted token."""
    trained: list[nn.Parameter]


def build(workload: Workload, variant: Variant) -> tuple[Any, Callable[[], Step]]:
    """The frozen model on its device, and a function that puts the adapter and all else on it.

    Raises:
        CheckpointError: the model does not load.
        ConfigError: the variant needs what is not there.
    """
    model = load_base(workload)
    return model, partial(prepare, model, workload, variant)


def prepare(model: Any, workload: Workload, variant: Variant) -> Step:
    """Put the variant's adapter and kernels on a frozen model."""
    if variant.liger == "all":
        use_liger_kernels(model)
    if variant.library == "peft":
        _add_peft(model, workload, variant)
    elif variant.library == "theodora":
        _add_theodora(model, workload, variant)
    if workload.gradient_checkpointing:
        checkpoint_activations(model)
        if variant.accelerate:
            recompute_less(model)
    # What any adapter has to pay: gradients flow through all layers down to the embeddings' output.
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    model.train()
    if variant.compiled:
        compile_blocks(model)
    ids_BT = random_batch(workload, model.config.get_text_config().vocab_size)
    return Step(_loss_function(model, ids_BT, variant), [p for p in model.parameters() if p.requires_grad])


def random_batch(workload: Workload, vocabulary: int) -> Tensor:
    """Random tokens (B, T) on the workload's device; the same ones in every process."""
    generator = torch.Generator().manual_seed(workload.seed)
    ids_BT = torch.randint(vocabulary, (workload.batch, workload.length), generator=generator)
    return ids_BT.to(workload.device)


def shifted_labels(ids_BT: Tensor) -> Tensor:
    """The next token of each position; the last position has none."""
    return nn.functional.pad(ids_BT[:, 1:], (0, 1), value=-100)


def matmul_flops(model: nn.Module, workload: Workload) -> float:
    """Floating-point operations that a step on the frozen model cannot do without.

    Every weight of a matrix product costs 2 operations a token in the forward pass and 2 for the gradient of its
    input; there is no gradient of a frozen weight. Causal attention: two products over half of the T × T scores
    forward, four backward. Not counted: pointwise work, the adapter, and what checkpointing computes again.
    """
    # By the layers' sizes: a quantised weight is packed, and has another shape than its numbers.
    weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    weights += sum(m.weight.numel() for m in model.modules() if isinstance(m, Conv1D))
    config = model.config.get_text_config()  # pyright: ignore
    experts = sum(p.numel() / p.shape[0] for p in _expert_parameters(model).values())
    weights += experts * (getattr(config, "num_experts_per_tok", None) or 0)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    attention = 6 * workload.batch * workload.length**2 * width * config.num_hidden_layers
    return 4.0 * weights * workload.tokens + attention


def _expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Path → a weight of fused experts, E weights in one."""
    of_modules = ((path, m, expert_parameters(m, path)) for path, m in model.named_modules())
    return {f"{path}.{name}": getattr(m, name) for path, m, names in of_modules for name in names}


# Adapters -------------------------------------------------------------------------------------------------------------


def _add_peft(model: Any, workload: Workload, variant: Variant) -> None:
    """PEFT's adapter, in place."""
    from peft import LoraConfig, get_peft_model

    targets = workload.targets if isinstance(workload.targets, str) else list(workload.targets)
    names = {".".join(path.split(".")[-2:]) for path in _expert_parameters(model)} if variant.experts else None
    config = LoraConfig(
        r=workload.rank,
        lora_alpha=2 * workload.rank,
        target_modules=targets,
        target_parameters=sorted(names) if names else None,
        use_dora=variant.method == "dora",
    )
    with warnings.catch_warnings():
        # PEFT looks for the fused experts, which it gives a rank of its own, among modules.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not", RuntimeWarning)
        get_peft_model(model, config, autocast_adapter_dtype=not variant.bf16_adapter)


def _add_theodora(model: Any, workload: Workload, variant: Variant) -> None:
    """Our adapter, in place, on the fast path if the variant asks for it."""
    assert variant.method is not None
    config = AdapterConfig(
        method=variant.method,
        rank=workload.rank,
        targets=workload.targets,
        experts=variant.experts or None,
        adapter_dtype="base" if variant.bf16_adapter else "float32",
    )
    if variant.base_dtype == "fp8":
        quantize_base(model)
    inject_adapter(model, config)
    if variant.accelerate:
        accelerate(model)


# What makes it fast ---------------------------------------------------------------------------------------------------


def use_liger_kernels(model: Any) -> None:
    """Liger's norms, rotary embeddings and MLPs where it knows the family; the loss is `_loss_function`'s."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if apply is not None:
        ours = {"fused_linear_cross_entropy": False, "cross_entropy": False}
        if _expert_parameters(model):
            ours["swiglu"] = False  # transformers' grouped products run the experts
        known = inspect.signature(apply).parameters
        apply(model=model, **{key: value for key, value in ours.items() if key in known})


def compile_blocks(model: Any) -> None:
    """Each decoder block under torch.compile, one graph for all of them."""
    for block in decoder_blocks(model):
        block.compile(dynamic=False)


def _loss_function(model: Any, ids_BT: Tensor, variant: Variant) -> Callable[[], Tensor]:
    """The mean loss; by a cross entropy fused with the output head, ours or Liger's, where the variant has one."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    special = getattr(config, "final_logit_softcapping", None) or getattr(config, "logit_scale", None)
    if special or head is None or (variant.liger == "none" and not variant.accelerate):
        return lambda: model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    decoder, labels_N = model.base_model, shifted_labels(ids_BT).flatten()
    predicted = ids_BT.shape[0] * (ids_BT.shape[1] - 1)

    def ours() -> Tensor:
        with whole_rows():
            hidden_NH = decoder(input_ids=ids_BT, use_cache=False)[0].flatten(0, 1)
        return linear_cross_entropy(hidden_NH, head.weight, labels_N, bias_V=head.bias).nats / predicted

    if variant.accelerate:
        return ours
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    cross_entropy = LigerFusedLinearCrossEntropyLoss()

    def ligers() -> Tensor:
        hidden_NH = decoder(input_ids=ids_BT, use_cache=False)[0].flatten(0, 1)
        return cross_entropy(head.weight, hidden_NH, labels_N, head.bias)

    return ligers
