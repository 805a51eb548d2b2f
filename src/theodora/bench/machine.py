"""What a bench was measured on: hardware, driver, versions, commit."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import theodora

_PACKAGES = (
    "theodora",
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "liger_kernel",
    "bitsandbytes",
    "torchao",
)

# Dense bf16 products with float32 accumulation, TFLOP/s, from NVIDIA's datasheets; a name that says more goes first.
_BF16_PEAKS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "A40": 149.7,
    "A10": 125.0,
    "L40S": 362.05,
    "L40": 181.05,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.2,
}


def bf16_peak(device: str) -> float | None:
    """FLOP/s of a GPU's matrix units in bf16 by its datasheet, or None for one that is not known here."""
    return next((1e12 * peak for name, peak in _BF16_PEAKS.items() if name in device), None)


def describe_machine() -> dict[str, Any]:
    """Processor, memory, GPUs, versions, and the command with its date."""
    import torch

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "commit": git_commit(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": _gpus(),
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def git_commit() -> str | None:
    """The commit of the checkout that Theodora runs from, marked if it has changes; None outside a checkout."""
    here = Path(theodora.__file__).parent
    asked = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    tracked = ["git", "-C", str(here), "ls-files", "--error-unmatch", "__init__.py"]
    # A package that lies in somebody else's checkout is not of that commit.
    return _output(asked) if _output(tracked) else None


def _command() -> str:
    """Without this machine's folders: of an absolute path the last part."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return shlex.join(Path(word).name if Path(word).is_absolute() else word for word in words)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line for line in lines if line.startswith("model name")), "")
    return name.partition(":")[2].strip() or platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Name, memory and driver of each GPU."""
    return (
        _output(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]) or ""
    ).splitlines()


def _versions() -> dict[str, str]:
    installed: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
