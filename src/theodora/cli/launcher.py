"""The flags of commands that run on a Ray cluster as well: `--launcher ray`, `--num-workers`, `--ray-address`."""

from __future__ import annotations

import argparse

from theodora.cli.arguments import positive
from theodora.errors import ConfigError

NAMES = ("launcher", "num_workers", "ray_address")
"""Where the flags lie among the arguments."""


def add_launcher(parser: argparse.ArgumentParser, *, workers: str) -> None:
    """Add the flags.

    Args:
        parser: of the command.
        workers: the help of `--num-workers`.
    """
    group = parser.add_argument_group("Several processes and machines")
    group.add_argument(
        "--launcher",
        choices=["ray"],
        help="start the processes on a Ray cluster (pip install 'theodora[ray]'): this machine, or see --ray-address",
    )
    group.add_argument("--num-workers", type=positive, metavar="N", help=workers)
    group.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="the cluster's head, or auto for the cluster that runs on this machine. Default: $RAY_ADDRESS, else a "
        "cluster that this command starts and ends",
    )


def check_launcher(args: argparse.Namespace) -> bool:
    """Whether Ray is to be used.

    Raises:
        ConfigError: flags of Ray's are given without it.
    """
    if args.launcher is None:
        given = [f"--{name.replace('_', '-')}" for name in NAMES if getattr(args, name) is not None]
        if given:
            raise ConfigError(f"{' and '.join(given)} mean{'s' * (len(given) == 1)} nothing without --launcher ray")
    return args.launcher is not None
