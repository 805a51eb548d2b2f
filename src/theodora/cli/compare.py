"""`theodora compare`: which method is best on your data, asked with several seeds and answered in one page.

example:
  theodora compare recipes/study-small.yaml
  theodora compare study.yaml --output runs/study --report-only

The file names the base model, data sets, methods, ranks, learning rates, seeds and steps; docs/compare.md has every
option. Each method's learning rate is chosen on validation rows, then the seeds run and are scored on test rows. The
output folder holds report.html, results.parquet and a file for each run. Run the same command again after Ctrl-C, a
crash or a power cut, and it goes on.
"""

from __future__ import annotations

import argparse

from theodora.cli.launcher import add_launcher, check_launcher


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `theodora compare`."""
    parser.add_argument("file", help="YAML file with the comparison")
    parser.add_argument("--output", metavar="FOLDER", help="the folder for results, instead of the one in the file")
    parser.add_argument("--model", metavar="MODEL", help="the base model, instead of the one in the file")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument(
        "--allow-code",
        action="append",
        default=[],
        metavar="FILE.py",
        help="let this Python file run, which a `score` or `reward` in the comparison names; the comparison cannot "
        "allow it itself",
    )
    parser.add_argument(
        "--reward",
        nargs="+",
        metavar="REWARD",
        help="what grpo learns from, and all are measured by, instead of the file's; Python files that are named run",
    )
    parser.add_argument("--workers-per-gpu", type=int, metavar="N", help="processes on each GPU, instead of the file's")
    parser.add_argument("--seconds", type=float, metavar="N", help="begin no run after N seconds; run again to go on")
    parser.add_argument("--report-only", action="store_true", help="write the report from the runs there are, run none")
    add_launcher(
        parser,
        workers="how many workers share the cells. Default: --workers-per-gpu on each GPU of the cluster, or one on "
        "each machine where there is no GPU",
    )
    parser.add_argument("--dry-run", action="store_true", help="say how many runs there would be, and run none")


def run(args: argparse.Namespace) -> int:
    """Compare."""
    from theodora.cli.train import read_yaml
    from theodora.compare.config import CompareConfig

    on_ray = check_launcher(args)
    options = read_yaml(args.file)
    flags = {
        "output": args.output,
        "model": args.model,
        "workers_per_gpu": args.workers_per_gpu,
        "trust_remote_code": args.trust_remote_code or None,
        "reward": args.reward,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    config = CompareConfig.from_options({**options, **given}, granted=given, allow_code=args.allow_code)
    if args.dry_run:
        _say_how_much(config)
        return 0
    from theodora.cli.console import stdout
    from theodora.compare.run import compare, report_only

    if args.report_only:
        stdout().print(str(report_only(config)), markup=False, soft_wrap=True)
    elif on_ray:
        from theodora.launch.ray_cells import workers_on_ray

        with workers_on_ray(config, workers=args.num_workers, address=args.ray_address) as start:
            compare(config, console=stdout(), seconds=args.seconds, start=start)
    else:
        compare(config, console=stdout(), seconds=args.seconds)
    return 0


def _say_how_much(config: object) -> None:
    from theodora.cli.console import stdout
    from theodora.compare.cells import all_cells
    from theodora.compare.config import CompareConfig

    assert isinstance(config, CompareConfig)
    ready, later = all_cells(config, {})
    tuning = sum(cell.phase == "tune" for cell in ready)
    console = stdout()
    for variant in config.variants:
        console.print(f"{variant.title}: {len(variant.learning_rates)} learning rates")
    console.print(
        f"{len(config.data)} data sets: {tuning} runs choose learning rates, {len(ready) + len(later) - tuning - 1} "
        f"are scored, {config.steps} steps each"
    )
