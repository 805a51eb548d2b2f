"""`theodora plan`: what a run will hold in memory, which settings fit, and the command to run. Nothing is loaded.

example:
  theodora plan --model meta-llama/Llama-3.1-8B --memory 24GB
  theodora plan --model path/to/model --data train.jsonl --rank 64 --max-length 4096
  theodora plan --config recipe.yaml --gpus 8 --memory 80GB --json

Takes every option of `theodora train`; what is not given is planned: how the frozen weights are stored, whether
activations are recomputed, rows in a pass, sharding. Of the model only its config.json is read. Sizes are powers of
1024: the 24 GB of a GPU are 24 GiB.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from theodora.cli.train import add_arguments as add_train_arguments
from theodora.cli.train import read_config, read_yaml
from theodora.errors import ConfigError

if TYPE_CHECKING:
    from theodora.config import TrainConfig

PASSES_OPTIONS_ON = True

_OWN = ("gpus", "memory", "device", "measured")
_NOT_OF_TRAIN = {*_OWN, "json", "debug", "run", "other_options", "config"}
_PLACEHOLDERS = {"data": "train.jsonl", "output": "runs/first"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `theodora train`, and those that say on what machine."""
    group = parser.add_argument_group("Machine")
    group.add_argument(
        "--gpus", type=int, metavar="N", help="processes, each with a GPU. Default: this machine's GPUs."
    )
    group.add_argument("--memory", metavar="SIZE", help="of each GPU: 24GB, 80GiB. Default: what this machine's have.")
    group.add_argument(
        "--device", choices=["cuda", "cpu"], help="default: cuda, where there are GPUs, or --gpus or --memory is given"
    )
    group.add_argument(
        "--measured",
        nargs="+",
        default=[],
        metavar="FILE",
        help="what `theodora bench MODEL --output FILE` has measured on that machine, for the tokens/s to expect",
    )
    add_train_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Plan, and print the panel."""
    config = _config(args)
    from theodora.cli.console import print_json, stderr, stdout
    from theodora.cli.imports import imports

    with imports():
        from theodora.cli.plan_view import print_plan
        from theodora.plan.survey import survey
        from theodora.train.arguments import sft_arguments

    sft_arguments(config, Path(config.output) / "checkpoints")  # refuses what `train` would

    with stderr().status("counting") as status:
        found = survey(
            config,
            gpus=args.gpus,
            memory=args.memory,
            device=args.device,
            measured=args.measured,
            say=status.update if stderr().is_terminal else lambda _: None,
        )
    command = None if found.recommended is None else _command(args, config, found)
    if args.json:
        print_json(found.to_dict() | {"command": command})
    else:
        print_plan(stdout(), found, command)
    return 0 if found.recommended is not None else 1


def _config(args: argparse.Namespace) -> TrainConfig:
    """The run as far as it is known; data and output have names that the command shows."""
    named = {name: value for name, value in vars(args).items() if name not in _OWN}
    filed = read_yaml(args.config) if args.config else {}
    for name, placeholder in _PLACEHOLDERS.items():
        if name not in named and name not in filed:
            named[name] = placeholder
    config = read_config(argparse.Namespace(**named))
    if not config.model and config.from_adapter is not None:
        from dataclasses import replace

        from theodora.files.model_folder import base_model_of

        config = replace(config, model=base_model_of(config.from_adapter))
    if not config.model:
        raise ConfigError("model is missing; expected --model, a folder or hub name")
    return config


def _command(args: argparse.Namespace, config: TrainConfig, found: Any) -> str:
    """What to type for the recommended setting: the options that were given, and what the plan adds."""
    from theodora.plan.fits import changes

    setting = found.recommended.setting
    changed = changes(setting, config, found.model_of(setting))
    replaced = {word.removeprefix("--").removeprefix("no-").replace("-", "_") for word in changed if word[:2] == "--"}
    words: list[str] = ["--config", args.config] if args.config else []
    given = {name: value for name, value in vars(args).items() if name not in _NOT_OF_TRAIN and value is not None}
    in_file = set(read_yaml(args.config)) if args.config else set[str]()
    missing = {name: value for name, value in _PLACEHOLDERS.items() if name not in {*given, *in_file}}
    for name, value in (given | missing).items():
        if name not in replaced:
            words += flag_words(name, value)
    words += [*args.other_options, *changed]
    start = "theodora train"
    if found.machine.gpus > 1 and args.launcher is None:
        start = f"torchrun --nproc-per-node {found.machine.gpus} -m theodora train"
    return f"{start} {shlex.join(words)}"


def flag_words(name: str, value: Any) -> list[str]:
    """The words of a command line that give an option its value."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag] if value else ["--no-" + name.replace("_", "-")]
    if isinstance(value, dict):
        return [flag, *(f"{key}={inner}" for key, inner in value.items())]
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)]
    return [flag, str(value)]
