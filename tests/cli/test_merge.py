"""`theodora merge` as typed."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantised import save_adapted, save_plain, save_quantised
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


@pytest.fixture(scope="module")
def on_nf4(tmp_path_factory):
    """A quantised folder that names the plain one it was made from, and an adapter trained on it."""
    folder = tmp_path_factory.mktemp("on_nf4")
    base = save_quantised(save_plain(folder / "plain"), folder / "base", "nf4")
    save_adapted(base, folder / "adapter")
    return folder


@pytest.mark.parametrize(
    ("onto", "said"),
    [
        ("original", "Onto the original weights; the adapter was trained on them quantised (bitsandbytes nf4)."),
        ("dequantised", "Onto the dequantised weights (bitsandbytes nf4)"),
        ("quantized", "Onto the quantised weights (bitsandbytes nf4), which were quantised again."),
    ],
)
def test_each_way_says_how_far_it_is_from_what_was_trained(on_nf4, tmp_path, capsys, onto, said):
    command = ["merge", str(on_nf4 / "adapter"), "--output", str(tmp_path / "merged"), "--onto", onto]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert said in printed
    assert "worst of 14 layers" in printed
    assert "Predictions after" in printed
    assert "model.layers." in printed
    assert ("It is quantised as its base is." in printed) is (onto == "quantized")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "Mean KL of its predictions from what was trained" in card
    assert str(on_nf4) not in card or onto == "original"
    assert main(["verify", str(on_nf4 / "adapter"), str(tmp_path / "merged"), "--bound", "9", "--kl-bound", "9"]) == 0


def test_the_bounds_and_the_short_way_reach_the_merge(on_nf4, tmp_path, capsys):
    command = ["merge", str(on_nf4 / "adapter"), "--output", str(tmp_path / "merged"), "--onto", "quantised"]
    assert main([*command, "--max-error", "0.01"]) == 1
    assert "--max-error" in capsys.readouterr().err
    assert main([*command, "--max-loss", "0.001"]) == 1
    assert "--max-loss" in capsys.readouterr().err
    assert main([*command, "--max-loss", "0.001", "--no-logits"]) == 0
    assert "Predictions" not in capsys.readouterr().out
    assert main([*command, "--overwrite", "--quantize", "nf4"]) == 2
    assert "quantised already" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--onto", "sideways"]) == 2
    assert "expected one of original, dequantised, quantised" in capsys.readouterr().err
