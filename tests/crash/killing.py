"""Start a job, kill it, look at what it left, let it end, and compare with a job that nobody killed."""

import hashlib
import json
import multiprocessing
import os
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from crash import jobs
from theodora.files.ours import MARK
from theodora.train.wholeness import faults

_SECONDS = 240  # in which any job ends


def fork_server() -> Any:
    """Processes that have everything imported already, so that a run takes half a second; new ones on a GPU machine,
    which an import may ask something and so keep from all that is forked."""
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crash.jobs"])
    with pytest.MonkeyPatch.context() as patch:  # before Python 3.13 the server does not get sys.path otherwise
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


@dataclass
class Expected:
    """A job that nobody killed."""

    seconds: float
    events: int
    files: dict[str, Any]


@dataclass
class Killing:
    """Kills jobs, and counts."""

    inputs: Path
    scratch: Path
    random: random.Random
    context: Any = field(default_factory=fork_server)
    expected: dict[str, Expected] = field(default_factory=dict)
    kills: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)

    def uninterrupted(self, name: str) -> Expected:
        """The files that a job ends with; the same ones twice."""
        if name not in self.expected:
            folder = self._folder(name)
            counted = folder / "events"
            self._finish(name, folder, count=counted)
            self.expected[name] = Expected(0.0, int(counted.read_text()), contents(folder))
            again, began = self._folder(name), time.monotonic()
            self._finish(name, again)
            self.expected[name].seconds = time.monotonic() - began
            twice, once = contents(again), self.expected[name].files
            assert twice == once, differences(twice, once)
        return self.expected[name]

    def survive(self, name: str, how: str) -> None:
        """Kill a job, perhaps more than once, and check that it comes to the same."""
        expected, folder = self.uninterrupted(name), self._folder(name)
        while True:
            killed = self._kill(name, folder, how, expected)
            check_whole(folder)
            if not killed or self.random.random() < 0.75:
                break
        self._finish(name, folder)
        found = contents(folder)
        assert found == expected.files, f"{name}, killed {how}: {differences(found, expected.files)} (in {folder})"

    def _kill(self, name: str, folder: Path, how: str, expected: Expected) -> bool:
        event = self.random.randint(1, expected.events) if how == "at a file operation" else None
        process = self.context.Process(target=jobs.start, args=(name, self.inputs, folder, event))
        process.start()
        if how == "at a moment":
            time.sleep(self.random.uniform(0, expected.seconds))
        elif how == "while writing":
            rank = self.random.randint(1, 3)
            _wait_for_writing(folder, process, rank)
            time.sleep(self.random.uniform(0, 0.01))
        else:
            process.join(_SECONDS)
        if process.is_alive():
            process.kill()
        process.join(_SECONDS)
        killed = process.exitcode == -9
        assert killed or process.exitcode == 0, (folder / "log.txt").read_text()
        if killed:
            self.kills[name] += 1
            self.places[place(folder)] += 1
        return killed

    def _finish(self, name: str, folder: Path, count: Path | None = None) -> None:
        process = self.context.Process(target=jobs.start, args=(name, self.inputs, folder, None, count))
        process.start()
        process.join(_SECONDS)
        assert process.exitcode == 0, (folder / "log.txt").read_text()

    def _folder(self, name: str) -> Path:
        folder = self.scratch / f"{name}-{len(list(self.scratch.iterdir()))}"
        folder.mkdir()
        return folder


def _wait_for_writing(folder: Path, process: Any, rank: int) -> None:
    """Until the process has begun to write something aside, for the `rank`th time."""
    seen: set[str] = set()
    while process.is_alive() and len(seen) < rank:
        seen |= {path.name for path in partials(folder)}
        time.sleep(0.0005)


def partials(folder: Path) -> list[Path]:
    """What is being written aside, or was."""
    return [p for depth in ("", "run/", "run/checkpoints/") for p in folder.glob(f"{depth}.*.partial-*")]


def place(folder: Path) -> str:
    """What a killed job was at."""
    writing = [re.sub(r"\.(.*?)(-\d+)?\.partial-.*", r"\1", path.name) for path in partials(folder)]
    if writing:
        return f"writing {writing[0]}"
    if (folder / "run").is_dir():
        return "after the first checkpoint" if list(folder.glob("run/checkpoints/*")) else "before a checkpoint"
    return "elsewhere"


def check_whole(folder: Path) -> None:
    """Check that nothing under a final name is torn."""
    for checkpoint in folder.glob("run/checkpoints/checkpoint-*"):
        assert not faults(checkpoint), checkpoint
    hidden = [p for p in folder.rglob("*") if any(part.startswith(".") for part in p.relative_to(folder).parts)]
    for file in {*folder.rglob("*")} - {*hidden}:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                assert list(opened.keys())
        elif file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".jsonl":
            assert all(json.loads(line) for line in file.read_text().splitlines())
        elif file.suffix == ".png":
            assert file.read_bytes()[-8:-4] == b"IEND"
    for model in ("merged", "converted"):
        if (folder / model).is_dir():
            names = {path.name for path in (folder / model).iterdir()}
            assert names >= {"config.json", "tokenizer.json", "README.md"}, names
            index = folder / model / "model.safetensors.index.json"
            wanted = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else None
            assert names >= (wanted or {"model.safetensors"}), names


def contents(folder: Path) -> dict[str, Any]:
    """Every file a job ended with: hashes, and the figures that do not depend on the clock."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        # (what has only been begun is empty, and goes a while later)
        if file.is_dir() or name in ("log.txt", "events") or ".begun-" in name:
            continue
        if file.name == "metrics.jsonl":
            found[name] = jobs.read_metrics(file.parent)
        elif file.suffix == ".safetensors":  # (the order of its metadata is not fixed)
            tensors = load_file(file)
            parts = [(key, str(t.dtype), t.shape, t.numpy(force=True).tobytes()) for key, t in sorted(widened(tensors))]
            found[name] = hashlib.sha256(repr(parts).encode()).hexdigest()
        elif file.name == MARK and file.parent.name.startswith("checkpoint-"):  # (with hashes of figures of the clock)
            found[name] = sorted(json.loads(file.read_text())["sha256"])
        elif file.suffix in (".yaml", ".jsonl", ".json") and file.name not in ("trainer_state.json",):
            found[name] = hashlib.sha256(file.read_bytes().replace(str(folder).encode(), b"")).hexdigest()
        else:
            found[name] = "there"
    return found


def widened(tensors: dict[str, Any]) -> list[tuple[str, Any]]:
    """The tensors in a dtype that numpy has."""
    return [(key, tensor.float() if tensor.is_floating_point() else tensor) for key, tensor in tensors.items()]


def differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """What differs, in words."""
    names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    return "; ".join(f"{name}: {found.get(name)} instead of {expected.get(name)}" for name in names)[:3000]
