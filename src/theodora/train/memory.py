"""The most memory that a part of a process's life took."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def start_counting(device: torch.device) -> None:
    """Forget earlier peaks: those of the GPU, or those of main memory where the system can (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR.write_text("5")  # proc(5): sets VmHWM to the memory held now
    except OSError:
        return


def peak_of(device: torch.device) -> int:
    """Most bytes held since `start_counting`; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
