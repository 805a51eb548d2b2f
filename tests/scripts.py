"""Scripts of benchmarks/ and recipes/ in this process: a new one takes seconds to import what they need."""

import runpy
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from theodora.bench import Job
from theodora.bench import runner as runner_module
from theodora.bench.worker import Stepper

ROOT = Path(__file__).parents[1]


def load(script: str) -> ModuleType:
    """The module of a script, by its path in the repository, without running it."""
    path = ROOT / script
    spec = spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, path.stem, module)  # where dataclasses look up what their annotations name
        spec.loader.exec_module(module)
    return module


def run(monkeypatch: pytest.MonkeyPatch, script: str, *words: Any) -> dict[str, Any]:
    """Run a script as `python script words` does, and give its names."""
    path = ROOT / script
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, words)])
    monkeypatch.syspath_prepend(path.parent)
    with torch.enable_grad():  # and as it was afterwards
        return runpy.run_path(str(path), run_name="__main__")


def measure_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `theodora.bench` measure all variants in this process; test_bench.py has the processes."""
    monkeypatch.setattr(runner_module, "_Worker", _Worker)


class _Worker:
    """What answers for a variant, without a process of its own."""

    def __init__(self, job: Job, log: Path) -> None:
        self.stepper = Stepper(job)

    def answer(self) -> str:
        return "imported"

    def ask(self, command: str, *arguments: Any) -> Any:
        return getattr(self.stepper, command)(*arguments)

    def stop(self) -> None:
        pass
