"""Running the product: operations × adapters × dtypes × libraries, each over layers of all kinds."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any, Literal

import torch

from theodora.conformance.cases import DTYPES, KINDS, VARIANTS
from theodora.conformance.operations import OPERATIONS, Operation
from theodora.conformance.quantised import installed
from theodora.conformance.trial import Check, NotOfferedError, OneKindError, Trial

LIBRARIES = ("theodora", "peft")
Status = Literal["held", "failed", "refused", "raised", "not offered"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One operation on one kind of layer, by one library."""

    library: str
    operation: str
    variant: str
    kind: str
    dtype: str
    status: Status
    """held: every check kept its bound. failed: one did not. refused: a ValueError, TypeError or the like instead of a
    result. raised: any other exception. not offered: the library has no such operation."""
    what: str = ""
    """The check nearest to its bound, or farthest beyond it."""
    error: float | None = None
    bound: float | None = None
    checks: int = 0
    message: str = ""
    """Of the exception."""


@dataclass(frozen=True)
class Job:
    """What one call runs: all kinds of layers."""

    library: str
    operation: str
    variant: str
    dtype: str
    kinds: tuple[str, ...]
    device: str


def plan(
    *,
    operations: Sequence[str] = (),
    variants: Sequence[str] = (),
    kinds: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    libraries: Sequence[str] = LIBRARIES,
    device: str = "cpu",
    every_variant: bool = False,
) -> list[Job]:
    """The jobs of a selection; an empty one selects everything. PEFT takes part where it is installed.

    Slow operations run on a few variants only (PEFT's on LoRA and DoRA), unless `every_variant`; see
    `Operation.sample`.
    """
    there = [library for library in libraries if library != "peft" or find_spec("peft") is not None]
    jobs = [
        Job(library, key, variant, dtype, tuple(kinds or KINDS), device)
        for key, operation in OPERATIONS.items()
        if not operations or key in operations
        for library in there
        for variant in VARIANTS
        if (not variants or variant in variants) and _applies(operation, library, variant, every_variant)
        for dtype in DTYPES
        if (not dtypes or dtype in dtypes) and installed(dtype) and dtype not in operation.not_on
    ]
    return sorted(jobs, key=lambda job: (-OPERATIONS[job.operation].cost, job.library))


def run(jobs: Sequence[Job], workers: int | None = None) -> Iterator[list[Row]]:
    """The rows of each job as it ends. One worker runs here; several are processes of their own."""
    count = min(workers or usable_cores(), len(jobs))
    if count <= 1:
        yield from map(run_job, jobs)
        return
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        futures = [pool.submit(run_job, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def run_job(job: Job) -> list[Row]:
    """The rows of one job, never an exception of a library's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _rows(job, tuple(kind for kind in job.kinds if kind not in OPERATIONS[job.operation].not_kinds))


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _rows(job: Job, kinds: tuple[str, ...]) -> list[Row]:
    if not kinds:
        return []
    try:
        trial = Trial(_library(job.library), VARIANTS[job.variant], job.dtype, kinds, job.device)
        checks = list(OPERATIONS[job.operation].run(trial))
    except NotOfferedError as error:
        return [_row(job, kind, "not offered", message=str(error)) for kind in kinds]
    except Exception as error:
        if len(kinds) > 1:  # one kind that cannot must not speak for the others
            return [row for kind in kinds for row in _rows(job, (kind,))]
        if isinstance(error, OneKindError):
            raise
        refused = isinstance(error, ValueError | TypeError | NotImplementedError)
        return [_row(job, kind, "refused" if refused else "raised", message=_said(error)) for kind in kinds]
    return [_judged(job, kind, own) for kind in kinds if (own := [check for check in checks if check.kind == kind])]


def _judged(job: Job, kind: str, checks: list[Check]) -> Row:
    worst = max(checks, key=lambda check: (check.share, check.bound))
    return _row(
        job,
        kind,
        "held" if worst.held else "failed",
        what=worst.what,
        error=worst.error,
        bound=worst.bound,
        checks=len(checks),
    )


def _row(job: Job, kind: str, status: Status, **fields: Any) -> Row:
    row = Row(
        library=job.library, operation=job.operation, variant=job.variant, kind=kind, dtype=job.dtype, status=status
    )
    return replace(row, **fields)


def _said(error: Exception) -> str:
    line = next((line for line in str(error).strip().splitlines() if line), "")
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {line[:160]} ({'/'.join(at.filename.split('/')[-2:])}:{at.lineno})"


def _applies(operation: Operation, library: str, variant: str, every_variant: bool) -> bool:
    if library != "theodora" and operation.ours_only:
        return False
    sample = operation.sample if library == "theodora" else operation.sample[:2]
    return every_variant or not sample or variant in sample


def _library(name: str) -> Any:
    if name == "theodora":
        from theodora.conformance.ours import Ours

        return Ours
    from theodora.conformance.peers import Peft

    return Peft


def _one_thread() -> None:
    torch.set_num_threads(1)
