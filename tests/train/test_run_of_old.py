"""What earlier code wrote: its adapters load, and a run it was stopped in goes on to the end that it reached itself.

The files are in `tests/fixtures/run_of_0bbe773`, whose `make.py` says how they came about.
"""

import json
import shutil
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.trainer_pt_utils import safe_globals

from theodora import load_adapter
from theodora.adapters.state import trained_tensors
from theodora.config import TrainConfig
from theodora.parse import parse_yaml
from theodora.train import callbacks, train

OLD = Path(__file__).parents[1] / "fixtures" / "run_of_0bbe773"
STOPPED_AT = 3
CHANGING = ("runtime", "_per_second", "seconds_left", "peak_memory")


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A copy to work in: the run's own files name model and data as they lie beside it."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Up to the last digits of float32, whose sums differ from machine to machine."""
    return bool((found - expected).norm() <= 1e-5 * expected.norm())


@pytest.mark.parametrize("name", ["lora", "dora-pissa"])
def test_its_adapters_load(name):
    expected = {
        key.removeprefix(f"{name}/"): value
        for key, value in load_file(OLD / "loaded.safetensors").items()
        if key.startswith(f"{name}/")
    }
    logits = expected.pop("logits")
    model = load_adapter(AutoModelForCausalLM.from_pretrained(OLD / "model"), OLD / "adapters" / name)
    with torch.no_grad():
        assert close(model(input_ids=torch.arange(3, 15)[None]).logits, logits)
    found = trained_tensors(model)
    assert found.keys() == expected.keys()
    # All of it stands in the file as it is, PiSSA's start, too.
    assert [path for path in found if not torch.equal(found[path], expected[path])] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="it ran on a CPU, and its dropout with a CPU's random numbers")
def test_its_run_goes_on_to_the_end_it_reached_itself(old, monkeypatch):
    read = {}

    class Look(callbacks.CountUpdates):
        def on_step_begin(self, args, state, control, **kwargs):
            if not read:
                read.update(
                    step=state.global_step,
                    random=torch.get_rng_state(),
                    optimizer=deepcopy(kwargs["optimizer"].state_dict()),
                    scheduler=kwargs["lr_scheduler"].state_dict(),
                )

    monkeypatch.setattr(sys.modules["theodora.train.run"], "CountUpdates", Look)
    checkpoint = old / "run" / "checkpoints" / f"checkpoint-{STOPPED_AT}"
    expected = {name: torch.load(checkpoint / f"{name}.pt", weights_only=True) for name in ("optimizer", "scheduler")}
    with safe_globals():
        random = torch.load(checkpoint / "rng_state.pth", weights_only=True)["cpu"]
    options = parse_yaml((old / "run" / "config.yaml").read_text())
    train(TrainConfig.from_options(options | {"resume": "auto"}), console=Console(quiet=True))

    assert read["step"] == STOPPED_AT
    torch.testing.assert_close(read["optimizer"], expected["optimizer"], rtol=0, atol=0)
    assert read["scheduler"] == expected["scheduler"]
    assert torch.equal(read["random"], random)

    found, reached = (_lines(folder / "metrics.jsonl") for folder in (old / "run", old / "reached"))
    assert [line.keys() for line in found] == [line.keys() for line in reached]
    for here, there in zip(found, reached, strict=True):
        assert here == pytest.approx(there, rel=1e-5)
    found, reached = (load_file(folder / "adapter_model.safetensors") for folder in (old / "run", old / "reached"))
    assert found.keys() == reached.keys()
    assert [name for name in found if not close(found[name], reached[name])] == []


def _lines(file: Path) -> list[dict[str, float]]:
    """Of a metrics file, without how long things took, and what was not in it then."""
    lines = [json.loads(line) for line in file.read_text().splitlines() if "moved_direction" not in line]
    return [{k: v for k, v in line.items() if not k.endswith(CHANGING)} for line in lines]
