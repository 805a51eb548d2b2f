"""`theodora inspect` as typed."""

import json

import pytest
import torch

from theodora.adapters import inject_adapter, save_adapter
from theodora.cli import console
from theodora.cli.main import main
from theodora.config import AdapterConfig


@pytest.fixture
def run(tmp_path, tiny_model, tiny_model_dir):
    model = tiny_model()
    model.config._name_or_path = str(tiny_model_dir())
    inject_adapter(model, AdapterConfig(rank=2))
    for step in (5, 10):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        save_adapter(model, tmp_path / "[run]" / f"checkpoint-{step}")
    return str(tmp_path / "[run]")


def test_the_page(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["inspect", run, "--figures", str(tmp_path / "figures"), "--no-rank"]) == 0
    assert main(["inspect", run, run]) == 0
    printed = capsys.readouterr().out
    for text in ("DoRA", "[run]", "checkpoint-10", "ΔM", "ΔD", "q_proj", "largest movers", "r(ΔD, ΔM)", "−0.62"):
        assert text in printed
    assert (tmp_path / "figures" / "scatter.png").is_file()
    assert (tmp_path / "figures" / "heat_map.png").is_file()


def test_no_figure_is_cut_in_eighty_columns(run, capsys, monkeypatch):
    console.stdout.cache_clear()  # it has kept its width
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["inspect", run]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "gate_proj" in printed
    assert [line for line in printed.splitlines() if len(line) > 80 and run not in line] == []
    console.stdout.cache_clear()


def test_json_alone_on_stdout(run, capsys):
    assert main(["inspect", run, "--json", "--no-rank"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["runs"]
    assert [len(c["modules"]) for c in report["checkpoints"]] == [14, 14]
    assert report["checkpoints"][0]["modules"][0]["effective_rank"] is None
    assert len(report["correlations"]) == 7


def test_bad_input(run, tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "is not here" in capsys.readouterr().err
    assert main(["inspect"]) == 2
    assert main(["inspect", run, "--figures", str(tmp_path / "[run]" / "checkpoint-5" / "adapter_config.json")]) == 1
    assert "cannot be made" in capsys.readouterr().err
