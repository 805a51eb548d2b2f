"""What a run, a merge and an export report is what happened, and what they wrote is what they meant to write."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from theodora.adapters.written import changes
from theodora.cli import main as cli
from theodora.train.checkpoints import newest_checkpoint


@pytest.fixture
def command(tiny_model_dir, rows, tmp_path, capsys):
    """`theodora train` on the tiny model: its exit code and what it says."""

    def run(*more: str, output: str = "run") -> tuple[int, str]:
        where = ["--model", str(tiny_model_dir()), "--data", str(rows), "--output", str(tmp_path / output)]
        size = ["--rank", "2", "--per-device-train-batch-size", "4", "--held-out", "0", "--warmup-steps", "0"]
        code = cli.main(["train", *where, *size, "--lr-scheduler-type", "constant", *more])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def _rates(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["learning_rate"] for line in lines if "learning_rate" in line]


def test_a_resumed_run_uses_the_learning_rate_that_it_records(command, tmp_path):
    assert command("--max-steps", "2", "--save-steps", "1")[0] == 0
    code, said = command("--max-steps", "3", "--save-steps", "1", "--resume", "--learning-rate", "0.05")
    assert code == 0
    assert "lr 5.0e-02" in said
    assert _rates(tmp_path / "run")[-1] == 0.05
    assert "# until step 2: learning_rate 0.0005" in (tmp_path / "run" / "config.yaml").read_text()


def test_an_option_that_a_resumed_run_cannot_use_is_refused(command, tmp_path):
    assert command("--max-steps", "1")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, said = command("--max-steps", "2", "--resume", "--seed", "7", "--init", "gaussian")
    assert code != 0
    assert "seed was 0 and is 7" in said
    assert "init was default and is gaussian" in said
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


RUINOUS = ("--learning-rate", "1e30", "--max-grad-norm", "0", "--method", "lora")


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_step_that_ruins_the_weights_is_not_saved_over_good_ones(command, tmp_path, policy):
    good = ("--max-steps", "2", "--save-steps", "1", "--method", "lora")
    assert command(*good)[0] == 0
    code, said = command("--max-steps", "4", "--save-steps", "1", *RUINOUS, "--resume", "auto", "--on-nan", policy)
    assert code != 0
    assert "after step 3, and nothing of that was saved" in said
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.name == "checkpoint-2"
    assert command("--max-steps", "4", "--save-steps", "1", "--method", "lora", "--resume", "auto")[0] == 0
    assert all(bool(t.isfinite().all()) for t in load_file(tmp_path / "run" / "adapter_model.safetensors").values())


@pytest.mark.parametrize("saves", [("--save-steps", "100"), ("--save-strategy", "no")])
def test_a_run_whose_last_step_ruins_the_weights_fails(command, tmp_path, saves):
    code, said = command("--max-steps", "1", *RUINOUS, *saves)
    assert code != 0
    assert "after step 1, and nothing of that was saved" in said
    assert "all finite" not in said
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_base_that_is_not_finite_is_named_and_not_the_learning_rate(ruined_base, rows, tmp_path, capsys):
    for held_out in ("0", "4"):
        where = ["--model", str(ruined_base("model.norm.weight")), "--data", str(rows), "--output", str(tmp_path / "r")]
        assert cli.main(["train", *where, "--max-steps", "1", "--held-out", held_out, "--overwrite"]) != 0
        said = capsys.readouterr()
        assert "model.norm.weight" in said.out + said.err
        assert "base model itself holds NaN" in said.out + said.err


@pytest.fixture
def ruined_base(tiny_model_dir, tmp_path):
    """The tiny model's folder with one bad value in the tensor named."""

    def make(name: str, value: float = float("nan")) -> Path:
        folder = tmp_path / f"base-{name}-{value}"
        folder.mkdir(exist_ok=True)
        for file in Path(tiny_model_dir()).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[0] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make
