"""Reward models: their loss is TRL's, what is saved scores alike wherever it is loaded, and runs go on with the same bits."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from theodora import AdapterConfig, CheckpointError, ConfigError, DataError, inject_adapter, load_adapter
from theodora.adapters.models import load_model
from theodora.adapters.scoring import new_heads, padded, scores, set_padding
from theodora.adapters.state import trained_tensors
from theodora.data import load_examples, tokenize_preferences
from theodora.data.sequences import parted
from theodora.train import trainer_passes


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(**more):
    return [
        {
            "prompt": f"{a} + {b} =",
            "chosen": f" {a + b}" + "." * (a % 3),
            "rejected": f" {a * b + 1}" + "!" * (b % 4),
            **{name: value(a, b) for name, value in more.items()},
        }
        for a in range(8)
        for b in range(4)
    ]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    return written(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows_of())


@pytest.fixture(scope="session")
def ranked(tmp_path_factory):
    rows = rows_of(margin=lambda a, b: (a - b) / 4)
    return written(tmp_path_factory.mktemp("data") / "ranked.jsonl", rows)


@pytest.fixture
def learn(run, pairs):
    """A short run that trains a reward model with these options."""
    return lambda **others: run(**{"data": pairs, "objective": "reward", "held_out": 4, **others})


@pytest.fixture
def scorer(whole, pairs):
    """The folder of a DoRA reward adapter, whose magnitudes have moved."""
    return whole(data=pairs, objective="reward", held_out=4)


def lines(folder, name):
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in found if name in line]


def answers(folder, data):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = tokenize_preferences(load_examples(data, kind="pairs"), tokenizer, max_length=64)
    return [sequence["input_ids"] for row in rows.select(range(6)) for sequence in parted(row)]


def test_pairs_are_learned(learn, tmp_path):
    result = learn(max_steps=12, eval_steps=12)
    assert result.eval_loss < 0.5 < result.eval_loss_before
    for name in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
        before, after = result.figures[name]
        assert [before, after] == lines(tmp_path / "run", f"eval_{name}")
    assert result.figures["min_reward"][1] < result.figures["mean_reward"][1] < result.figures["max_reward"][1]
    assert result.figures["accuracy"][1] > 0.7
    assert result.moved["weight"] == (1, 1)  # the head
    assert result.samples[0].before != result.samples[0].after
    assert result.samples[0].after.startswith("better ")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_loss_and_gradients_are_those_of_trls_trainer(family, method, learn, ranked, tiny_model_dir, tmp_path):
    model, common = str(tiny_model_dir(family)), {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1}
    common |= {"learning_rate": 0.5, "per_device_train_batch_size": 32, "center_rewards_coefficient": 0.3}
    ours = learn(model=model, method=method, data=ranked, held_out=0, bf16=False, **common)
    theirs = load_model(model, dtype="float32", scores=True)
    torch.manual_seed(0)
    new_heads(theirs)
    set_padding(theirs, tokenizer := AutoTokenizer.from_pretrained(model))
    torch.manual_seed(0)
    inject_adapter(theirs, AdapterConfig(method=method))
    rows = tokenize_preferences(load_examples(ranked, kind="ranked"), tokenizer, max_length=1024)
    data = [
        {"chosen_ids": one["input_ids"], "rejected_ids": other["input_ids"], "margin": row["margin"]}
        for row in rows
        for one, other in [parted(row)]
    ]
    still = {"bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    still |= {"gradient_checkpointing": False, "dataloader_pin_memory": False}
    arguments = RewardConfig(str(tmp_path / "trl"), **still, **common)
    trainer = RewardTrainer(theirs, arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
    trainer.train()
    log = trainer.state.log_history[0]
    for name in ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
        assert lines(tmp_path / "run", name)[0] == pytest.approx(log[name], rel=1e-4, abs=1e-6), name
    mine, other = trained_tensors(ours.model), trained_tensors(theirs)
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-6, msg=name)
