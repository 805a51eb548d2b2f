"""`theodora train`: a YAML file and flags -> TrainConfig -> train.

example:
  theodora train --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --output runs/first
  theodora train --config recipe.yaml --learning-rate 2e-4
  theodora train --from-adapter runs/first --data pairs.jsonl --objective dpo --output runs/preferred

A flag goes before the file, and the file before the default. Any other field of TRL's SFTConfig works as well,
in the file and as a flag: --optim adafactor --neftune-noise-alpha 5, and of an objective's own: --beta 0.05.
What runs others' code or sends to other machines (--trust-remote-code, --report-to wandb) is said by a flag
alone: a file that asks for it is refused.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from theodora.cli.arguments import add_field, field_help, other_options
from theodora.cli.imports import imports
from theodora.cli.launcher import NAMES, add_launcher, check_launcher
from theodora.config import AdapterConfig, TrainConfig
from theodora.errors import ConfigError, shown
from theodora.parse import parse_yaml

PASSES_OPTIONS_ON = True

GROUPS: dict[str, tuple[type, tuple[str, ...]]] = {
    "What": (TrainConfig, ("model", "from_adapter", "data", "output", "objective", "reference")),
    "Rewards": (TrainConfig, ("reward", "reward_weights", "reward_timeout")),
    "Adapter": (
        AdapterConfig,
        (
            "method",
            "rank",
            "alpha",
            "rslora",
            "dropout",
            "targets",
            "experts",
            "exclude",
            "rank_pattern",
            "alpha_pattern",
            "modules_to_save",
            "trainable_token_indices",
            "init",
            "adapter_dtype",
        ),
    ),
    "Data": (
        TrainConfig,
        (
            "eval_data",
            "held_out",
            "replay",
            "replay_share",
            "general",
            "train_on",
            "use_chat_template",
            "resize_embeddings",
            "max_length",
            "packing",
        ),
    ),
    "Optimization": (
        TrainConfig,
        (
            "num_train_epochs",
            "max_steps",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "learning_rate",
            "lr_scheduler_type",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "bf16",
            "base_dtype",
            "quantize",
            "kernels",
            "gradient_checkpointing",
            "sharding",
            "cpu_offload",
            "on_nan",
            "max_loss",
            "seed",
        ),
    ),
    "Logging, evaluation, checkpoints": (
        TrainConfig,
        (
            "logging_steps",
            "eval_steps",
            "per_device_eval_batch_size",
            "early_stopping_patience",
            "save_steps",
            "save_total_limit",
            "report_to",
            "push_to_hub",
            "resume",
            "overwrite",
            "grace_period",
        ),
    ),
    "Model loading": (TrainConfig, ("trust_remote_code", "revision")),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every option of a run."""
    for heading, (config_class, names) in GROUPS.items():
        group = parser.add_argument_group(heading)
        if heading == "What":
            group.add_argument("--config", metavar="FILE", help="YAML file with any of these options, by name")
        for name in names:
            if name == "resume":
                _add_resume(group)
            else:
                add_field(group, config_class, name)
    add_launcher(parser, workers="how many processes. Default: one for each GPU of the cluster")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else, on stdout")


def _add_resume(group: Any) -> None:
    """`--resume` alone means the newest whole checkpoint, which has to be there."""
    help_text = field_help(TrainConfig, "resume")
    group.add_argument(
        "--resume", nargs="?", const=True, metavar="auto|FOLDER", default=argparse.SUPPRESS, help=help_text
    )


def run(args: argparse.Namespace) -> int:
    """Train."""
    config = read_config(args)
    from theodora.cli.console import print_json, stderr, stdout

    if check_launcher(args):
        from theodora.launch.ray_train import train_on_ray

        figures = train_on_ray(
            config, workers=args.num_workers, address=args.ray_address, console=stderr() if args.json else stdout()
        )
        if args.json:
            print_json(figures)
        return 0
    with imports(gpu=True):
        from theodora.train import train
        from theodora.train.processes import SaidByFirst

    try:
        result = train(config, console=stderr() if args.json else stdout())
    except SaidByFirst as error:
        return error.exit_code
    if args.json and os.environ.get("RANK", "0") == "0":  # one of several processes speaks for all
        print_json(result.to_dict())
    return 0


def read_config(args: argparse.Namespace) -> TrainConfig:
    """Merge flags over the file over the defaults.

    Raises:
        ConfigError: naming every option that makes no sense.
    """
    others = {"config", "json", "debug", "run", "other_options", *NAMES}
    given = {name: value for name, value in vars(args).items() if name not in others}
    try:
        given |= other_options(args.other_options)
    except ValueError as error:
        raise ConfigError(f"{error}. See theodora train --help.") from error
    from_file = read_yaml(args.config) if args.config else {}
    return TrainConfig.from_options(_merge(from_file, given), granted=given)


def _merge(file: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Flags take the place of what the file says, under `trainer` too."""
    trainer = file.get("trainer")
    if isinstance(trainer, dict):
        file = {**file, "trainer": {name: value for name, value in trainer.items() if name not in flags}}
    # Only one of the two says whether to go on or to start over, and a file may be the record of either.
    if flags.get("overwrite"):
        file = {**file, "resume": None}
    if flags.get("resume"):
        file = {**file, "overwrite": False}
    return {**file, **flags}


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file of options; hyphens in names count as underscores.

    Raises:
        ConfigError: the file is missing, no YAML, or no mapping.
    """
    try:
        options = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(options, dict):
        raise ConfigError(f"{path} holds {type(options).__name__}; expected lines of the form `name: value`.")
    odd = [name for name in options if not isinstance(name, str)]
    if odd:
        raise ConfigError(f"{path}: the name {shown(odd[0])} is no text; expected names of options.")
    named = {name.replace("-", "_"): value for name, value in options.items()}
    if len(named) < len(options):
        spelt = [name.replace("-", "_") for name in options]
        twice = sorted({name for name in spelt if spelt.count(name) > 1})
        raise ConfigError(f"{path} gives {', '.join(twice)} twice, once with - and once with _.")
    return named
