"""LLaMA-Factory's YAML and JSON, and the dataset_info.json beside it."""

import json

import pytest
import yaml

from theodora.errors import ConfigError

SFT = """
### model
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: all
### dataset
dataset: alpaca_en_demo
template: qwen
cutoff_len: 1024
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 0
### output
output_dir: saves/qwen/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: false
ddp_timeout: 180000000
resume_from_checkpoint: null
### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""
LEAST = "model_name_or_path: gpt2\nstage: sft\ndataset: rows\ntemplate: default\n"


@pytest.fixture
def info(tmp_path, monkeypatch):
    """Write data/dataset_info.json beside the recipe."""
    monkeypatch.chdir(tmp_path)

    def write(**entries):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(entries))

    return write


def test_a_documented_recipe(translated, told, info):
    info(alpaca_en_demo={"file_name": "alpaca_en_demo.json"})
    found = translated(SFT, fields=yaml.safe_load(SFT))
    assert found.tool == "LLaMA-Factory"
    assert found.options == {
        "model": "Qwen/Qwen2.5-0.5B-Instruct",
        "data": "data/alpaca_en_demo.json",
        "output": "saves/qwen/lora/sft",
        "method": "lora",
        "rank": 16,
        "targets": "all-linear",
        "held_out": 0.1,
        "max_length": 1024,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "bf16": False,
        "logging_steps": 10,
        "eval_steps": 500,
        "per_device_eval_batch_size": 1,
        "save_steps": 500,
        "report_to": [],
        "dataloader_num_workers": 0,
        "ddp_timeout": 180000000,
        "eval_strategy": "steps",
    }
    assert told(found, "missing").keys() == {"template", "max_samples"}
    assert told(found, "flag").keys() == {"trust_remote_code"}
    assert told(found, "default") == {}


def test_json_says_the_same(translated, info):
    info(alpaca_en_demo={"file_name": "alpaca_en_demo.json"})
    found = translated(json.dumps(yaml.safe_load(SFT)), name="train.json")
    assert found.options == translated(SFT).options


def test_what_it_does_by_default_is_written(translated, told):
    found = translated(LEAST)
    written = {name: found.options[name] for name in told(found, "default")}
    assert written == {
        "method": "lora",
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.0,
        "max_length": 2048,
        "held_out": 0,
        "output": "saves",
    }


@pytest.mark.parametrize(
    ("lines", "options"),
    [
        ("use_dora: true", {"method": "dora"}),
        ("quantization_bit: 4\nquantization_method: bnb", {"quantize": "nf4"}),
        ("quantization_bit: 8", {"quantize": "int8"}),
        ("lora_target: q_proj,v_proj", {"targets": ["q_proj", "v_proj"]}),
        ("additional_target: embed_tokens,lm_head", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("train_on_prompt: true", {"train_on": "all"}),
        ("neat_packing: true", {"packing": True}),
        ("pissa_init: true\npissa_iter: -1", {"init": "pissa"}),
        ("resize_vocab: true", {"resize_embeddings": True}),
        ("adapter_name_or_path: saves/first", {"from_adapter": "saves/first"}),
        ("neftune_noise_alpha: 5", {"neftune_noise_alpha": 5}),
        ("disable_gradient_checkpointing: true", {"gradient_checkpointing": False}),
        ("early_stopping_steps: 3\nval_size: 0.1", {"early_stopping_patience": 3}),
        ("eval_dataset: held", {"eval_data": "data/held.json"}),
    ],
)
def test_fields_with_a_counterpart(lines, options, translated):
    found = translated(LEAST + lines, fields=yaml.safe_load(LEAST + lines))
    assert {name: found.options[name] for name in options} == options


@pytest.mark.parametrize(
    ("lines", "options"),
    [
        ("stage: pt", {"train_on": "all", "packing": True}),
        ("stage: dpo", {"objective": "dpo", "beta": 0.1}),
        ("stage: dpo\npref_beta: 0.3\npref_loss: hinge", {"objective": "dpo", "beta": 0.3, "loss_type": ["hinge"]}),
        ("stage: dpo\npref_loss: orpo", {"objective": "orpo"}),
        ("stage: dpo\npref_loss: simpo\nsimpo_gamma: 0.5", {"objective": "simpo", "simpo_gamma": 0.5, "beta": 0.1}),
        ("stage: kto\nkto_chosen_weight: 2.0", {"objective": "kto", "desirable_weight": 2.0}),
        ("stage: rm", {"objective": "reward"}),
        ("stage: dpo\nref_model_adapters: runs/first", {"reference": "runs/first"}),
    ],
)
def test_stages(lines, options, translated):
    text = LEAST.replace("stage: sft", lines)
    found = translated(text, fields=yaml.safe_load(text))
    assert {name: found.options[name] for name in options} == options


def test_attention_across_packed_rows_is_otherwise_here(translated, told):
    assert "there it crosses them" in told(translated(LEAST + "packing: true"), "differs")["packing"]


def test_columns_and_tags_of_a_data_set(translated, told, info):
    good = {
        "file_name": "talks.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "system": "system"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    odd = {"hf_hub_url": "owner/name", "subset": "en", "columns": {"prompt": "ask"}, "num_samples": 5, "split": "test"}
    info(rows=good, odd=odd)
    assert told(translated(LEAST), "missing").keys() == {"template"}
    found = translated(LEAST.replace("rows", "odd"))
    assert found.options["data"] == "owner/name:en"
    told_of = told(found, "missing")
    assert "rename it to instruction" in told_of["dataset.odd.columns.prompt"]
    assert told_of.keys() == {
        "template",
        "dataset.odd.columns.prompt",
        "dataset.odd.num_samples",
        "dataset.odd.split",
    }


def test_a_data_set_that_is_not_found_is_named(translated, told, info):
    assert "no dataset_info.json was found" in told(translated(LEAST), "missing")["dataset.rows"]
    info(other={"file_name": "other.json"})
    assert "has no entry for it" in told(translated(LEAST), "missing")["dataset.rows"]


def test_several_data_sets_are_one_file_here(translated, told, info):
    info(a={"file_name": "a.json"}, b={"file_name": "b.json"})
    found = translated(LEAST.replace("rows", "a,b"))
    assert found.options["data"] == "all-rows.jsonl"
    assert "Write them into one file" in told(found, "missing")["dataset"]


def test_reports_that_leave_the_machine_are_flags(translated, told):
    found = translated(LEAST + "report_to: wandb")
    assert "--report-to wandb" in told(found, "flag")["report_to"]
    assert "report_to" not in found.options


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("stage: sft", "stage: sft\nfinetuning_type: freeze", "would train some weights of the model"),
        ("stage: sft", "stage: ppo", "stage is 'ppo'"),
        ("stage: sft", "stage: dpo\npref_loss: kto_pair", "pref_loss is 'kto_pair'"),
        ("dataset: rows\n", "", "dataset is missing"),
        ("stage: sft", "stage: sft\nadapter_name_or_path: a,b", "names 2 adapters"),
    ],
)
def test_what_cannot_be_trained_is_refused(old, new, words, translated):
    with pytest.raises(ConfigError, match="cannot be translated") as error:
        translated(LEAST.replace(old, new))
    assert words in str(error.value)


def test_all_weights(translated, told):
    full = "finetuning_type: full\nlora_rank: 8\nlora_target: all\nlearning_rate: 1.0e-5\n"
    found = translated(LEAST + full, fields=("finetuning_type", "lora_rank", "lora_target"))
    assert (found.options["method"], found.options["learning_rate"]) == ("full", 1e-5)
    assert not {"rank", "targets"} & found.options.keys()
    assert "of adapters" in told(found, "held")["lora_rank"]
