"""What is killed: a training run of each kind, a merge, a conversion. Imported by the fork server, which starts them.

A job is a function of a folder that can be begun again at any time: it goes on, or does what is missing.
"""

import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import theodora.data.load
from theodora.config import TrainConfig
from theodora.demo import model as demo_model
from theodora.merging.checkpoint import merge_checkpoint
from theodora.train import callbacks, train
from theodora.train.processes import Agreement

# All runs stop and go on in the middle of an epoch and at its end (10 rows of sums in steps of 4 or fewer rows).
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"method": "lora"},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1, "logging_steps": 4},
    "packing": {"packing": True, "max_length": 48, "per_device_train_batch_size": 1, "train_on": "all"},
    "evaluation": {"held_out": 3, "eval_steps": 2, "save_steps": 4, "early_stopping_patience": 9},
    "workers": {"dataloader_num_workers": 2},
    "saving": {"save_steps": 1, "save_total_limit": 1},
    "float8": {"base_dtype": "fp8", "init": "pissa"},
    "recomputed": {"gradient_checkpointing": True, "optim": "adafactor", "lr_scheduler_type": "linear"},
}
_COMMON: dict[str, Any] = {
    "max_steps": 7,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "dropout": 0.1,
    "warmup_steps": 2,
    "held_out": 0,
    "save_steps": 2,
    "bf16": False,
    "resume": "auto",
}


def train_kind(kind: str, inputs: Path, folder: Path, **others: Any) -> None:
    """One run, from the start or from its newest checkpoint."""
    options = {**_COMMON, **KINDS[kind], "model": str(inputs / "model"), "data": str(inputs / "sums.jsonl"), **others}
    train(TrainConfig.from_options({**options, "output": str(folder / "run")}), console=Console(quiet=True))


def merge(inputs: Path, folder: Path) -> None:
    """Merge an adapter, over an earlier merge of another one."""
    merge_checkpoint(inputs / "adapter", folder / "merged", base_model=inputs / "model", overwrite=True, dtype="bf16")


def requantise(inputs: Path, folder: Path) -> None:
    """Merge an adapter of a quantised base back into its format, over an earlier merge."""
    merge_checkpoint(
        inputs / "of quantised", folder / "merged", base_model=inputs / "quantised", onto="quantised", max_loss=9,
        overwrite=True, max_shard_size="40KB",
    )  # fmt: skip


def convert(inputs: Path, folder: Path) -> None:
    """From a GGUF file to a model folder."""
    if not (folder / "converted" / "config.json").is_file():
        demo_model.convert(inputs / "tiny.gguf", folder / "converted")


def jobs() -> dict[str, Callable[..., None]]:
    """Every job by name."""
    runs = {kind: lambda inputs, folder, kind=kind: train_kind(kind, inputs, folder) for kind in KINDS}
    return {**runs, "merge": merge, "requantise": requantise, "convert": convert}


def start(name: str, inputs: Path, folder: Path, at_event: int | None = None, count: Path | None = None) -> None:
    """Do a job in this process, which is killed before its `at_event`th file operation; or count these."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for the workers of data loaders, as in any other process
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    seen = _watch(str(folder), at_event)
    jobs()[name](inputs, folder)
    if count is not None:
        count.write_text(str(seen[0]))


def stuck(options: dict[str, Any], step: int, folder: Path) -> None:
    """A run that takes a minute over the step after `step`."""
    os.dup2(os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)

    class Slow(callbacks.CountUpdates):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                (folder / "stuck").touch()
                time.sleep(60)

    sys.modules["theodora.train.run"].CountUpdates = Slow  # pyright: ignore
    train(TrainConfig.from_options(options), console=Console(quiet=True))


def vote(rank: int, folder: Path) -> None:
    """One of two processes, of which the second is told to stop at step 2."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    agree = Agreement()
    found = [agree(rank == 1 and step == 2) for step in range(4)]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link")


def _watch(folder: str, at_event: int | None) -> list[int]:
    seen, main = [0], threading.get_ident()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            path, changes = (args[0] if args else ""), event in _CHANGES
        if not changes or threading.get_ident() != main or not isinstance(path, str | os.PathLike):
            return
        text = os.fspath(path)
        if str(text).startswith(folder) and not str(text).endswith("log.txt"):
            seen[0] += 1
            if seen[0] == at_event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("runtime", "per_second", "seconds_left", "peak_memory")
    return [
        {name: value for name, value in line.items() if not name.endswith(clock)}
        for line in lines
        if "train_runtime" not in line
    ]


assert theodora.data.load  # imported so that the fork server has it
gc.freeze()  # what is there now is not looked through again in each process
