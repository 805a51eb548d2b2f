"""`theodora conformance`: every operation on an adapter held against the float64 formula, for ours and for PEFT's.

example:
  theodora conformance
  theodora conformance --only merge unmerge dora bf16
  theodora conformance --json conformance.json --full

Adapters of every kind are put on layers of every kind in every dtype, everything is done to them that can be done to
an adapter, and what comes out is compared with the papers' formulas in float64. A row holds if its error keeps the
bound that rounding alone explains. Where peft is installed it does the same work beside ours. The exit code is 1 if a
row of ours does not hold. docs/conformance.md explains the bounds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from theodora.conformance.suite import Job, Row

_METHODS = ("lora", "dora")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a run."""
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="operations, adapters, layers, dtypes or libraries to run, such as: merge dora-pissa embedding bf16 "
        "theodora. Names of one sort widen the choice, sorts narrow each other. --list shows them",
    )
    parser.add_argument("--list", action="store_true", help="show the names that --only takes, and stop")
    parser.add_argument("--full", action="store_true", help="show every row")
    parser.add_argument("--json", metavar="FILE", help="write every row, and versions and machine, as JSON")
    parser.add_argument("--device", default="cpu", help="where to run. Default: cpu")
    parser.add_argument("--workers", type=int, metavar="N", help="processes. Default: one for each core; 1 on a GPU")
    parser.add_argument(
        "--every-variant",
        action="store_true",
        help="run compiled models on every adapter, too, instead of on those whose code differs: minutes longer",
    )


def run(args: argparse.Namespace) -> int:
    """Run the suite and print its tables."""
    from rich.text import Text

    from theodora.bench import describe_machine
    from theodora.cli.console import stderr, stdout
    from theodora.conformance import suite, table

    if args.list:
        for sort, names in _names().items():
            stdout().print(Text.assemble((sort, "bold"), f": {', '.join(names)}"), soft_wrap=True)
        return 0
    jobs = suite.plan(**_selection(args.only), device=args.device, every_variant=args.every_variant)
    began = time.perf_counter()
    rows = _run(jobs, 1 if args.device != "cpu" and args.workers is None else args.workers)
    seconds = time.perf_counter() - began
    versions = _versions()
    for part in table.report(rows, versions, args.full):
        stdout().print(part)
    ours = [row for row in rows if row.library == "theodora"]
    broken = [row for row in ours if row.status != "held"]
    stdout().print(_conclusion(len(ours), len(broken), seconds), style="red" if broken else "green")
    if args.json:
        content = {
            "machine": describe_machine() | versions,
            "seconds": round(seconds, 1),
            "rows": [_plain(row) for row in rows],
        }
        _write(Path(args.json), content)
        stderr().print(f"Every row is in {args.json}.", markup=False)
    return 1 if broken else 0


def _run(jobs: list[Job], workers: int | None) -> list[Row]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from theodora.cli.console import stderr
    from theodora.conformance import suite
    from theodora.conformance.operations import OPERATIONS

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rows: list[Row] = []
    with Progress(*columns, console=stderr(), transient=True) as progress:
        task = progress.add_task("starting", total=len(jobs))
        for done in suite.run(jobs, workers):
            rows += done
            title = OPERATIONS[done[0].operation].title if done else ""
            progress.update(task, advance=1, description=f"{title[:40]:40}")
    return rows


def _selection(words: list[str]) -> dict[str, list[str]]:
    """`--only`'s words as the arguments of `suite.plan`."""
    import difflib

    from theodora.errors import UsageError, bullet_list

    names = _names()
    chosen: dict[str, list[str]] = {}
    problems: list[str] = []
    for word in words:
        sorts = [sort for sort, known in names.items() if word in known]
        if not sorts and word in _METHODS:
            sorts = ["variants"]
        if not sorts:
            close = difflib.get_close_matches(word, [name for known in names.values() for name in known], n=3)
            problems.append(f"{word!r} is no name here" + (f"; near it: {', '.join(close)}" if close else ""))
        for sort in sorts:
            chosen.setdefault(sort, []).append(word)
    if problems:
        raise UsageError("--only:" + bullet_list(problems) + "\nSee theodora conformance --list.")
    return chosen


def _names() -> dict[str, list[str]]:
    from theodora.conformance import cases, operations, suite

    return {
        "operations": list(operations.OPERATIONS),
        "variants": list(cases.VARIANTS),
        "kinds": list(cases.KINDS),
        "dtypes": list(cases.DTYPES),
        "libraries": list(suite.LIBRARIES),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    from theodora import __version__

    versions = {"theodora": __version__}
    for package in ("peft", "transformers", "torch", "bitsandbytes", "hqq"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _conclusion(rows: int, broken: int, seconds: float) -> str:
    took = f"{int(seconds) // 60} min {int(seconds) % 60} s"
    if broken:
        return f"{broken} of {rows} rows of Theodora's do not hold ({took})."
    return f"All {rows} rows of Theodora's hold ({took})."


def _plain(row: Row) -> dict[str, Any]:
    """A row as JSON takes it: an error that is no number is a text."""
    return {key: str(value) if value == float("inf") else value for key, value in vars(row).items()}


def _write(path: Path, content: dict[str, Any]) -> None:
    from theodora.files.atomic import atomic_write
    from theodora.parse import to_json

    with atomic_write(path) as file:
        file.write_text(to_json(content, indent=1, readable=True) + "\n", encoding="utf-8", errors="backslashreplace")
