"""What memory there is: as people write it, and as this machine tells."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from theodora.errors import ConfigError, shown
from theodora.main_memory import main_memory

GIB = 2**30
_UNITS = {"k": 2**10, "m": 2**20, "g": GIB, "t": 2**40}
_LEAST, _MOST = 64 * 2**20, 2**50
_MOST_GPUS = 100_000


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a run is going to be."""

    device: str
    """cuda or cpu."""
    memory: int
    """Bytes that the run may take, on each GPU."""
    gpus: int = 1
    """Processes, each with a GPU of its own (on CPUs: each with such a memory)."""
    name: str = ""
    """What the device is called, where it is this machine's."""


def parse_memory(text: str) -> int:
    """Bytes of "24GB", "80 GiB", "24576M": every unit is a power of 1024, as GPUs are sold and measured.

    Raises:
        ConfigError: it is no size, or none that a device has.
    """
    found = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,6})?)\s*([kmgt])(?:i?b)?\s*", text, re.IGNORECASE)
    if found is None:
        raise ConfigError(f"memory is {shown(text)}; expected a number and a unit, KB, MB, GB or TB: 24GB, 80GiB")
    size = round(float(found[1]) * _UNITS[found[2].lower()])
    if not _LEAST <= size <= _MOST:
        raise ConfigError(f"memory is {shown(text)}; expected what a device can have: at least 64 MB, at most 1,024 TB")
    return size


def machine(gpus: int | None = None, memory: str | None = None, device: str | None = None) -> Machine:
    """The machine that was named, or this one where nothing was.

    Args:
        gpus: how many. Default: those of this machine; with a memory, one.
        memory: of each GPU. Default: what this machine's have.
        device: cuda or cpu. Default: cuda where GPUs or a memory are named, or are there.

    Raises:
        ConfigError: no GPU is asked for, or none is here and no memory is named.
    """
    if gpus is not None and not 1 <= gpus <= _MOST_GPUS:
        raise ConfigError(f"gpus is {gpus}; expected at least 1 and at most {_MOST_GPUS:,} (--device cpu is for none)")
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = device or ("cuda" if here or gpus is not None or memory is not None else "cpu")
    size = None if memory is None else parse_memory(memory)
    if device == "cpu":
        return Machine(device="cpu", memory=size or main_memory(), gpus=gpus or 1, name="this machine's CPU")
    if size is not None:
        return Machine(device="cuda", memory=size, gpus=gpus or 1)
    if not here:
        raise ConfigError(
            "There is no GPU here whose memory could be asked for; expected --memory, as in --memory 24GB"
        )
    properties = [torch.cuda.get_device_properties(i) for i in range(here)]
    return Machine(
        device="cuda", memory=min(p.total_memory for p in properties), gpus=gpus or here, name=properties[0].name
    )
