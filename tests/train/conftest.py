"""Runs of a few steps on tiny models: rows of small sums, and a configuration to start from."""

import json
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import recorder
from theodora.config import TrainConfig
from theodora.train import TrainResult, train, trainer, trainer_loss, trainer_passes
from undrawn import leave_losses_blank


@pytest.fixture(autouse=True)
def _undrawn_and_unasked() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # of its own: tests undo theirs
        leave_losses_blank(patch)  # test_run.py has the figure
        # test_ends.py has the answers that a trained model is asked for: a tenth of a run of four steps
        patch.setattr(import_module("theodora.train.run"), "_count_stops", lambda prepared: None)
        yield


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}" + "!" * (a % 5)} for a in range(8) for b in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def alike(tmp_path: Path) -> str:
    """Rows of one text: whatever is a mean over them is that of any part of them."""
    path = tmp_path / "alike.jsonl"
    path.write_text(40 * (json.dumps({"prompt": "1 + 2 =", "completion": " 3, or so"}) + "\n"))
    return str(path)


@pytest.fixture
def options(tiny_model_dir, sums, tmp_path) -> dict[str, Any]:
    """Options of a short run in fp32, by name."""
    return {
        "model": str(tiny_model_dir()),
        "data": str(sums),
        "output": str(tmp_path / "run"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "bf16": False,
    }


@pytest.fixture
def run(options) -> Callable[..., TrainResult]:
    """Train with these options and others, in silence."""

    def start(**others: Any) -> TrainResult:
        config = TrainConfig.from_options(options | others, granted=["reward"])
        return train(config, console=Console(quiet=True))

    return start


@pytest.fixture(scope="session")
def _wholes() -> dict[str, Path]:
    return {}


@pytest.fixture
def whole(run, options, _wholes, tmp_path_factory) -> Callable[..., Path]:
    """The folder of an uninterrupted run with these options and others, made once. Treat it as read-only."""

    def folder(**others: Any) -> Path:
        key = json.dumps({**options, **others, "output": None}, sort_keys=True, default=str)
        if key not in _wholes:
            output = tmp_path_factory.mktemp("whole")
            run(**others, output=str(output))
            _wholes[key] = output
        return _wholes[key]

    return folder


@pytest.fixture
def losses() -> Callable[..., list[float]]:
    """The losses in the metrics file of a run's folder."""
    return _losses


def _losses(output: Path | str, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.fixture
def resumes(run, tmp_path) -> Callable[..., None]:
    """Holds a run with these options that goes on from a checkpoint against one that nobody stopped, bit for bit."""

    def compare(**others: Any) -> None:
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        settings = {"max_steps": 6, "save_steps": 3, **others}
        run(output=str(whole), **settings)
        shutil.copytree(whole, parts)
        shutil.rmtree(parts / "checkpoints" / f"checkpoint-{settings['max_steps']}")  # killed in the second half
        run(output=str(parts), resume="auto", **settings)
        for name in ("loss", "eval_loss", "num_tokens"):
            assert _losses(parts, name) == _losses(whole, name), name
        one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, parts))
        assert all(torch.equal(one[key], other[key]) for key in one)

    return compare


@pytest.fixture
def made(monkeypatch):
    """The trainers of the runs to come, which run as on a GPU: with the fused loss, and with graphs if asked for."""
    found, init = [], trainer.AdapterTrainer.__init__

    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.steps = None
        found.append(self)

    release = trainer_passes.GraphedStep.release

    def released(self, why_not):
        found[-1].steps = self
        return release(self, why_not)

    recorder.install(monkeypatch)
    monkeypatch.setattr(trainer_passes.GraphedStep, "release", released)
    monkeypatch.setattr(trainer.AdapterTrainer, "__init__", remember)
    monkeypatch.setattr(trainer_loss, "fused_loss_pays", lambda device: True)
    monkeypatch.setattr(trainer_passes, "graphs_pay", lambda device: True)
    return found
