"""For people who already have a trainer: PEFT's models on our kernels, and back.

    trainer = SFTTrainer(model, peft_config=LoraConfig(use_dora=True))
    print(theodora.accelerate_peft(trainer.model))
    trainer.train()

Nothing but the class of PEFT's layers changes: parameters, state dict keys, saved files, `requires_grad` and the
optimizer's references stay what they are. What cannot be accelerated is left alone and named.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from torch import nn

from theodora.errors import ConfigError, bullet_list, in_line
from theodora.fastpath.accelerate import FastPath, check_fast_path, restore_model, speed_up_model
from theodora.layers import AdapterLayer
from theodora.layers.libraries import prepare

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate_peft` did."""

    fast: tuple[str, ...]
    """Paths of the layers that run on our kernels."""
    left_alone: dict[str, str] = field(default_factory=dict)
    """Path -> reason, of PEFT's layers that run PEFT's own forward pass, at least at present."""
    around: FastPath = field(default_factory=FastPath)
    """What of the model around the layers is on the fast path, too: see `theodora.fastpath.accelerate`."""

    def __str__(self) -> str:
        total = len(self.fast) + len(self.left_alone)
        around = f" So do, on a GPU: {self.around}." if self.around != FastPath() else ""
        return f"{len(self.fast)} of {total} PEFT layers run on Theodora's kernels.{around}" + self._reasons()

    def _reasons(self) -> str:
        paths: dict[str, list[str]] = {}
        for path, reason in self.left_alone.items():
            paths.setdefault(reason, []).append(path)
        if not paths:
            return ""
        return "\nLeft to PEFT:" + bullet_list([f"{in_line(some, 3)}: {reason}" for reason, some in paths.items()])


def accelerate_peft(model: nn.Module) -> Acceleration:
    """Run a model's PEFT adapters (LoRA and DoRA on linear layers) on Theodora's kernels, in place.

        report = theodora.accelerate_peft(trainer.model)      # before trainer.train()

    Call it once the adapters are on the model; call it again after adding adapters to further layers. A layer decides
    in every forward pass: with one active LoRA or DoRA on a plain frozen weight it runs on the kernels; merged,
    disabled, hooked, with several adapters active or given `adapter_names` it runs PEFT's forward. Losses and
    gradients are PEFT's, up to rounding; with adapters of a wider dtype than the model's (PEFT's default for
    half-precision models) the products are of the model's dtype.

    Args:
        model: a `PeftModel`, or any module with PEFT's tuner layers inside.

    Returns:
        What runs on the kernels, and what was left to PEFT and why; `print` it. The latter is also logged, once.

    Raises:
        ConfigError: PEFT is missing or too old, there are no PEFT adapters in `model`, or another library has put a
            class of its own on top of one of ours since an earlier call; nothing was changed.
    """
    peft_layer = _peft_layer()
    check_fast_path(model)
    prepare(model)
    fast: list[str] = []
    left_alone: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, peft_layer.BaseTunerLayer):
            reason = peft_layer.accelerate_layer(module)
            if reason is None:
                fast.append(path)
            else:
                left_alone[path] = reason
    if not fast and not left_alone:
        raise ConfigError(_nothing_found(model))
    report = Acceleration(tuple(fast), left_alone, speed_up_model(model) if fast else FastPath())
    if left_alone:
        _log.warning("%s", report)
    return report


def restore_peft(model: nn.Module) -> None:
    """Undo `accelerate_peft`: PEFT's layers are PEFT's again, and the modules around them the model's own.

    Works as well on what PEFT's `unload` and `merge_and_unload` have left, where only the latter remain. Does nothing
    to a model that is not accelerated, nor to one that Theodora's own adapters keep on the fast path.

    Raises:
        ConfigError: another library has changed the class of an accelerated layer since; nothing is undone.
    """
    if importlib.util.find_spec("peft") is None:
        return
    peft_layer = _peft_layer()
    layers = [module for module in model.modules() if isinstance(module, peft_layer.FastPeft)]
    odd = sorted({type(layer).__name__ for layer in layers if not peft_layer.is_ours(layer)})
    if odd:
        raise ConfigError(
            f"Since accelerate_peft, another library has made {', '.join(odd)} of this model's layers, as FSDP2's "
            "fully_shard does. Call restore_peft before it does so, or go on with the accelerated model: its state "
            "dict and its files are PEFT's."
        )
    if layers or not any(hasattr(module, "parts") for module in model.modules()):
        restore_model(model)
    for layer in layers:
        peft_layer.restore_layer(layer)


def _peft_layer() -> Any:
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("accelerate_peft needs PEFT, which is not installed: pip install peft")
    try:
        from theodora.fastpath import peft_layer
    except ImportError as error:
        raise ConfigError(
            f"accelerate_peft needs PEFT 0.21 or later, found {version('peft')}: pip install --upgrade peft"
        ) from error
    return peft_layer


def _nothing_found(model: nn.Module) -> str:
    if any(isinstance(module, AdapterLayer) for module in model.modules()):
        return (
            "This model's adapter is Theodora's own, which runs on the kernels anyway: accelerate_peft is for PEFT's."
        )
    kinds = {str(getattr(kind, "peft_type", "")) for kind in getattr(model, "peft_config", {}).values()}
    if kinds:
        return f"accelerate_peft is for LoRA and DoRA; this model's PEFT methods are {', '.join(sorted(kinds))}."
    return (
        f"No PEFT adapter found in this {type(model).__name__}. Call accelerate_peft once the adapters are on: after "
        "peft.get_peft_model(model, config), or on `trainer.model` of a trainer made with `peft_config`."
    )
