"""`theodora merge` as typed."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from theodora.adapters import inject_adapter, save_adapter
from theodora.cli.main import main
from theodora.config import AdapterConfig


@pytest.fixture
def adapter(tmp_path, tiny_model, tiny_model_dir):
    model = inject_adapter(tiny_model(), AdapterConfig(rank=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": str(tiny_model_dir())}
    path.write_text(json.dumps(config))
    return tmp_path / "adapter"


def test_a_merge_says_what_it_did(adapter, tmp_path, capsys):
    assert main(["merge", str(adapter), "--output", str(tmp_path / "merged"), "--dtype", "bf16"]) == 0
    printed = capsys.readouterr().out
    assert "Merged the DoRA adapter" in printed
    assert "14 of 21 tensors changed" in printed
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert kind in printed
    assert "theodora evaluate --model" in printed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_the_other_flags_reach_the_merge(adapter, tmp_path, tiny_model_dir, capsys):
    command = ["merge", str(adapter), "--output", str(tmp_path / "merged")]
    assert main([*command, "--max-shard-size", "30KB"]) == 0
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--base-model", str(tiny_model_dir(seed=1))]) == 1
    assert "another base model" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--output", "merged", "--dtype", "int4"], 2, "bf16"),
        (["--output", "merged", "--max-shard-size", "small"], 2, "5GB"),
        ([], 2, "--output"),
    ],
)
def test_usage_errors(adapter, arguments, code, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["merge", str(adapter), *arguments]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_rounding_that_eats_the_change_is_said(adapter, tmp_path, tiny_model, tiny_model_dir, capsys):
    model = inject_adapter(tiny_model(), AdapterConfig(rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.add_(1e-5 * torch.randn_like(parameter))
    save_adapter(model, tmp_path / "faint")
    command = ["merge", str(tmp_path / "faint"), "--base-model", str(tiny_model_dir()), "--output", str(tmp_path / "m")]
    assert main([*command, "--dtype", "bf16"]) == 0
    assert "--dtype fp32 keeps all of it" in capsys.readouterr().out
