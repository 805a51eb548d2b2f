"""Does a frozen base in float8 change how a DoRA adapter learns? Loss curves in bf16 and fp8, seed by seed.

    python benchmarks/fp8_curve.py --model path/to/SmolLM2-135M-Instruct --data findings.jsonl
    python benchmarks/fp8_curve.py --draw benchmarks/results/fp8_curve.json        # the picture again

The same run as `theodora train` makes, twice for each seed: the seed sets the adapter's start and the order of the
rows, so that two runs of a seed differ in the base's storage alone. `--data` is a JSONL file that `theodora train`
reads; the same rows of it are held out in all runs. Nothing is downloaded. (`theodora demo` leaves both behind: rows in
its output's `data/`, and the model's folder in its cache.) curves.py says what "within the seed-to-seed spread" is.

Without GPU instructions for float8 the same numbers come out, slower.
"""

from __future__ import annotations

import argparse
from typing import Any

import curves

NAMES = {"bf16": "bf16", "fp8": "fp8"}
COLOURS = {"fp8": "#1f7a5c"}
DTYPES: dict[str, Any] = {"bf16": "auto", "fp8": "fp8"}


def main() -> None:
    args = parse_args()
    report = curves.report_of(args, "bf16", ["fp8"], run)
    curves.print_table(report, "bf16", NAMES)
    print(f"\n{statement(report)}.")
    curves.draw(report, args.figure, "bf16", NAMES, COLOURS, statement(report), "DoRA")


def parse_args() -> argparse.Namespace:
    return curves.parsed(curves.parser_of(__doc__ or "", "fp8_curve", curves.RESULTS / "fp8_curve.png"))


def run(cell: curves.Cell) -> curves.Run:
    """One run, in a process of the pool."""
    from theodora import AdapterConfig, TrainConfig

    args, _, way, _ = cell
    adapter = AdapterConfig(method="dora", rank=args.rank)
    return curves.trained(TrainConfig(**curves.train_options(cell), adapter=adapter, base_dtype=DTYPES[way]))


def statement(report: dict[str, Any]) -> str:
    judged = report["judgement"]["fp8"].values()
    where = "stays within" if all(found["within_the_spread"] for found in judged) else "leaves"
    share = max(found["ratio"] for found in judged)
    return f"fp8 {where} the seed-to-seed spread of bf16: the same seed differs by {share:.2f} of what two seeds do"


if __name__ == "__main__":
    main()
