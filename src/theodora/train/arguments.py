"""`TrainConfig` -> `trl.SFTConfig`, in two steps; nothing else in Theodora sets one of its fields.

`sft_arguments` checks all that can be checked before anything is loaded, so that a mistake costs a second.
`finish_arguments` adds what only the loaded model, its tokenizer and its rows tell, and the trainer gets that.
"""

from __future__ import annotations

import difflib
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.optimization import get_scheduler
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import IntervalStrategy
from trl.trainer.sft_config import SFTConfig

from theodora.autocast import computes_in_bf16
from theodora.coerce import coerce
from theodora.config import OPTION_NAMES, TrainConfig
from theodora.data.vocabulary import safe_padding
from theodora.errors import ConfigError, bullet_list, shown
from theodora.files.classes import fetched_kernels
from theodora.other_words import advice
from theodora.train.graphed import draws_at_random
from theodora.train.launched import device_chosen
from theodora.train.objectives import kept_plain, own_names, settings_of, whose
from theodora.train.processes import Processes, links_unasked

# Fields of SFTConfig that cannot do here what their name says, and what does it instead.
ELSEWHERE = {
    "dataset_text_field": "call the column `text`",
    "dataset_kwargs": "rows are tokenised before TRL sees them",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint by itself",
    "auto_find_batch_size": "a batch that does not fit into memory is halved by itself, with twice the accumulation",
    "save_on_each_node": "one process writes, into an output folder that all machines see",
    "ddp_bucket_cap_mb": "gradients are added up once a step, flattened, rather than in buckets",
    "hub_model_id": "--push-to-hub NAME names the repository",
    "hub_private_repo": "push_to_hub makes private ones; theodora push FOLDER NAME --public makes others",
    "hub_token": "set HF_TOKEN in the environment; a recipe is no place for it",
}

# Switches of SFTConfig that are always on here, and why.
ALWAYS = {
    "average_tokens_across_devices": "a step's loss is the mean over the learned tokens of all processes",
}

# Options of SFTConfig that a CPU cannot serve, and why.
_NO_CPU = {
    "use_liger_kernel": "Liger's kernels run on GPUs alone",
    "activation_offloading": "there is no accelerator's memory to spare by moving activations to the host",
}

# The least that makes sense of options that SFTConfig takes as they are, and torch refuses in the middle of a run.
_LEAST = {"dataloader_num_workers": 0, "neftune_noise_alpha": 0, "eval_accumulation_steps": 1}

# Whom a run logs to → the modules of which one does it. transformers misses them only once the model is loaded.
_REPORTERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}

_EVAL_ROWS, _EVAL_PROMPTS = 8, 128
"""Rows in a pass of an evaluation, at least, unless told otherwise."""

# Arguments of from_pretrained that have to be said elsewhere, or not at all.
_NOT_OF_LOADING = {
    "trust_remote_code": "it is an option of its own, which only the flag --trust-remote-code grants",
    "use_safetensors": "weights are read from safetensors alone; the other format is a pickle, which can hold code",
    "weights_only": "weights are read from safetensors alone; the other format is a pickle, which can hold code",
    "state_dict": "weights are read from the model's folder",
    "adapter_kwargs": "from_adapter: FOLDER goes on from an adapter",
    "config": "the model is configured by the folder that --model names, which was checked",
    "subfolder": "the model is the folder that --model names, which was checked; name the inner folder there",
    "gguf_file": "weights are read from safetensors; write a folder of a GGUF file first",
    "revision": "it is an option of its own",
    "token": "set HF_TOKEN in the environment",
    "use_auth_token": "set HF_TOKEN in the environment",
    "proxies": "set HTTPS_PROXY in the environment",
}
# Those that let it fetch code and run it.
_CODE_OF_LOADING = ("use_kernels", "kernel_config", "allow_all_kernels", "code_revision", "auto_map")


def sft_arguments(config: TrainConfig, checkpoints: Path) -> SFTConfig:
    """TRL's configuration of this run as far as the options alone tell it.

    Args:
        config: the run.
        checkpoints: the folder for the trainer's checkpoints.

    Raises:
        ConfigError: naming every field that TRL does not have, or refuses.
    """
    settings_of(config)  # which tells what makes no sense for the objective
    own = own_names(config.objective)
    other, processes = _checked({k: v for k, v in config.trainer.items() if k not in own}), Processes.here()
    other.pop("ddp_backend", None)  # the processes are joined already
    _check_reporters(config)
    eval_rows = _EVAL_ROWS if config.objective != "grpo" else _EVAL_PROMPTS
    evaluates = config.eval_data is not None or config.held_out != 0
    stops_early = config.early_stopping_patience is not None
    prepares = config.packing or other.get("shuffle_dataset") or other.get("eval_packing")
    values: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "run_name": Path(config.output).name,
        "num_train_epochs": config.num_train_epochs,
        "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": config.per_device_eval_batch_size or eval_rows,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "bf16": False,
        "seed": config.seed,
        # Rows are cut already, and TRL refuses a limit that it would not enforce.
        "max_length": None if other.get("padding_free") and not config.packing else config.max_length,
        "packing": config.packing,
        # Tokenised rows need nothing more of TRL's preparation, unless they are packed or shuffled.
        "dataset_kwargs": None if prepares else {"skip_prepare_dataset": True},
        "logging_steps": config.logging_steps,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": config.eval_steps,
        "eval_on_start": evaluates,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": config.save_total_limit,
        "load_best_model_at_end": stops_early,
        "metric_for_best_model": "loss" if stops_early else None,
        "restore_callback_states_from_checkpoint": stops_early,
        "report_to": list(config.report_to) or "none",
        # A loss of NaN ends the run; the filter would hide it.
        "logging_nan_inf_filter": False,
        "log_level": "error",
        "disable_tqdm": True,
    }
    # transformers 5.20 renamed the field and warns about the old name.
    names = {f.name for f in fields(SFTConfig)}
    values["activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"] = bool(
        config.gradient_checkpointing
    )
    try:
        with links_unasked(), nullcontext() if processes.alone else device_chosen(processes.on_machine):
            arguments = SFTConfig(**values | other)
            if not processes.alone and arguments.device.type == "cuda":
                arguments.__dict__["_setup_devices"] = torch.device("cuda", processes.on_machine)
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ConfigError(f"TRL refuses the training configuration: {error}") from error
    if config.per_device_eval_batch_size is None and arguments.device.type != "cpu":
        arguments.per_device_eval_batch_size = max(eval_rows, 2 * config.per_device_train_batch_size)
    _check_model_options(arguments.model_init_kwargs, config.trust_remote_code)
    _check_values(arguments)
    _check_optimizer(arguments)
    _check_machine(arguments)
    return arguments


def _check_model_options(options: Any, trust_remote_code: bool) -> None:
    """Raise a ConfigError for options of the model's loading that run code, or open what is not to be opened."""
    given: dict[str, Any] = options if isinstance(options, dict) else {}
    problems = [f"{name}: {why}" for name, why in _NOT_OF_LOADING.items() if name in given]
    if not trust_remote_code:
        asked = [f"{name} {shown(given[name])}" for name in _CODE_OF_LOADING if given.get(name)]
        problems += [
            f"{what} runs code that is fetched from the hub; pass --trust-remote-code if you trust it"
            for what in (*asked, *fetched_kernels(given))
        ]
    if problems:
        raise ConfigError("model_init_kwargs makes no sense:" + bullet_list(problems))


def _check_values(arguments: SFTConfig) -> None:
    """Raise a ConfigError for what optimizer, schedule and loaders of torch would refuse once the model is loaded."""
    given = {name: getattr(arguments, name) for name in _LEAST}
    problems = [
        f"{name} is {value}; expected at least {_LEAST[name]}"
        for name, value in given.items()
        if value is not None and not value >= _LEAST[name]
    ]
    pairs = (arguments.optim_args or "").split(",")
    if arguments.optim_args and any(pair.count("=") != 1 for pair in pairs):
        problems.append(f"optim_args is {shown(arguments.optim_args)}; expected name=value, name=value")
    if problems:
        raise ConfigError("The options make no sense:" + bullet_list(problems))


def _check_optimizer(arguments: SFTConfig) -> None:
    """Raise a ConfigError for an optimizer that is not installed, or that or whose schedule refuses its options."""
    optim, schedule = (getattr(kind, "value", kind) for kind in (arguments.optim, arguments.lr_scheduler_type))
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError as error:
        raise ConfigError(
            f"optim is {optim}, and what it needs is not installed: {error}. Or leave optim out: an adapter is small, "
            "and so are AdamW's two copies of it."
        ) from error
    except Exception:  # the others speak of the model, which it is given later
        return
    if not kind.__module__.startswith("torch.optim"):
        return
    try:
        optimizer = kind([nn.Parameter(torch.zeros(1, 1))], **options)
    except Exception as error:  # a parameter of its own cannot be at fault
        raise ConfigError(f"The optimizer ({optim}) refuses its options: {error}") from error
    # What a schedule needs beside its name; its numbers of steps are not known yet.
    own = dict(arguments.lr_scheduler_kwargs) if isinstance(arguments.lr_scheduler_kwargs, dict) else None
    try:
        get_scheduler(schedule, optimizer, num_warmup_steps=1, num_training_steps=10**9, scheduler_specific_kwargs=own)
    except Exception as error:
        raise ConfigError(
            f"lr_scheduler_type is {schedule}, with lr_scheduler_kwargs {own or 'not given'}, which it refuses: {error}"
        ) from error


def _check_machine(arguments: SFTConfig) -> None:
    """Raise a ConfigError for options that need an accelerator that is not there."""
    if arguments.device.type == "cpu":
        for name, why in _NO_CPU.items():
            if getattr(arguments, name, False):
                raise ConfigError(f"{name} is on, and this run is on a CPU: {why}. Leave it out.")


def _checked(trainer: Any) -> dict[str, Any]:
    """The values for SFTConfig's own fields, in their types."""
    hints = get_type_hints(SFTConfig)
    known = [f.name for f in fields(SFTConfig) if f.init]
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in trainer.items():
        if name not in known:
            problems.append(f"there is no option {name}{_nearest(name, value, sorted({*known, *OPTION_NAMES}))}")
        elif name in ELSEWHERE and value:
            problems.append(f"{name} has no effect here: {ELSEWHERE[name]}")
        else:
            try:
                values[name] = coerce(value, hints[name])
            except ValueError as error:
                problems.append(f"{name} is {value!r}; expected {error}")
            if name in ALWAYS and values.get(name) is False:
                problems.append(f"{name} cannot be switched off: {ALWAYS[name]}")
    if problems:
        raise ConfigError("The options make no sense:" + bullet_list(problems))
    return values


def _nearest(name: str, value: Any, names: list[str]) -> str:
    told = advice(name, value) or whose(name)
    if told is not None:
        return f"; {told}"
    close = difflib.get_close_matches(name, names, n=2)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _check_reporters(config: TrainConfig) -> None:
    unknown = [name for name in config.report_to if name not in (*INTEGRATION_TO_CALLBACK, "all")]
    if unknown:
        raise ConfigError(
            f"report_to is {', '.join(map(shown, unknown))}; expected some of {', '.join(INTEGRATION_TO_CALLBACK)}"
        )
    asked = [name for name in config.report_to if name in _REPORTERS]
    missing = [name for name in asked if not any(find_spec(module) for module in _REPORTERS[name])]
    if missing:
        raise ConfigError(f"report_to is {', '.join(missing)}, which is not installed: pip install {' '.join(missing)}")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """In which precision a run computes."""

    dtype: str
    """Of the base model's weights."""
    bf16: bool
    """Whether products are in bfloat16."""
    autocast: bool
    """Whether the trainer casts to bfloat16 for that, because the weights are wider."""


def choose_precision(config: TrainConfig, arguments: SFTConfig) -> Precision:
    """What the options ask for, or what the device is good at.

    Adapters are float32 beside a base model of any dtype and do the casts themselves, so no autocast is needed. Modules
    that are trained in full, or all of them, are weights of the base model: bfloat16 would swallow their small updates,
    so there the model is float32, under autocast.
    """
    # (A reward model's head is float32 by itself.)
    trains_base_weights = config.trains_all or bool(kept_plain(config))
    if arguments.fp16:
        return Precision(dtype="float32" if trains_base_weights else "float16", bf16=False, autocast=False)
    bf16 = computes_in_bf16(arguments.device) if config.bf16 is None else config.bf16
    dtype = "bfloat16" if bf16 and not trains_base_weights else "float32"
    return Precision(dtype=dtype, bf16=bf16, autocast=bf16 and trains_base_weights)


def finish_arguments(
    arguments: SFTConfig,
    config: TrainConfig,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    precision: Precision,
    balances_experts: bool,
    evaluates: bool,
    evaluates_first: bool,
    writes: bool = True,
) -> SFTConfig:
    """What the trainer is given: the arguments with what is known once all is loaded. `arguments` stay as they are.

    Args:
        arguments: of `sft_arguments`.
        config: the run, with every choice made.
        model: with its adapter.
        tokenizer: pads the rows.
        precision: `choose_precision` of the same run.
        balances_experts: whether the model returns what the loss that keeps experts balanced is computed from.
        evaluates: whether there are held-out rows.
        evaluates_first: whether these are looked at before the first step.
        writes: whether this process reports, and deletes old checkpoints.
    """
    finished = copy(arguments)
    if not writes:
        finished.report_to, finished.save_total_limit = [], None
    # What of them concerned the loading is done, and TRL refuses it for a model that is loaded already.
    finished.model_init_kwargs = finished.chat_template_path = None
    if not finished.fp16:
        finished.bf16 = precision.autocast
        finished.mixed_precision = "bf16" if precision.autocast else "no"
    if not balances_experts:
        finished.router_aux_loss_coef = 0.0
    finished.eval_on_start = evaluates and evaluates_first
    if not evaluates:
        finished.eval_strategy = IntervalStrategy.NO
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if hasattr(finished, name):
            setattr(finished, name, bool(config.gradient_checkpointing))
            if not getattr(finished, f"{name}_kwargs") and not draws_at_random(model):
                # Nor is a random state kept then, which the host would have to read, and cannot in a CUDA graph.
                setattr(finished, f"{name}_kwargs", {"use_reentrant": False, "preserve_rng_state": False})
    # Without an accelerator torch warns at every data loader.
    finished.dataloader_pin_memory = finished.dataloader_pin_memory and finished.device.type != "cpu"
    if finished.dataloader_pin_memory and isinstance(finished.accelerator_config, AcceleratorConfig):
        finished.accelerator_config = replace(finished.accelerator_config, non_blocking=True)
    # Several GPUs in one process would mean nn.DataParallel, which TRL refuses.
    finished._n_gpu = min(finished.n_gpu, 1)  # pyright: ignore[reportPrivateUsage]
    # TRL pads with the tokenizer's token, whether the model has a row for it or not.
    safe = safe_padding(model, tokenizer)
    if tokenizer.pad_token_id != safe:
        finished.pad_token = str(tokenizer.convert_ids_to_tokens(safe))
    return finished
