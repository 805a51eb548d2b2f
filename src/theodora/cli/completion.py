"""`theodora completion`: what a shell reads to complete commands, flags, their values and files by Tab.

example:
  theodora completion bash > ~/.local/share/bash-completion/completions/theodora
  theodora completion zsh > ~/.zfunc/_theodora        # with fpath+=~/.zfunc before compinit in ~/.zshrc
  theodora completion fish > ~/.config/fish/completions/theodora.fish

The script knows every flag, TRL's included, and asks nobody while you type. Write it anew after an update.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from theodora.errors import ConfigError
from theodora.extras import pip_line

SHELLS = ("bash", "zsh", "fish")
_FILES = ("FILE", "FOLDER", "MODEL", "PATH")
_NAMED = ("model", "data", "output", "eval_data", "replay", "general", "from_adapter", "reference")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `theodora completion`."""
    parser.add_argument("shell", choices=SHELLS, help="the shell that will read it")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    try:
        import shtab
    except ImportError as error:
        raise ConfigError(f"shtab is missing: {pip_line('completion')}") from error
    from theodora.cli.console import stdout

    stdout().print(shtab.complete(whole_parser(shtab), shell=args.shell), soft_wrap=True)
    return 0


def whole_parser(shtab: Any) -> argparse.ArgumentParser:
    """All commands in one parser; `theodora` itself builds that of one command alone, which is quicker."""
    from theodora.cli.main import COMMANDS, Parser

    root = Parser(prog="theodora")
    root.add_argument("-V", "--version", action="store_true", help="print the version")
    commands = root.add_subparsers(dest="command")
    for group in COMMANDS.values():
        for name, (module_name, summary) in group.items():
            module = import_module(module_name)
            parser = commands.add_parser(name, help=summary, description=summary)
            module.add_arguments(parser)
            if getattr(module, "PASSES_OPTIONS_ON", False):
                _add_passed(parser)
            for action in _actions(parser):
                _complete(action, shtab)
    return root


def _add_passed(parser: argparse.ArgumentParser) -> None:
    """The flags that go through to TRL, and its words for one of ours."""
    from theodora.cli.imports import imports

    with imports():
        from theodora.train.passed_on import passed_options, words_of

    for action in _actions(parser):
        if action.dest == "lr_scheduler_type":
            action.choices = words_of(action.dest)
    group = parser.add_argument_group("TRL's")
    taken = {flag for action in _actions(parser) for flag in action.option_strings}
    for option in passed_options():
        if not option.refused and "--" + option.name.replace("_", "-") not in taken:
            text = option.description.partition(". ")[0].replace("%", "%%")
            group.add_argument("--" + option.name.replace("_", "-"), choices=words_of(option.name) or None, help=text)


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    yield from parser._actions  # pyright: ignore[reportPrivateUsage]  (shtab reads the same)


def _complete(action: Any, shtab: Any) -> None:
    """Say what the value of a flag is completed with."""
    if action.metavar == "BOOL":
        action.choices = ["true", "false"]
    elif action.dest in _NAMED or str(action.metavar).partition(".")[0] in _FILES:
        action.complete = shtab.FILE
