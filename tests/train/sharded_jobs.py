"""What each of several processes does in the tests of sharding (`test_sharding.py`); no test itself."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from tiny import tiny_model

IDS = torch.randint(3, 200, (4, 12), generator=torch.Generator().manual_seed(0))
ROWS: dict[str, Callable[[Any], Any]] = {}


def row(job):
    ROWS[job.__name__] = job
    return job


def run(index: int, count: int, folder: Path, names: list[str]) -> None:
    """Do all jobs, one after the other, and leave what they found in a file."""
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(count)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=index, world_size=count)
    processes = SimpleNamespace(count=count, index=index)
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = ROWS[name](processes)
        except Exception as error:  # it is the test's to raise
            found[name] = error
    torch.save(found, folder / f"found{index}.pt")
    dist.barrier()
    dist.destroy_process_group()
