"""What this machine is and can do, as torch and the system tell: for `theodora doctor`. Imports torch when asked."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theodora.kept import cache_folder
from theodora.main_memory import main_memory

GIB = 2**30
_INSTRUCTIONS = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "bf16", "sve")
_FP8 = (8, 9)  # compute capability with products of float8


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator."""

    name: str
    memory: int
    """Bytes."""
    free: int
    capability: tuple[int, int]
    bf16: bool
    """Whether it has instructions for bfloat16."""

    @property
    def fp8(self) -> bool:
        """Whether it has products of float8."""
        return self.capability >= _FP8


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder that much is written to."""

    path: str
    free: int
    writable: bool


@dataclass(frozen=True, kw_only=True)
class Here:
    """This machine."""

    system: str
    python: str
    cpu: str
    cores: int
    instructions: tuple[str, ...]
    bf16: bool
    """Whether the CPU computes in bfloat16."""
    memory: int
    """Bytes that a new process can have."""
    cuda: str | None
    """The CUDA that torch was built for; None: it was built for CPUs."""
    gpus: tuple[Gpu, ...]
    gpu_unused: str | None
    """Why a GPU that is there is not used."""
    compiler: str | None
    """The C compiler that Triton and torch.compile need, if it is there."""
    headers: bool
    """Python's headers, which Triton needs beside it."""
    cache: Folder
    """Where models are downloaded to."""
    own_cache: Folder
    """Where Theodora keeps what it found out."""
    temporary: Folder
    """Where rows are unfolded."""
    offline: bool


def look() -> Here:
    """Look around.

    Raises:
        Exception: torch cannot be imported, with what it says.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of drivers that are too old, which is told below
        import torch

        from theodora.autocast import computes_in_bf16

        found: Mapping[str, Any] = torch.cpu.get_capabilities()
        gpus = tuple(_gpus(torch))
        bf16 = computes_in_bf16(torch.device("cpu"))
    unused = None
    if not gpus and Path("/dev/nvidiactl").exists():
        unused = (
            "torch was built for CPUs: install a build with CUDA from pytorch.org"
            if torch.version.cuda is None
            else f"torch {torch.__version__} finds none: its CUDA {torch.version.cuda} may be newer than the driver"
        )
    return Here(
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        python=platform.python_version(),
        cpu=str(found.get("cpu_name") or platform.processor() or platform.machine()),
        cores=_cores(),
        instructions=tuple(name for name in _INSTRUCTIONS if found.get(name)),
        bf16=bf16,
        memory=main_memory(),
        cuda=torch.version.cuda,
        gpus=gpus,
        gpu_unused=unused,
        compiler=_compiler(),
        headers=Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
        cache=_folder(_hub_cache()),
        own_cache=_folder(cache_folder()),
        temporary=_folder(Path(os.environ.get("TMPDIR") or "/tmp")),
        offline=os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
    )


def _gpus(torch: Any) -> list[Gpu]:
    if not torch.cuda.is_available():
        return []
    gpus: list[Gpu] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free = 0
        with suppress(RuntimeError):  # one that others have for themselves
            free = torch.cuda.mem_get_info(index)[0]
        capability = (properties.major, properties.minor)
        bf16 = capability >= (8, 0) or torch.version.hip is not None
        gpus.append(
            Gpu(name=properties.name, memory=properties.total_memory, free=free, capability=capability, bf16=bf16)
        )
    return gpus


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compiler() -> str | None:
    names = [os.environ.get("CC", ""), *(("cl",) if sys.platform == "win32" else ("gcc", "clang", "cc"))]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _hub_cache() -> Path:
    """As huggingface_hub has it, which takes longer to import than all of this."""
    if chosen := os.environ.get("HF_HUB_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or Path(base) / "huggingface").expanduser() / "hub"


def _folder(path: Path) -> Folder:
    """How much it may hold, or the nearest folder above that is there already."""
    there = next((place for place in (path, *path.parents) if place.is_dir()), Path("."))
    free = 0
    with suppress(OSError):
        free = shutil.disk_usage(there).free
    return Folder(path=str(path), free=free, writable=os.access(there, os.W_OK))
