"""What a model answered when it was tried out, kept for the next start with the same model, code and device.

Whether documents that are packed stay apart, how the logits come from the last states, and the like are found out by
running the model on a few tokens. Together that is a second or more in front of each run. An answer is kept
(`theodora.kept`) if it was a good one, and for a model of the very same weights, configuration, modules, device and
versions; any other model, one with code of its own, and one of which `know` was not told are tried out each time.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

import theodora
from theodora import kernels
from theodora.kept import kept

_KNOWN_CODE = {"torch", "transformers", "theodora"}
_base_hashes: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def know(model: PreTrainedModel, base_hash: str) -> None:
    """Let answers of this model be kept. Not where several processes run it: all have to try, or none.

    Args:
        model: with the weights of its files, and later a fresh adapter, which changes no output.
        base_hash: of all its weights.
    """
    _base_hashes[model] = base_hash


def tried(question: str, model: PreTrainedModel, find: Callable[[], Any], good: Callable[[Any], bool]) -> Any:
    """The answer of the model, kept or found.

    Args:
        question: what is tried out.
        model: that answers.
        find: tries it out, and leaves the model as it was.
        good: whether an answer may be kept: another one may have a cause that goes away.
    """
    # Random numbers go on as if nothing had been tried, because the next time nothing is.
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        conditions = _conditions(model)
        return find() if conditions is None else kept(f"tried-{question}", conditions, find, good)


def is_true(answer: Any) -> bool:
    """A good answer to a question of yes or no."""
    return answer is True


def _conditions(model: PreTrainedModel) -> dict[str, Any] | None:
    base_hash = _base_hashes.get(model)
    device = model.device
    if base_hash is None or any(_root(module) not in _KNOWN_CODE for module in model.modules()):
        return None
    try:
        config = json.loads(model.config.to_json_string(use_diff=False))
    except (TypeError, ValueError):
        return None
    return {
        "weights": base_hash,
        "config": config,
        "attention": model.config.get_text_config()._attn_implementation,  # pyright: ignore[reportPrivateUsage]
        "modules": _structure(model),
        "code": _code(),
        "own_code": _file(sys.modules[_own_class(model).__module__].__file__),
        "device": str(device),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "fast": kernels.fast(),
        "autocast": str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else None,
        "precision": [torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()],
    }


def _own_class(module: nn.Module) -> type:
    """The class from the library that the model is of, below those that we have made."""
    return next(each for each in type(module).__mro__ if not each.__module__.startswith("theodora"))


def _root(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


def _structure(model: nn.Module) -> str:
    """The hash of what stands where, of which class and dtype, what is trained, and what was put in anybody's way."""
    modules = [
        f"{path} {type(m).__module__} {type(m).__qualname__} {'forward' in vars(m)} "
        f"{len(m._forward_hooks)} {len(m._forward_pre_hooks)}"  # pyright: ignore[reportPrivateUsage]
        for path, m in model.named_modules()
    ]
    parameters = [f"{name} {p.dtype} {tuple(p.shape)} {p.requires_grad}" for name, p in model.named_parameters()]
    return hashlib.sha256("\n".join([*modules, *parameters]).encode()).hexdigest()


@cache
def _code() -> list[Any]:
    """Versions of what runs a model, and the state of our own files."""
    versions: list[str] = [sys.version, torch.__version__]
    for library in ("transformers", "trl", "triton", "liger-kernel"):
        try:
            versions.append(metadata.version(library))
        except metadata.PackageNotFoundError:
            versions.append("none")
    own = sorted(Path(theodora.__file__).parent.rglob("*.py"))
    return [*versions, hashlib.sha256(repr([_file(str(path)) for path in own]).encode()).hexdigest()]


def _file(path: str | None) -> list[Any]:
    if path is None:
        return []
    found = Path(path).stat()
    return [path, found.st_size, found.st_mtime_ns]
