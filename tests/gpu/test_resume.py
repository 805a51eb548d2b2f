"""A run that goes on on a GPU: the same bits as a whole one, where that is asked for."""

import json
import os
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from theodora import TrainConfig
from theodora.train import train
from tiny import tiny_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def run(tmp_path):
    """A model with attention's usual sizes, on rows of several of its kernels' blocks."""
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokenizer = tiny_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2, vocab_size=len(tokenizer)))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": f"{n} and {n * n}. " * 120} for n in range(48)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"model": str(tmp_path / "model"), "data": str(tmp_path / "data.jsonl"), "held_out": 0, "max_steps": 8}
    common |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 4}
    common |= {"max_length": 1024}

    def start(output, **others):
        options = common | {"output": str(tmp_path / output)} | others
        return train(TrainConfig.from_options(options), console=Console(quiet=True))

    return start


@pytest.fixture
def _as_before():
    environment = dict(os.environ)  # of which cuBLAS and flash attention read some
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_with_full_determinism_it_has_the_same_bits(method, packing, run, tmp_path):
    options = {"method": method, "packing": packing, "full_determinism": True}
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    run("whole", **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "checkpoint-8")
    run("parts", resume="auto", **options)
    run("again", **options)
    whole, *others = (load_file(tmp_path / each / name) for each in ("whole", "parts", "again"))
    assert all(torch.equal(whole[key], other[key]) for other in others for key in whole)
