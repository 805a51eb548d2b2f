"""What an answer of a model depends on, for those that keep answers from start to start (`theodora.kept`)."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import theodora
from theodora import kernels
from theodora.adapters.state import find_state

_KNOWN_CODE = {"torch", "transformers", "theodora"}
# Beside torch, what runs a model; some models of transformers' call the last ones where they are installed.
_LIBRARIES = (
    *("transformers", "trl", "accelerate", "triton", "liger-kernel", "kernels", "flash-attn", "flash-attn-3"),
    *("flash-linear-attention", "causal-conv1d", "mamba-ssm", "xformers"),
)
_PLAIN = (bool, int, float, str, type(None))
_SMALL = 1 << 20  # bytes of a tensor up to which sha256 costs nothing


def conditions(model: PreTrainedModel, weights: str) -> dict[str, Any] | None:
    """All that a model's answers depend on, as JSON takes it; None where nobody knows all of it.

    Args:
        model: of a class of transformers' or ours.
        weights: `hash_of_weights` of it, or of what it was made from.
    """
    device = model.device
    if any(_root(module) not in _KNOWN_CODE for module in model.modules()):
        return None
    try:
        config = json.loads(model.config.to_json_string(use_diff=False))
        code, own_code = _code(), _file(sys.modules[_own_class(model).__module__].__file__)
    except (TypeError, ValueError, OSError):  # OSError: files of an archive
        return None
    state = find_state(model)
    return {
        "weights": weights,
        "config": config,
        "adapters": None if state is None else [state.active, state.merged, repr(state.configs)],
        "attention": model.config.get_text_config()._attn_implementation,  # pyright: ignore[reportPrivateUsage]
        "modules": structure(model),
        "code": code,
        "own_code": own_code,
        "device": str(device),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "fast": kernels.fast(),
        "autocast": str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else None,
        "precision": [torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()],
        "kernels": [torch.backends.cpu.get_cpu_capability(), torch.backends.mkldnn.enabled, *_attention_kernels()],
    }


def _attention_kernels() -> list[bool]:
    """Which kernels torch may choose from for attention on a GPU."""
    choices = torch.backends.cuda
    first = [choices.flash_sdp_enabled(), choices.mem_efficient_sdp_enabled()]
    return [*first, choices.math_sdp_enabled(), choices.cudnn_sdp_enabled()]


def _own_class(module: nn.Module) -> type:
    """The class from the library that the model is of, below those that we have made."""
    return next(each for each in type(module).__mro__ if not each.__module__.startswith("theodora"))


def _root(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


def construction(model: nn.Module) -> list[str]:
    """What stands where, of which class, and what was put in its way."""
    return [
        f"{path} {type(m).__module__} {type(m).__qualname__} {'forward' in vars(m)} "
        f"{len(m._forward_hooks)} {len(m._forward_pre_hooks)}"  # pyright: ignore[reportPrivateUsage]
        for path, m in model.named_modules()
    ]


def structure(model: nn.Module) -> str:
    """The hash of `construction`, of dtypes, of what is trained, and of what modules keep beside their weights:
    numbers and names, and small buffers."""
    modules = construction(model) + [
        f"{sorted((name, value) for name, value in vars(m).items() if type(value) in _PLAIN)}" for m in model.modules()
    ]
    kinds = {type(module) for module in model.modules()}
    methods = sorted(f"{kind.__module__} {kind.__qualname__} {_place(kind)}" for kind in kinds)
    parameters = [f"{name} {p.dtype} {tuple(p.shape)} {p.requires_grad}" for name, p in model.named_parameters()]
    hashed = hashlib.sha256("\n".join([*modules, *methods, *parameters]).encode())
    for name, buffer in model.named_buffers():
        hashed.update(f"{name} {buffer.dtype} {tuple(buffer.shape)} ".encode())
        if buffer.nbytes <= _SMALL and not buffer.is_meta:
            hashed.update(_bytes(buffer.detach()))
    return hashed.hexdigest()


def _place(kind: type[nn.Module]) -> str:
    """Where the code of a class's `forward` stands: another library may have put its own there."""
    code: Any = getattr(kind.forward, "__code__", None)
    return "" if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@cache
def _code() -> list[Any]:
    """Versions of what runs a model, and the state of the files that may change under one version: ours, and those of
    a transformers or TRL that is worked on where it lies."""
    versions: list[str] = [sys.version, torch.__version__]
    for library in _LIBRARIES:
        try:
            versions.append(metadata.version(library))
        except metadata.PackageNotFoundError:
            versions.append("none")
    others = Path(transformers.__file__).parent
    files = [
        *Path(theodora.__file__).parent.rglob("*.py"),
        *(path for folder in (others, others / "integrations", others / "utils") for path in folder.glob("*.py")),
        *(others / "generation").rglob("*.py"),
    ]
    found = importlib.util.find_spec("trl")  # which need not be imported for this
    if found is not None and found.origin is not None:
        files += (Path(found.origin).parent / "trainer").glob("sft_*.py")
    return [*versions, hashlib.sha256(repr([_file(str(path)) for path in sorted(files)]).encode()).hexdigest()]


def _file(path: str | None) -> list[Any]:
    if path is None:
        return []
    found = Path(path).stat()
    return [path, found.st_size, found.st_mtime_ns]


def hash_of_weights(model: nn.Module) -> str:
    """The hash of a model's parameters by name; large ones go into it by torch's own hash, which is fast."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(_stored(model)):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        if tensor.nbytes <= _SMALL:
            hashed.update(_bytes(tensor))
        else:
            hashed.update(str(int(torch.hash_tensor(tensor).item())).encode())
    return hashed.hexdigest()


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters that are as the files have them: not what was quantised on loading, which devices do differently."""
    for name, parameter in model.named_parameters():
        plain = type(parameter.data) is Tensor and parameter.is_floating_point() and parameter.element_size() > 1
        if plain and not parameter.is_meta:
            yield name, parameter.detach()
