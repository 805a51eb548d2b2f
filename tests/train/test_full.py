"""Full fine-tuning as a run: a plain model folder comes out, guarded and resumed as an adapter's is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaModel

from theodora.config import AdapterConfig, TrainConfig
from theodora.errors import CheckpointError, ConfigError
from theodora.files.model_folder import read_headers
from theodora.train import run as run_module

FULL = {"method": "full", "learning_rate": 1e-3}


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_a_run_leaves_a_plain_model_and_its_record(run, options, tmp_path, losses):
    result = run(**FULL, save_steps=2)
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md"}
    assert names >= {"metrics.jsonl", "loss.png", "config.yaml", "checkpoints", "held_out.jsonl"}
    assert not [name for name in names if name.startswith(("adapter", "."))]
    assert result.trainable_parameters == result.total_parameters == sum(p.numel() for p in result.model.parameters())
    assert result.eval_loss < result.eval_loss_before
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    ids = torch.arange(3, 40)[None]
    assert torch.equal(loaded(ids).logits, result.model.cpu()(ids).logits)
    base = weights(Path(options["model"]))
    assert all(not torch.equal(tensor, base[key]) for key, tensor in weights(folder).items())
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "adapter" not in card.lower().replace("load_adapter", "")
    record = yaml.safe_load((folder / "config.yaml").read_text())
    assert record["method"] == "full"
    assert not record.keys() & {"rank", "alpha", "targets"}
    assert TrainConfig.from_options(record).trains_all


@pytest.mark.parametrize("how", [{}, {"objective": "orpo"}], ids=["sft", "orpo"])
def test_a_run_goes_on_with_the_same_bits(how, run, tmp_path, losses, pairs):
    data = {"data": str(pairs)} if how else {}
    settings = FULL | how | data | {"max_steps": 6, "save_steps": 3, "gradient_accumulation_steps": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(output=str(whole), **settings)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "checkpoint-6")
    run(output=str(parts), resume="auto", **settings)
    assert losses(parts) == losses(whole)
    assert losses(parts, "eval_loss") == losses(whole, "eval_loss")
    one, other = weights(whole), weights(parts)
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{a} + {a} =", "chosen": f" {2 * a}", "rejected": f" {a}"} for a in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_weights_are_trained_wide_and_saved_as_the_base_is(run, tiny_model_dir, tmp_path):
    base = str(tiny_model_dir(dtype=torch.bfloat16))
    result = run(model=base, **FULL, bf16=True, save_steps=4)
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    folder = tmp_path / "run"
    assert {tensor.dtype for tensor in read_headers(folder).values()} == {"BF16"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((folder / "config.json").read_text()).get("use_cache", True)
    checkpoint = weights(folder / "checkpoints" / "checkpoint-4")
    own = result.model.state_dict()
    assert all(torch.equal(checkpoint[key], own[key]) for key in checkpoint)
    assert all(torch.equal(tensor, own[key].bfloat16()) for key, tensor in weights(folder).items())


@pytest.mark.parametrize("packing", [False, True])
def test_short_rows_of_many_lengths_wait_for_no_plan_of_cudnns(packing, run, monkeypatch):
    allowed = set()
    forward = LlamaModel.forward

    def noting(self, *args, **kwargs):
        if self.training:
            allowed.add(torch.backends.cuda.cudnn_sdp_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", noting)
    run(**FULL, packing=packing, max_steps=2)
    assert allowed == {packing and torch.backends.cuda.cudnn_sdp_enabled()}


@pytest.mark.parametrize(
    ("others", "word"),
    [
        ({"rank": 8}, "rank belongs to an adapter"),
        ({"targets": ["q_proj"], "alpha": 16}, "targets belongs to an adapter"),
        ({"adapter_dtype": "bfloat16"}, "adapter_dtype belongs to an adapter"),
        ({"from_adapter": "runs/first"}, "merge the adapter"),
        ({"quantize": "nf4"}, "quantize is nf4"),
        ({"base_dtype": "fp8"}, "base_dtype is fp8"),
        ({"objective": "dpo"}, "second model"),
        ({"sharding": "fsdp2"}, "sharding is fsdp2"),
    ],
)
def test_what_belongs_to_an_adapter_is_refused(others, word, run, tmp_path):
    with pytest.raises(ConfigError, match=word):
        run(method="full", **others)
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_no_method_full(tiny_model):
    from theodora import inject_adapter

    with pytest.raises(ConfigError, match="no rank, targets"):
        AdapterConfig(method="full", rank=4, targets=("q_proj",))
    with pytest.raises(ConfigError, match="no adapter"):
        inject_adapter(tiny_model(), AdapterConfig(method="full"))


def test_its_learning_rate_is_lower_by_default():
    needed = {"model": "m", "data": "d", "output": "o", "method": "full"}
    assert TrainConfig.from_options(needed).learning_rate == pytest.approx(2e-5)
    assert TrainConfig.from_options(needed | {"objective": "orpo"}).learning_rate == pytest.approx(2e-6)


def test_no_room_for_checkpoints_is_said_before_the_first_step(run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run_module.checkpoints.shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(CheckpointError, match="MB free"):
        run(**FULL)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_model_that_stands_there_is_nobodys_to_write_over(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        run(**FULL, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == b"mine"


def test_an_adapter_takes_the_place_of_a_model_whole(run, tmp_path):
    run(**FULL)
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match="already holds a run"):
        run()
    run(overwrite=True)
    names = {path.name for path in folder.iterdir()}
    assert "adapter_model.safetensors" in names
    assert not names & {"model.safetensors", "config.json"}


def test_a_damaged_checkpoint_is_passed_over(run, tmp_path):
    settings = FULL | {"max_steps": 4, "save_steps": 2}
    run(**settings)
    newest = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    (newest / "model.safetensors").unlink()
    result = run(**settings, resume="auto")
    assert result.steps == 4
    assert (newest / "model.safetensors").is_file()
