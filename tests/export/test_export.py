"""An adapter in other programs' forms."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from exports import adapter_folder
from theodora import load_adapter
from theodora.cli.main import main
from theodora.errors import UsageError
from theodora.export import VerificationFailed, export_adapter

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(3))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture
def base(tiny_model_dir):
    return tiny_model_dir()


@pytest.fixture
def adapter(tmp_path, base):
    return adapter_folder(tmp_path / "adapter", base)


@pytest.fixture
def expected(base, adapter):
    return logits(load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter))


def test_a_merged_folder(adapter, expected, tmp_path):
    report = export_adapter(adapter, tmp_path / "out", "hf")
    assert report.verification is not None
    assert report.verification.passed
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, atol=1e-4, rtol=0
    )
    assert (tmp_path / "out" / "README.md").read_text().startswith("---")
    assert "# out" in (tmp_path / "out" / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "out"}


def test_a_peft_folder(adapter, base, expected, tmp_path):
    export_adapter(adapter, tmp_path / "out", "peft")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    torch.testing.assert_close(logits(theirs), expected, atol=1e-5, rtol=0)


def test_an_export_that_differs_is_not_kept(adapter, tmp_path):
    with pytest.raises(VerificationFailed) as failure:
        export_adapter(adapter, tmp_path / "out", "hf", dtype="bf16", bound=1e-6)
    assert not failure.value.verification.passed
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    assert export_adapter(adapter, tmp_path / "out", "hf", dtype="bf16").bytes > 0


def test_what_stands_there_is_safe(adapter, tmp_path):
    with pytest.raises(UsageError, match="contains, the adapter"):
        export_adapter(adapter, adapter, "hf", overwrite=True)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="already exists"):
        export_adapter(adapter, precious, "hf")
    with pytest.raises(UsageError, match="no earlier export"):
        export_adapter(adapter, precious, "hf", overwrite=True)
    assert (precious / "thesis.txt").read_text() == "x"


def test_the_command(adapter, tmp_path, capsys):
    command = ["export", str(adapter), "--output", str(tmp_path / "out"), "--to"]
    assert main([*command, "hf", "--dtype", "bf16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verification"]["passed"]
    assert main([*command, "hf"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "hf", "--overwrite"]) == 0
    assert "agree" in capsys.readouterr().out
    assert main([*command, "hf", "--overwrite", "--dtype", "bf16", "--bound", "1e-7"]) == 1
    assert "not kept" in capsys.readouterr().err
    assert main([*command, "onnx"]) == 2
