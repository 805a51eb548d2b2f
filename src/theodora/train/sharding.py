"""The frozen base cut over processes by FSDP2 (`fully_shard`), the adapter whole in each of them.

Every process holds a part of each base weight, and gathers a decoder block while it runs. What is trained is left out:
it is small, stays whole everywhere, and so optimizer, checkpoints, saving and resuming are those of DDP. Its gradients
are averaged by `average_gradients`; nothing else of a backward pass crosses the network but base weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from theodora.errors import ConfigError
from theodora.kernels.sharded_weight import is_sharded
from theodora.layers import AdapterLayer
from theodora.layers.experts import AdaptedExperts
from theodora.layers.float8 import Float8Layer
from theodora.layers.token_rows import TokenRowsLayer
from theodora.train.gradients import by_dtype
from theodora.train.launched import is_on

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from theodora.train.processes import Processes

How = Literal["fsdp2", "hsdp"]
OF_FLOAT8 = (
    "A base in float8 (--base-dtype fp8) cannot be sharded over processes: its scales would stay whole and its rows be "
    "cut apart from them. Give --sharding none, or another base_dtype."
)
"""Why such a base stays whole."""
OF_EXPERTS = (
    "A base whose fused experts are adapted cannot be sharded over processes: experts are computed from whole weights, "
    "of which each process would hold a part. Give --sharding none, or leave the experts out (--no-experts)."
)
"""Likewise."""


def shard_model(model: nn.Module, how: How, processes: Processes, *, cpu_offload: bool = False) -> None:
    """Cut the frozen weights of an adapted model over the processes, in place, by decoder block.

    Every process calls it, with the same weights, before the fast path is installed and after activation checkpointing
    is turned on. Parameters that ask for gradients, and those of inactive adapters, stay whole.

    Args:
        model: carries an adapter; on the device it runs on (with `cpu_offload` it may still lie on the CPU).
        how: over all processes ("fsdp2"), or over those of a machine, and the same on every machine ("hsdp").
        processes: all of them.
        cpu_offload: whether the parts lie in the host's memory between passes.

    Raises:
        ConfigError: the model cannot be sharded, or not that way; nothing was changed.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    if (reason := why_not(model, how)) is not None:
        raise ConfigError(reason)
    device = _device(model)
    mesh = _mesh(how, processes, device)
    offload = CPUOffloadPolicy(pin_memory=device.type != "cpu") if cpu_offload else OffloadPolicy()
    ignored = _left_out(model)
    for parameter in _in_order(model, ignored):  # `fully_shard` moves only what it cuts
        parameter.data = parameter.data.to(device)
        torch.distributed.broadcast(parameter.data, 0)  # as DDP does: whoever drew it by other numbers has these
    options: dict[str, Any] = {"mesh": mesh, "offload_policy": offload, "ignored_params": ignored}
    for block in _blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)


def bytes_gathered(model: nn.Module) -> int:
    """What this process sends to others in a forward and backward pass, so that they have its parts of the weights.

    Each sends its part to its neighbour in a ring, and passes on those of the others but one. A block is gathered in
    both passes, since `fully_shard` frees it in between; what stands outside blocks stays from one to the other.

    Args:
        model: sharded by `shard_model`, between passes.
    """
    from torch.distributed.fsdp import FSDPModule

    inner = [module for module in model.modules() if isinstance(module, FSDPModule) and module is not model]
    in_blocks = {parameter for module in inner for parameter in module.parameters()}
    total = 0
    for parameter in model.parameters():
        if is_sharded(parameter):
            count = parameter.device_mesh.size(parameter.device_mesh.ndim - 1)
            part = -(-parameter.shape[0] // count) * (parameter.numel() // parameter.shape[0])
            total += (count - 1) * part * parameter.element_size() * (2 if parameter in in_blocks else 1)
    return total


def average_gradients(parameters: Iterable[nn.Parameter], processes: Processes) -> int:
    """Replace each gradient by its mean over the processes, in one message for each dtype, as DDP does.

    Every process calls it, after the last backward pass of a step, with the same parameters in the same order. One
    without a gradient here counts as zero, if any other process has one.

    Returns:
        How many bytes this process sends, where processes stand in a ring: 2·(N - 1)/N times the gradients' size.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if processes.count == 1 or not parameters:
        return 0
    sent = 0
    for some in by_dtype(parameters):
        # Behind the gradients stands for how many processes each of them is one, so that none is made up.
        flags = some[0].new_tensor([float(p.grad is not None) for p in some], dtype=some[0].dtype)
        parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in some]
        message = torch.cat([*parts, flags])
        torch.distributed.all_reduce(message)
        sent += message.numel() * message.element_size()
        *means, found = message.split([*(p.numel() for p in some), len(some)])
        missing = any(p.grad is None for p in some)
        anywhere = found.tolist() if missing else [1.0] * len(some)
        for parameter, mean, there in zip(some, means, anywhere, strict=True):
            if there:
                mean = mean.div_(processes.count).view_as(parameter)
                if parameter.grad is None:
                    parameter.grad = mean.clone()
                else:
                    parameter.grad.copy_(mean)
    return sent * 2 * (processes.count - 1) // processes.count


def why_not(model: nn.Module | Any, how: str) -> str | None:
    """Why a model cannot be sharded, as a whole sentence with what else to do; None if it can.

    Args:
        model: the model, or its configuration, before its weights are loaded.
        how: "fsdp2" or "hsdp".
    """
    if how not in ("fsdp2", "hsdp"):
        return f"Sharding {how!r} is not known; there are fsdp2 and hsdp."
    if not isinstance(model, nn.Module):
        return _why_not_quantised(getattr(model, "quantization_config", None))
    if any(is_sharded(parameter) for parameter in model.parameters()):
        return "The model is sharded already (its parameters are DTensors); it is cut once."
    if next(iter(model.parameters()), None) is None:
        return "The model has no parameters to shard."
    if any(isinstance(module, Float8Layer) for module in model.modules()):
        return OF_FLOAT8
    if any(isinstance(module, AdaptedExperts) for module in model.modules()):
        return OF_EXPERTS
    config = getattr(model, "config", None)
    return _why_not_quantised(getattr(config, "quantization_config", None))


def asked_of_accelerate() -> str | None:
    """The sharding that accelerate was told to do (`accelerate launch --use_fsdp …`), as our option says it; or None.

    Raises:
        ConfigError: it was told to do what Theodora does not: FSDP of version 1, or sharding of gradients alone.
    """
    if not is_on(os.environ.get("ACCELERATE_USE_FSDP")):
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(
            f"accelerate was told to use FSDP of version {version}, which flattens weights so that DoRA's norms cannot "
            "be computed. Give it --fsdp_version 2, or leave --use_fsdp out and give Theodora --sharding fsdp2."
        )
    return "hsdp" if "HYBRID" in os.environ.get("FSDP_SHARDING_STRATEGY", "").upper() else "fsdp2"


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within the block the weights of a sharded block or model are whole; every process enters it.

    For what runs a part of the model by itself. Parts that stand in sharded blocks of their own are gathered, too.
    """
    from torch.distributed.fsdp import FSDPModule

    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in sharded:
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            part.reshard()


def _device(model: nn.Module) -> torch.device:
    """Where the model runs: where its weights lie, or the GPU of this process if they still lie on the CPU."""
    device = next(model.parameters()).device
    if device.type == "cpu" and torch.distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _mesh(how: How, processes: Processes, device: torch.device) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    if how == "fsdp2":
        return init_device_mesh(device.type, (processes.count,), mesh_dim_names=("shard",))
    local = processes.count_here
    if local == processes.count:
        raise ConfigError(
            f"Sharding hsdp keeps a whole model on each machine, and all {local} processes run on one: give "
            "--sharding fsdp2, which is the same there."
        )
    if local == 1 or processes.count % local:
        raise ConfigError(
            f"Sharding hsdp shards within a machine; {local} of {processes.count} processes run on this one (expected: "
            "several, and as many on each). Give --sharding fsdp2, or start as many processes on every machine."
        )
    shape = processes.count // local, local
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def _left_out(model: nn.Module) -> set[nn.Parameter]:
    """What stays whole in every process: whatever is trained, and all adapters' own."""
    adapters = [layer.adapters for layer in model.modules() if isinstance(layer, AdapterLayer)]
    adapters += [module.token_rows for module in model.modules() if isinstance(module, TokenRowsLayer)]
    own = {parameter for module in adapters for parameter in module.parameters()}
    return own | {parameter for parameter in model.parameters() if parameter.requires_grad}


def _in_order(model: nn.Module, some: set[nn.Parameter]) -> list[nn.Parameter]:
    """Parameters in the model's order, which is the same in every process."""
    return [parameter for parameter in model.parameters() if parameter in some]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks, from the last to the first of `modules()`, so that inner ones come first.

    By the model's own word (`_no_split_modules`), or else the members of its lists of modules.
    """
    names: set[str] = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names and module is not model]
    if not blocks:
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
        blocks = [block for each in lists for block in each if any(True for _ in block.parameters())]
    return [block for block in reversed(blocks) if any(not p.requires_grad for p in block.parameters())]


def _why_not_quantised(quantization: Any) -> str | None:
    """Why weights quantised like that cannot be cut; None for those that can, and for plain ones."""
    if quantization is None:
        return None
    said: dict[str, Any] = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = said.get("quant_method")
    method = str(getattr(method, "value", method) or "")
    if said.get("load_in_4bit") or said.get("_load_in_4bit"):
        storage = str(said.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
        if storage in _STORAGE:
            return None
        return (
            f"The base's NF4 or FP4 numbers are stored as {storage}, which fully_shard cannot cut: bitsandbytes finds "
            "its scales again only for a floating point storage dtype. Expected bnb_4bit_quant_storage="
            "bfloat16 (of the model's own dtype), or --sharding none."
        )
    kind = "bitsandbytes int8 (LLM.int8())" if said.get("load_in_8bit") else _NAMES.get(method, method or "unknown")
    why = _REASONS.get("int8" if said.get("load_in_8bit") else method, "its layers keep more than one packed tensor")
    return (
        f"A base quantised by {kind} cannot be sharded over processes: {why}. Give --sharding none (each process "
        "holds the whole base), or a base in NF4 with a floating point storage dtype, or a plain one."
    )


_STORAGE = ("bfloat16", "float16", "float32", "float64")
_NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "hqq": "HQQ",
    "torchao": "torchao",
    "compressed-tensors": "compressed-tensors",
    "fp8": "fine-grained FP8",
}
_REASONS = {
    "int8": "its scales lie on the parameter itself, where cutting it loses them",
    "gptq": "its packed numbers are buffers, which fully_shard leaves whole",
    "awq": "its packed numbers are buffers, which fully_shard leaves whole",
    "hqq": "its scales lie in a dictionary beside the packed numbers, which is not cut with them",
    "torchao": "its tensors are of classes that cannot all be gathered from parts",
}


__all__ = ["asked_of_accelerate", "average_gradients", "bytes_gathered", "gathered", "shard_model", "why_not"]
