"""`export_adapter`: an adapter in the form that another program reads, compared with the original before it is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from theodora.adapters.atomic import atomic_directory
from theodora.adapters.checkpoint import CONFIG_NAME, WEIGHTS_NAME, AdapterFile, read_adapter
from theodora.adapters.merge_checkpoint import merge_checkpoint
from theodora.errors import CheckpointError, ConfigError, UsageError
from theodora.export.comparison import Verification, verify

# Files that `--overwrite` may replace: what stands at the output must be an earlier export.
_MARKS = ("config.json", CONFIG_NAME)


@dataclass(frozen=True)
class ExportReport:
    """What `export_adapter` wrote."""

    form: str
    output: Path
    adapter: Path
    bytes: int
    verification: Verification | None
    """How far the export is from the adapter on its base; None where it was not asked for."""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return {
            "form": self.form,
            "output": str(self.output),
            "adapter": str(self.adapter),
            "bytes": self.bytes,
            "verification": None if self.verification is None else self.verification.to_dict(),
            "notes": list(self.notes),
        }


class VerificationFailed(CheckpointError):
    """An export differs from its adapter by more than the bounds; it was not kept."""

    def __init__(self, message: str, verification: Verification) -> None:
        super().__init__(message)
        self.verification = verification


@dataclass(frozen=True)
class Job:
    """What the writers of the forms get."""

    file: AdapterFile
    output: Path
    """Where the export will stand; only its name may be used."""
    base_model: str | None
    dtype: str | None
    trust_remote_code: bool


def _write_hf(job: Job, place: Path) -> list[str]:
    # In a folder of the final name, which the model card takes as its heading; then one step up.
    inner = place / job.output.name
    report = merge_checkpoint(
        job.file.path,
        inner,
        base_model=job.base_model,
        dtype=job.dtype,
        trust_remote_code=job.trust_remote_code,
    )
    for file in inner.iterdir():
        file.rename(place / file.name)
    inner.rmdir()
    return list(report.notes)


def _write_peft(job: Job, place: Path) -> list[str]:
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        shutil.copyfile(job.file.path / name, place / name)
    return []


WRITERS: dict[str, Callable[[Job, Path], list[str]]] = {"hf": _write_hf, "peft": _write_peft}
"""Form -> what writes it into a folder, and gives notes."""


def export_adapter(
    adapter: str | Path,
    output: str | Path,
    form: str = "hf",
    *,
    base_model: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    check: bool = True,
    text: str | None = None,
    tokens: int | None = None,
    bound: float | None = None,
    kl_bound: float | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Write an adapter in another form; it gets its name only when `verify` finds that it says the same.

    Example:
        `export_adapter("runs/first", "merged", "hf", dtype="bf16").verification.difference.kl_mean`

    Args:
        adapter: the adapter's folder (PEFT's files).
        output: the folder or file to write; it appears whole or not at all.
        form: one of `WRITERS`.
        base_model: folder or hub name of the base. Default: the one that the adapter names.
        dtype: of the exported weights: fp32, bf16 or fp16. Default: as in the base.
        overwrite: replace an earlier export at `output`.
        check: whether to end with `verify`.
        text, tokens, bound, kl_bound: see `verify`.
        trust_remote_code: run Python code that comes with the model.
        progress: called with a line before each long step.

    Raises:
        UsageError: the output is taken, or holds the adapter; an unknown form or dtype.
        CheckpointError: adapter and base do not fit, or a file is damaged. Nothing is written.
        VerificationFailed: what was written differs by more than the bounds, and was removed.
    """
    say = progress or (lambda _line: None)
    if form not in WRITERS:
        raise ConfigError(f"form is {form!r}; expected one of {', '.join(WRITERS)}")
    output = Path(output).expanduser().absolute()
    file = read_adapter(adapter)
    _check_output(output, overwrite, file.path)
    job = Job(file, output, base_model, dtype, trust_remote_code)
    with atomic_directory(output, overwrite=overwrite) as place:
        say(f"writing {output}")
        notes = WRITERS[form](job, place)
        found = None
        if check:
            found = verify(
                str(file.path),
                str(place),
                base_model=base_model,
                text=text,
                tokens=tokens,
                bound=bound,
                kl_bound=kl_bound,
                trust_remote_code=trust_remote_code,
                progress=lambda line: say(line.replace(str(place), str(output))),
            )
            found = replace(found, a=str(adapter), b=str(output))
            if not found.passed:
                raise VerificationFailed(
                    f"The export differs from {adapter} by more than the bounds, and was not kept. If the difference "
                    "is wanted, allow it with --bound and --kl-bound.",
                    found,
                )
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    return ExportReport(form, output, file.path, size, found, tuple(notes))


def _check_output(output: Path, overwrite: bool, adapter: Path) -> None:
    if adapter.resolve().is_relative_to(output.resolve()):
        raise UsageError(f"The output {output} is, or contains, the adapter ({adapter}). Choose another place.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise UsageError(f"{output} already exists. Choose another --output, or allow --overwrite.")
    if output.is_dir() and not any((output / mark).is_file() for mark in _MARKS):
        raise UsageError(f"{output} is no earlier export, so --overwrite does not delete it.")
