"""How jobs.py runs a program: a process of its own, with caches of its own, under the clock."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import theodora

HERE = Path(__file__).resolve().parent
OURS = Path(theodora.__file__).resolve().parents[1]
WARM_UP = 10  # steps that are not counted in the seconds of a step

# Where what was compiled, tuned or tried out once is kept for the next start.
KEPT = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
    "THEODORA_CACHE": "theodora",
    "HF_DATASETS_CACHE": "datasets",
    "UNSLOTH_COMPILE_LOCATION": "unsloth",
}


class ProcessFailed(Exception):
    """A process ended with an error. Its text is one line: the last that the process wrote."""


@dataclass(frozen=True)
class Place:
    """Where the processes of one way run, and from where they import."""

    folder: Path
    """Their working directory; what they keep for the next start lies in it, so the first finds nothing."""
    imports: tuple[Path, ...] = ()
    """Folders to import from first."""
    bytecode: Path | None = None
    """Where Python keeps the bytecode of all imports, if not beside them."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Further variables."""
    cores: int | None = None
    """Processor cores that they may use. Default: all."""

    def kept(self) -> dict[str, str]:
        """The environment variables of what is kept for the next start."""
        return {name: str(self.folder / "kept" / part) for name, part in KEPT.items()}

    def variables(self) -> dict[str, str]:
        """The whole environment of a process."""
        before = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        path = [
            *self.imports,
            *(Path(each).resolve() for each in before.get("PYTHONPATH", "").split(os.pathsep) if each),
        ]
        settings = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
        if path:
            settings["PYTHONPATH"] = os.pathsep.join(map(str, path))
        if self.bytecode:
            settings["PYTHONPYCACHEPREFIX"] = str(self.bytecode)
        return before | settings | self.kept() | dict(self.environment)


def run_process(command: Sequence[str], place: Place) -> tuple[float, str]:
    """Wall-clock seconds of a Python process, and its standard output.

    Raises:
        ProcessFailed: it ended with another exit code than 0.
    """
    place.folder.mkdir(parents=True, exist_ok=True)
    with _cores(place.cores):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            env=place.variables(),
            cwd=place.folder,
        )
        seconds = time.perf_counter() - began
    if done.returncode:
        print((done.stderr or done.stdout)[-3000:], file=sys.stderr, flush=True)
        raise ProcessFailed(f"exit code {done.returncode}: {last_line(done.stderr) or last_line(done.stdout)}")
    return seconds, done.stdout


def last_line(text: str) -> str:
    """The last line with anything in it; a progress bar's carriage returns end lines, too."""
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    return next((line for line in reversed(lines) if line), "")[:300]


@contextmanager
def _cores(count: int | None) -> Iterator[None]:
    """Bind what the block starts to so many cores, where the system can."""
    if count is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def clocked(program: Sequence[str], place: Place) -> dict[str, Any]:
    """A training run under the clock: see `figures`."""
    with tempfile.TemporaryDirectory(prefix="theodora-clock-") as folder, gpu_use() as use:
        times = Path(folder) / "times.json"
        began = time.time()
        seconds, _ = run_process([str(HERE / "jobs_clock.py"), str(times), *program], place)
        steps = json.loads(times.read_text(encoding="utf-8"))["steps"]
    return figures(began, seconds, steps, use)


def figures(
    began: float, whole: float, steps: Sequence[Sequence[float]], use: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    """Seconds of a training process.

    Args:
        began: when it was started.
        whole: how long it took.
        steps: when each step began and ended.
        use: when the GPU was looked at, and the share of the time before in which it ran anything.

    Returns:
        `before`: from the start to the end of the first step; `stepping`: from there to the end of the last; `step`:
        of one step, those that warm up left out; `busy`: the GPU's share of those, or None without one; `whole`.
    """
    if len(steps) < 2:
        raise ProcessFailed(f"the clock saw {len(steps)} steps; at least 2 are needed")
    timed = steps[min(WARM_UP, len(steps) // 2) :]
    busy = [share for at, share in use if timed[0][0] <= at <= timed[-1][1]]
    return {
        "whole": whole,
        "before": steps[0][1] - began,
        "stepping": steps[-1][1] - steps[0][1],
        "step": (timed[-1][1] - timed[0][0]) / len(timed),
        "busy": statistics.mean(busy) if busy else None,
    }


@contextmanager
def gpu_use() -> Iterator[list[tuple[float, float]]]:
    """(when, share of the last tenth of a second in which the first GPU ran anything), while the block lasts."""
    use: list[tuple[float, float]] = []
    if shutil.which("nvidia-smi") is None:
        yield use
        return
    query = ["nvidia-smi", "--id=0", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as process:

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip().isdigit():  # "[N/A]" on a GPU in parts
                    use.append((time.time(), float(line) / 100))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield use
        finally:
            process.terminate()
            reader.join()


def compile_bytecode(scratch: Path, sources: Sequence[Path], packages: Sequence[Path]) -> Path | None:
    """Compile what is imported before anything is timed, as an installation does.

    Args:
        scratch: a folder that lasts as long as the measurement.
        sources: folders of code that was not installed.
        packages: folders of packages, which are compiled if they were not.

    Returns:
        The folder where Python is to look for bytecode, because it cannot lie beside all of that; or None.
    """
    beside = all(os.access(folder, os.W_OK) for folder in (*sources, *packages))
    folder = None if beside else scratch / "bytecode"
    todo = [*sources, *(each for each in packages if folder or not any(each.glob("*/__pycache__/__init__.*.pyc")))]
    command = [sys.executable, "-m", "compileall", "-q", "-j", "0", *map(str, todo)]
    # Not checked: packages have files for other versions of Python, which do not compile.
    subprocess.run(command, check=False, capture_output=True, env=Place(scratch, bytecode=folder).variables())
    return folder


def packages_folder() -> Path:
    """Where torch is installed, and what it needs with it."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]
