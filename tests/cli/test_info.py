"""`theodora info` as typed."""

import json
from pathlib import Path

import pytest
import torch

from theodora.adapters import inject_adapter, save_adapter
from theodora.cli.main import main
from theodora.config import AdapterConfig


@pytest.fixture
def make(tmp_path, tiny_model, tiny_model_dir):
    def make(*, trained: bool = True, base: str | None = "here", **config):
        model = inject_adapter(tiny_model(), AdapterConfig(rank=4, **config))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and trained:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        save_adapter(model, tmp_path / "adapter")
        path = tmp_path / "adapter" / "adapter_config.json"
        base = str(tiny_model_dir()) if base == "here" else base
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
        return str(tmp_path / "adapter")

    return make


def test_the_page(make, capsys):
    assert main(["info", make()]) == 0
    printed = capsys.readouterr()
    for text in ("DoRA", "alpha 8, scale 2", "14 modules", "parameters", "direction", "magnitude", "q_proj", "°", "%"):
        assert text in printed.out
    assert "warning" not in printed.out


def test_without_the_base(make, capsys):
    assert main(["info", make(base="nobody/nothing")]) == 0
    printed = capsys.readouterr().out
    assert "not at hand" in printed
    assert "‖s·B·A‖" in printed


def test_an_untrained_adapter_is_loudly_so(make, capsys):
    assert main(["info", make(trained=False)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "warning" in printed
    assert "untrained" in printed


def test_json_alone_on_stdout(make, capsys):
    assert main(["info", make(method="lora"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["method"] == "lora"
    assert len(report["modules"]) == 14


def test_the_figure_is_written(make, tmp_path, capsys):
    assert main(["info", make(), "--figure", str(tmp_path / "moved.png")]) == 0
    assert (tmp_path / "moved.png").stat().st_size > 1000
    assert main(["info", make(), "--figure", str(tmp_path / "moved.xyz")]) == 2
    assert ".svg" in capsys.readouterr().err


def test_bad_input(make, tmp_path, capsys):
    assert main(["info", str(tmp_path / "nowhere")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main(["info", make(), "--base-model", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err


def test_brackets_in_a_path_are_shown_as_they_are(make, tmp_path, capsys):
    moved = tmp_path / "[bold]" / "a"
    moved.parent.mkdir()
    Path(make()).rename(moved)
    assert main(["info", str(moved)]) == 0
    assert "[bold]" in "".join(capsys.readouterr().out.split())
