"""Measuring a training step of the frozen model, of PEFT's adapters and of ours: processes of their own take turns."""

from theodora.bench.machine import describe_machine, git_commit
from theodora.bench.runner import Progress, Runner
from theodora.bench.table import Row, differing_losses, make_rows, plain_rows, step_table, timings
from theodora.bench.variants import VARIANTS, Job, Variant, Workload

__all__ = [
    "VARIANTS",
    "Job",
    "Progress",
    "Row",
    "Runner",
    "Variant",
    "Workload",
    "describe_machine",
    "differing_losses",
    "git_commit",
    "make_rows",
    "plain_rows",
    "step_table",
    "timings",
]
