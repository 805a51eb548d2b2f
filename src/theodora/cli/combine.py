"""`theodora combine`: several adapters of one base -> one adapter.

example:
  theodora combine runs/maths runs/style --weights 0.7 0.3 --output runs/both
  theodora combine runs/maths runs/style --method ties --density 0.3 --rank 32 --output runs/both

`linear` is exact: W' = W + Σ wᵢ (W'ᵢ − W), for LoRA and DoRA, of any ranks and targets.
docs/adapters.md has the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from theodora.cli.imports import imports
from theodora.safe_text import quoted

METHODS = ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties")
"""`merging.combine.CombineMethod`, which torch comes with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a combination."""
    parser.add_argument(
        "adapters", metavar="ADAPTER", nargs="+", help="folders of adapters (PEFT's files), two or more"
    )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="folder to write the adapter to; not there yet"
    )
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one for each adapter, also below 0. Default: 1 for each"
    )
    parser.add_argument(
        "--method", default="linear", choices=METHODS, metavar="|".join(METHODS), help="Default: linear"
    )
    parser.add_argument(
        "--rank",
        type=int,
        metavar="R",
        help="of the result. svd: by default the largest; ties and dare: by default full",
    )
    parser.add_argument("--density", type=float, metavar="X", help="share of each change that ties and dare keep")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of dare's draws. Default: 0")
    parser.add_argument(
        "--base-model", metavar="MODEL", help="base model. Default: the one that the first adapter names"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def run(args: argparse.Namespace) -> int:
    """Combine, save, and say how exact it is."""
    from theodora.cli.console import stderr, stdout
    from theodora.errors import UsageError

    if len(args.adapters) < 2:
        raise UsageError("One adapter was named; expected two or more to combine.")
    if args.weights is not None and len(args.weights) != len(args.adapters):
        raise UsageError(f"{len(args.weights)} weights for {len(args.adapters)} adapters; expected one for each.")
    output = Path(args.output)
    if output.exists() or output.is_symlink():
        raise UsageError(f"{output} is there already; expected a name that is free.")
    with imports():
        from theodora.adapters import load_adapter, save_adapter
        from theodora.adapters.models import load_model
        from theodora.files.adapter import read_adapter
        from theodora.files.model_folder import has_tokenizer
        from theodora.files.peft_config import check_continues_text
        from theodora.files.read_back import save_tokenizer
        from theodora.files.tokenizer import load_tokenizer
        from theodora.merging.combine import combine_adapters

    for folder in args.adapters:
        check_continues_text(folder)
    first, trusted = args.adapters[0], args.trust_remote_code
    base = args.base_model or read_adapter(first).base_model
    if base is None:
        raise UsageError(f"{first} does not say which model it was trained from. Name it with --base-model.")
    with stderr().status("Loading the model ...") as status:
        model = load_model(base, dtype="fp32", trust_remote_code=trusted)
        tokenizer = load_tokenizer(first if has_tokenizer(first) else base, trust_remote_code=trusted)
        names = [f"adapter_{number}" for number in range(len(args.adapters))]
        for name, folder in zip(names, args.adapters, strict=True):
            status.update(f"Reading {folder} ...")
            load_adapter(model, folder, name)
        status.update("Combining ...")
        weights = args.weights or [1.0] * len(names)
        report = combine_adapters(
            model, names, weights, "combined", args.method, rank=args.rank, density=args.density, seed=args.seed
        )
        status.update("Saving ...")
        save_adapter(model, output, "combined")
        save_tokenizer(tokenizer, output)
    for told in (str(report), f"\n{output}", f"  theodora chat {quoted(str(output))}"):
        stdout().print(told, markup=False, soft_wrap=True)
    return 0
