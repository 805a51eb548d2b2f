"""GGUF files in few bits, by llama.cpp's own quantiser: its program, or the library that llama-cpp-python brings.

What a kind of quantisation makes of which tensor (Q4_K_M: some in six bits, rows that are no multiple of 256 in another
kind) is llama.cpp's to decide, so nothing of it is written here a second time. What comes out is read back.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from theodora.errors import CheckpointError, ConfigError, UsageError
from theodora.export.gguf_files import FILE_TYPES, file_type, open_reader
from theodora.export.gguf_written import check_finite

VARIABLE = "LLAMA_CPP"
"""The environment's variable that names a folder of llama.cpp."""
_PROGRAM, _LIBRARY = "llama-quantize", "llama_cpp"
_WITHIN = ("", "bin", "build/bin", "build/bin/Release")

Quantise = Callable[[Path, Path, str], None]
"""Source, target, kind."""


def check_kind(kind: str) -> str:
    """`q4_k_m` for `Q4_K_M`.

    Raises:
        ConfigError: none of `FILE_TYPES`.
    """
    if kind.lower() not in FILE_TYPES:
        raise ConfigError(f"quantize is {kind!r}; expected one of {', '.join(FILE_TYPES)}")
    return kind.lower()


def find_quantiser(llama_cpp: Path | None = None) -> Quantise:
    """What quantises here: `llama-quantize` in a folder, in that of the variable LLAMA_CPP, or on the PATH; else
    llama-cpp-python's library.

    Args:
        llama_cpp: a checkout, a build or an installation of llama.cpp, which has to have it then.

    Raises:
        UsageError: there is none, with the ways to get one.
    """
    named = os.environ.get(VARIABLE)
    folder = llama_cpp or (Path(named).expanduser() if named else None)
    if folder is not None:
        program = next((found for part in _WITHIN if (found := shutil.which(_PROGRAM, path=str(folder / part)))), None)
        if program is None:
            raise UsageError(
                f"{folder} holds no {_PROGRAM}. Build it there: cmake -B build && cmake --build build "
                f"--target {_PROGRAM}"
            )
    else:
        program = shutil.which(_PROGRAM)
    if program is not None:
        return lambda source, target, kind: _by_program(program, source, target, kind)
    if importlib.util.find_spec(_LIBRARY) is not None:
        return _by_library
    raise UsageError(
        f"Quantising to few bits is llama.cpp's own work, and it is not here: there is no {_PROGRAM} on the PATH. "
        "Install llama.cpp (brew install llama.cpp, apt install llama.cpp, or a release of its page), name its folder "
        f"with --llama-cpp or {VARIABLE}, or pip install llama-cpp-python. (q8_0 is written without it.)"
    )


def quantise(run: Quantise, source: Path, target: Path, kind: str) -> str:
    """Quantise a GGUF file, and look at what came out.

    Args:
        run: of `find_quantiser`.
        source: the file, in float32, float16 or bfloat16.
        target: the file to write.
        kind: one of `FILE_TYPES`.

    Returns:
        what the tensors are stored as, in words: kinds can give way to others.

    Raises:
        CheckpointError: the quantiser failed; or what it wrote lacks tensors, is of another kind, or is not finite.
    """
    run(source, target, kind)
    if not target.is_file():
        raise CheckpointError(f"llama.cpp's quantiser has written no {target}")
    before, after = open_reader(source), open_reader(target)
    shapes = ({tensor.name: tuple(tensor.shape) for tensor in reader.tensors} for reader in (before, after))
    expected, found = shapes
    if expected != found:
        odd = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        raise CheckpointError(f"{target} lacks tensors that were to be quantised, or has others: {', '.join(odd[:12])}")
    said = file_type(after)
    if said != kind:
        raise CheckpointError(f"{target} says that it is {said}, and was to be {kind}")
    check_finite(target)
    counts = Counter(tensor.tensor_type.name for tensor in after.tensors if len(tensor.shape) > 1)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _by_program(program: str, source: Path, target: Path, kind: str) -> None:
    done = subprocess.run([program, str(source), str(target), kind.upper()], capture_output=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode("utf-8", "replace")[-2000:]
        raise CheckpointError(f"llama.cpp's quantiser ({program}) failed:\n{said}")


def _by_library(source: Path, target: Path, kind: str) -> None:
    """By `llama_model_quantize`, as the program does."""
    library: Any = importlib.import_module(_LIBRARY)
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[kind]
    if library.llama_model_quantize(os.fsencode(source), os.fsencode(target), parameters) != 0:
        raise CheckpointError("llama.cpp's quantiser (llama-cpp-python) failed; what it said stands above")
