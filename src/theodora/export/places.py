"""Where an export may stand, and what `--overwrite` may replace there: an earlier export, and nothing else.

Names of files do not tell one: a model that was downloaded, an adapter and a training run have the same. So a folder
that was exported lists its files in `theodora_export.json`, the last that is written, and is no export any more once
others lie beside them or one was written to.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from theodora.adapters.atomic import check_above
from theodora.errors import UsageError, shown

MARK = "theodora_export.json"
_GGUF = b"GGUF"
_SHOWN = 5


def is_one_file(form: str) -> bool:
    """Whether a form is one file, and not a folder."""
    return form.startswith("gguf")


def mark_export(folder: Path, form: str) -> None:
    """Write into a folder that was exported what it is and which files it consists of."""
    fields = {"form": form, "files": _files(folder)}
    (folder / MARK).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def check_output(output: Path, form: str, overwrite: bool, inputs: dict[str, Path]) -> None:
    """Check that an export may be written to `output`, before anything is loaded.

    Args:
        output: the folder or file.
        form: of the export.
        overwrite: whether it may replace an earlier export.
        inputs: what the export is made from, by what it is called; none of it may be, hold or lie around the output.

    Raises:
        UsageError: something else stands there, or nothing can.
    """
    real = output.resolve()
    for what, folder in inputs.items():
        if folder.resolve().is_relative_to(real):
            raise UsageError(f"The output {output} is, or contains, the {what} ({folder}). Choose another place.")
        if real.is_relative_to(folder.resolve()):
            raise UsageError(f"The output {output} lies within the {what} ({folder}). Choose another place.")
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
    if not overwrite:
        raise UsageError(f"{output} already exists. Choose another --output, or allow --overwrite.")
    if (other := _no_export(output)) is not None:
        raise UsageError(
            f"{output} is no earlier export ({other}), so --overwrite does not delete it. Choose another --output, or "
            "remove it yourself."
        )


def _no_export(output: Path) -> str | None:
    """Why something is no earlier export as it was written; None for one."""
    if output.is_file():
        with output.open("rb") as opened:
            return None if opened.read(len(_GGUF)) == _GGUF else "no GGUF file"
    try:
        written = json.loads((output / MARK).read_text(encoding="utf-8"))["files"]
        last = (output / MARK).stat().st_mtime_ns
        known = {MARK, *written}
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no {MARK} that lists its files"
    found = _files(output)
    if others := [name for name in found if name not in known]:
        more = ", …" if len(others) > _SHOWN else ""
        return f"no export wrote {', '.join(shown(name) for name in others[:_SHOWN])}{more}"
    changed = [name for name in found if (output / name).lstat().st_mtime_ns > last]
    return f"{shown(changed[0])} was written to since" if changed else None


def _files(folder: Path) -> list[str]:
    """What lies in a folder, however deep: files, and links to whatever."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths)
