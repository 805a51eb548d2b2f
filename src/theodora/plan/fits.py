"""Whether a run fits, asked before its model is loaded."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from theodora.adapters.quantized import stored_quantization
from theodora.config import TrainConfig
from theodora.errors import CheckpointError, ConfigError
from theodora.files.classes import check_kernels
from theodora.files.distrust import expanded
from theodora.files.model_folder import check_model_folder
from theodora.plan.devices import GIB, Machine
from theodora.plan.estimate import Estimate, Models, Setting, candidates, estimate, largest_batch, recommend
from theodora.plan.paper import PaperModel, Stored

LARGE_MODEL = 3_000_000_000
"""Parameters from which activations are recomputed unless told otherwise."""
_ROOMY = 60
"""Numbers as wide as the hidden state that a token leaves in a block, at most: twice GPT-2's by plain autograd."""


@dataclass(frozen=True)
class Verdict:
    """Whether a run fits its device."""

    fits: bool
    """As it was asked for."""
    splits: bool
    """Whether it would with fewer rows in a pass: a run splits its batches by itself."""
    estimate: Estimate | None
    """Of the run as it was asked for; None where a rough look was enough."""
    instead: Estimate | None
    """A setting that would fit; None where none is known, or none is needed."""
    message: str
    """What to tell; empty where it fits."""


def fits(
    config: TrainConfig,
    machine: Machine,
    *,
    length: int | None = None,
    dtype: torch.dtype | None = None,
    model_config: PreTrainedConfig | None = None,
) -> Verdict:
    """Whether a run fits, from configurations alone.

    Args:
        config: the run.
        machine: where; `plan.machine()` is this one.
        length: tokens of the longest row, if they are known; at most max_length is taken.
        dtype: of the base's plain weights. Default: as the options say.
        model_config: of the model, where it is at hand; else config.json is read.

    Raises:
        ConfigError: the adapter does not fit the model.
        CheckpointError: the model has no configuration that can be read.
    """
    if model_config is None:
        model_config = read_config(config)
    setting = setting_of(config, model_config, length)
    if _clearly_fits(config, model_config, setting, machine):
        return Verdict(True, False, None, None, "")
    models = models_of(config, model_config, machine, dtype)
    setting = with_default(setting, config, models(setting.stored))
    optimizer = optimizer_of(config)
    found = estimate(models(setting.stored), setting, machine.gpus, optimizer)
    if found.fits(machine.memory):
        return Verdict(True, False, found, None, "")
    rows = largest_batch(models(setting.stored), setting, machine, optimizer, setting.batch)
    stores = stores_of(config, model_config, machine)
    others = candidates(setting, machine, stores=stores, recomputes=(False, True), shardings=shardings(machine, config))
    instead = recommend(models, others, machine, optimizer)
    return Verdict(False, rows > 0, found, instead, _told(found, rows, instead, machine, models))


def read_config(config: TrainConfig) -> PreTrainedConfig:
    """A model's configuration, as `train` would read it.

    Raises:
        CheckpointError: there is none that can be read.
    """
    check_model_folder(config.model)
    try:
        found: Any = AutoConfig.from_pretrained(
            config.model, trust_remote_code=config.trust_remote_code, revision=config.revision or "main"
        )
        check_kernels(found, config.model, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{config.model} has no configuration of a model: {error}") from error
    return found


def setting_of(config: TrainConfig, model_config: PreTrainedConfig, length: int | None = None) -> Setting:
    """The way to run that a configuration asks for; recomputing is settled by `with_default`.

    Raises:
        ConfigError: a model that is quantised already is to be quantised again.
    """
    stored = _store_of(config)
    if stored != "plain" and stored_quantization(model_config) is not None:
        raise ConfigError(
            f"quantize is {stored}, but {config.model} is quantised already: quantising it again would round every "
            "weight twice. Leave that out, or name the model that it was made from."
        )
    longest = config.max_length if length is None or config.packing else min(length, config.max_length)
    return Setting(
        stored=stored,
        recomputes=bool(config.gradient_checkpointing),
        batch=config.per_device_train_batch_size,
        length=max(longest, 1),
        accumulation=config.gradient_accumulation_steps,
        sharding="none" if config.sharding in ("auto", "none") else "fsdp2",
        cpu_offload=config.cpu_offload,
    )


def with_default(setting: Setting, config: TrainConfig, model: PaperModel) -> Setting:
    """With activations recomputed from some size of model on, where the options leave it open."""
    if config.gradient_checkpointing is not None:
        return setting
    return replace(setting, recomputes=model.parameters >= LARGE_MODEL)


def models_of(
    config: TrainConfig, model_config: PreTrainedConfig, machine: Machine, dtype: torch.dtype | None = None
) -> Models:
    """The model on paper as each kind stores it, made when it is asked for and kept."""
    fp16 = bool(config.trainer.get("fp16"))
    plain = dtype or _plain_dtype(config, machine.device, fp16)

    @cache
    def made(stored: Stored) -> PaperModel:
        return PaperModel(
            model_config,
            config.adapter,
            dtype=plain,
            stored=stored,
            device="cuda" if machine.device == "cuda" else "cpu",
            kernels=config.kernels,
            name=config.model,
            trust_remote_code=config.trust_remote_code,
        )

    return made


def stores_of(config: TrainConfig, model_config: PreTrainedConfig, machine: Machine) -> tuple[Stored, ...]:
    """What the frozen weights may be put into: as asked for, or any where nothing was."""
    if config.base_dtype == "fp8":
        return ("fp8",)
    if config.quantize is not None:
        return ("plain",) if config.quantize == "none" else (config.quantize,)  # pyright: ignore[reportReturnType]
    if config.trains_all or stored_quantization(model_config) is not None:
        return ("plain",)
    return ("plain", "int8", "nf4") if machine.device == "cuda" else ("plain", "nf4")


def shardings(machine: Machine, config: TrainConfig) -> tuple[str, ...]:
    """How several processes may share the base; weights that are all trained stay whole."""
    return ("none", "fsdp2") if machine.gpus > 1 and not config.trains_all else ("none",)


def optimizer_of(config: TrainConfig) -> str:
    """Its name."""
    return str(config.trainer.get("optim", "adamw_torch_fused"))


def changes(setting: Setting, config: TrainConfig, model: PaperModel) -> list[str]:
    """The flags of `theodora train` by which a setting differs from a configuration."""
    own = with_default(
        replace(
            setting,
            batch=config.per_device_train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            recomputes=bool(config.gradient_checkpointing),
        ),
        config,
        model,
    )
    flags: list[str] = []
    if setting.batch != own.batch or setting.accumulation != own.accumulation:
        flags += ["--per-device-train-batch-size", str(setting.batch)]
        flags += ["--gradient-accumulation-steps", str(setting.accumulation)]
    if setting.recomputes != own.recomputes:
        flags.append("--gradient-checkpointing" if setting.recomputes else "--no-gradient-checkpointing")
    if setting.stored not in (_store_of(config), "plain"):
        flags += ["--quantize", setting.stored]
    if setting.sharding != "none":
        flags += ["--sharding", setting.sharding]
    return flags


def size(count: float) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    return f"{count / GIB:,.1f} GiB" if count >= 0.95 * GIB else f"{count / 2**20:,.0f} MiB"


def _store_of(config: TrainConfig) -> Stored:
    """What the frozen weights are put into."""
    asked: Any = "fp8" if config.base_dtype == "fp8" else config.quantize
    return "plain" if asked in (None, "none") else asked


def _told(found: Estimate, rows: int, instead: Estimate | None, machine: Machine, models: Models) -> str:
    setting = found.setting
    where = "the GPU" if machine.device == "cuda" else "main memory"
    named = f"A batch of {setting.batch} × {setting.length:,} tokens takes about {size(found.taken)}"
    parts = f"weights {size(found.weights)}, activations {size(found.activations + found.passing)}"
    text = f"{named} ({parts}), and {where} has {size(machine.memory)}."
    if rows:
        text += f" {rows} {'row' if rows == 1 else 'rows'} at once would fit."
    if instead is None:
        return f"{text} Nothing that is known here makes it fit: expected a smaller model, shorter rows or more memory."
    own = TrainConfig(
        model="m",
        data="d",
        output="o",
        per_device_train_batch_size=setting.batch,
        gradient_accumulation_steps=setting.accumulation,
        gradient_checkpointing=setting.recomputes,
        quantize=None if setting.stored in ("plain", "fp8") else setting.stored,  # pyright: ignore[reportArgumentType]
        base_dtype="fp8" if setting.stored == "fp8" else "auto",
    )
    flags = shlex.join(changes(instead.setting, own, models(instead.setting.stored)))
    return f"{text} What fits: {flags} ({size(instead.taken)})."


def _clearly_fits(config: TrainConfig, model_config: PreTrainedConfig, setting: Setting, machine: Machine) -> bool:
    """Whether a look at file sizes and the configuration says so already, with twice the room to spare."""
    folder = expanded(config.model)
    text: Any = model_config.get_text_config()
    sizes: list[Any] = [getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")]
    hidden, layers, vocabulary = sizes
    if not all(isinstance(n, int) and n > 0 for n in sizes):
        return False
    if getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None):
        return False
    files = list(folder.glob("*.safetensors")) if Path(folder).is_dir() else []
    if files:
        weights = 2 * sum(file.stat().st_size for file in files)  # float32 of bfloat16 at most
    elif text is model_config:  # on the hub; attention no wider than thrice the hidden state, and an MLP of three
        weights = 4 * (2 * vocabulary * hidden + layers * (12 * hidden**2 + 3 * hidden * _width(text)))
    else:
        return False
    scores = layers * 64 * setting.batch * setting.length**2 * 4  # of eager attention
    numbers = setting.tokens * (_ROOMY * layers * hidden + 5 * vocabulary)
    return 2 * (weights * 2 + 4 * numbers + scores) + GIB < machine.memory


def _width(text: Any) -> int:
    """Of the MLP."""
    found = getattr(text, "intermediate_size", None)
    return found if isinstance(found, int) else 4 * int(text.hidden_size)


def _plain_dtype(config: TrainConfig, device: str, fp16: bool) -> torch.dtype:
    if config.trains_all or config.adapter.modules_to_save:
        return torch.float32
    if fp16:
        return torch.float16
    bf16 = config.bf16 if config.bf16 is not None else device == "cuda"
    return torch.bfloat16 if bf16 else torch.float32
