"""Where an export may stand, and what `--overwrite` may replace there: an earlier export, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from theodora.errors import UsageError
from theodora.files.atomic import check_above
from theodora.files.ours import check_outside, check_replaceable, why_not_ours

_GGUF = b"GGUF"


def is_one_file(form: str) -> bool:
    """Whether a form is one file, and not a folder."""
    return form.startswith("gguf")


def check_output(output: Path, form: str, overwrite: bool, inputs: dict[str, Path]) -> None:
    """Check that an export may be written to `output`, before anything is loaded.

    Args:
        output: the folder or file.
        form: of the export.
        overwrite: whether it may replace an earlier export.
        inputs: what the export is made from, by what it is called; none of it may be the output, or lie in it.

    Raises:
        UsageError: something else stands there, or nothing can.
    """
    check_outside(output, inputs)
    check_above(output)
    if output.is_symlink() and not output.exists():
        raise UsageError(
            f"{output} is a link to {os.readlink(output)}, where there is nothing. Remove the link, or choose another "
            "place."
        )
    if not output.exists():
        return
    if output.is_dir() and is_one_file(form):
        raise UsageError(f"{output} is a folder, and the form {form} is one file: name it, as in {output / 'm.gguf'}.")
    if output.is_dir() and not any(output.iterdir()):
        return
    if not output.is_dir() and not is_one_file(form):
        raise UsageError(f"{output} is a file, and the form {form} is a folder. Choose another --output.")
    check_replaceable(output, overwrite, "export", _no_export(output))


def _no_export(output: Path) -> str | None:
    """Why something is no earlier export as it was written; None for one."""
    if output.is_file():
        with output.open("rb") as opened:
            return None if opened.read(len(_GGUF)) == _GGUF else "no GGUF file"
    return why_not_ours(output)
