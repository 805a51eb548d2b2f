"""Axolotl's YAML: what becomes of each field."""

import pytest
import yaml

from theodora.errors import ConfigError

QLORA = """
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
dataset_prepared_path: last_run_prepared
val_set_size: 0.05
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj, up_proj]
wandb_project: mine
wandb_entity:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 2
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens: {pad_token: "<|end|>", eos_token: "</s>", bos_token: "<s>"}
lora_mlp_kernel: true
loraplus_lr_ratio: 16
of_tomorrow: 3
"""
LEAST = """
base_model: gpt2
adapter: lora
lora_r: 8
lora_target_linear: true
datasets: [{path: rows.jsonl, type: chat_template}]
learning_rate: 0.0002
"""


def test_a_documented_recipe(translated, told):
    found = translated(QLORA, fields=yaml.safe_load(QLORA))
    assert found.tool == "Axolotl"
    assert found.options == {
        "model": "NousResearch/Llama-3.2-1B",
        "data": "mhenrichsen/alpaca_2k_test",
        "output": "./outputs/qlora-out",
        "method": "lora",
        "quantize": "nf4",
        "rank": 32,
        "alpha": 16,
        "dropout": 0.05,
        "targets": ["gate_proj", "down_proj", "up_proj"],
        "held_out": 0.05,
        "max_length": 2048,
        "packing": True,
        "eval_packing": True,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "optim": "paged_adamw_32bit",
        "lr_scheduler_type": "cosine",
        "learning_rate": 0.0002,
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "warmup_steps": 10,
        "eval_steps": 0.125,
        "save_steps": 0.5,
        "weight_decay": 0.0,
        "eos_token": "</s>",
    }
    assert told(found, "missing").keys() == {"special_tokens.bos_token", "loraplus_lr_ratio", "of_tomorrow"}
    assert "WANDB_PROJECT=mine --report-to wandb" in told(found, "flag")["wandb_project"]
    assert "Alpaca's prompt" in told(found, "differs")["datasets.type"]
    assert told(found, "unset").keys() == {"lora_model_dir", "wandb_entity", "resume_from_checkpoint"}


def test_what_axolotl_does_by_default_is_written(translated, told):
    found = translated(LEAST)
    assert found.options["num_train_epochs"] == 1
    assert found.options["per_device_train_batch_size"] == 1
    assert found.options["max_length"] == 512
    assert found.options["held_out"] == 0
    assert found.options["output"] == "./model-out"
    assert told(found, "default").keys() >= {"num_train_epochs", "max_length", "held_out"}


@pytest.mark.parametrize(
    ("lines", "options"),
    [
        ("peft_use_dora: true", {"method": "dora"}),
        ("load_in_8bit: true", {"quantize": "int8"}),
        ("peft_use_rslora: true", {"rslora": True}),
        ("peft_init_lora_weights: pissa", {"init": "pissa"}),
        ("train_on_inputs: true", {"train_on": "all"}),
        ("rl: dpo\nrl_beta: 0.2", {"objective": "dpo", "beta": 0.2}),
        ("rl: simpo\nsimpo_gamma: 0.5", {"objective": "simpo", "simpo_gamma": 0.5}),
        ("rl: kto\nkto_desirable_weight: 0.5", {"objective": "kto", "desirable_weight": 0.5}),
        (
            "reward_model: true\nnum_labels: 1\ncenter_rewards_coefficient: 0.01",
            {"objective": "reward", "center_rewards_coefficient": 0.01},
        ),
        ("reward_model: false", {}),
        ("micro_batch_size: 4\nbatch_size: 12", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}),
        ("fsdp: [full_shard, auto_wrap, offload]", {"sharding": "fsdp2", "cpu_offload": True}),
        ("fsdp_version: 2\nfsdp_config: {offload_params: true, auto_wrap_policy: X}", {"cpu_offload": True}),
        ("warmup_ratio: 0.1", {"warmup_steps": 0.1}),
        ("group_by_length: true", {"train_sampling_strategy": "group_by_length"}),
        ("use_tensorboard: true", {"report_to": ["tensorboard"]}),
        ("auto_resume_from_checkpoints: true", {"resume": "auto"}),
        ("adam_beta2: 0.95", {"adam_beta2": 0.95}),
        ("noisy_embedding_alpha: 5", {"neftune_noise_alpha": 5}),
        ("evals_per_epoch: 1", {"eval_strategy": "epoch"}),
        ("saves_per_epoch: 0", {"save_strategy": "no"}),
        (
            "lr_scheduler: cosine\ncosine_min_lr_ratio: 0.1",
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        ),
        ("test_datasets: [{path: held.jsonl, type: chat_template, split: train}]", {"eval_data": "held.jsonl"}),
    ],
)
def test_fields_with_a_counterpart(lines, options, translated):
    found = translated(LEAST + lines, fields=yaml.safe_load(LEAST + lines))
    assert {name: found.options[name] for name in options} == options


@pytest.mark.parametrize(
    ("lines", "field", "words"),
    [
        ("optimizer: came_pytorch", "optimizer", "transformers does not have"),
        ("lr_scheduler: one_cycle", "lr_scheduler", "transformers does not have"),
        ("chat_template: llama3", "chat_template", "chat_template_path"),
        ("max_steps: 100\nevals_per_epoch: 4", "evals_per_epoch", "a number of steps"),
        ("plugins: [axolotl.integrations.spectrum.SpectrumPlugin]", "plugins", "runs Python"),
        ("learning_rate: fast", "learning_rate", "expected"),
        ("peft_layers_to_transform: [0, 1]", "peft_layers_to_transform", "expression"),
        ("sequence_parallel_degree: 4", "sequence_parallel_degree", "among GPUs"),
        ("trl: {use_vllm: true}", "trl.use_vllm", "no counterpart"),
    ],
)
def test_fields_without_one_say_what_they_would_have_meant(lines, field, words, translated, told):
    lines = "\n".join([line for line in LEAST.splitlines() if line.split(":")[0] not in lines] + [lines])
    found = translated(lines, fields=yaml.safe_load(lines))
    assert words in told(found, "missing")[field]


def test_every_kernel_and_plug_in_that_is_ours_by_itself(translated, told):
    lines = "plugins: [axolotl.integrations.liger.LigerPlugin]\nliger_rope: true\nlora_qkv_kernel: true\n"
    lines += "flash_attention: true"
    found = translated(LEAST + lines)
    assert told(found, "missing") == {}
    assert told(found, "held").keys() >= {"plugins", "liger_rope", "lora_qkv_kernel", "flash_attention"}


@pytest.mark.parametrize(
    ("data", "source", "missing"),
    [
        ("[{path: json, data_files: rows.json, ds_type: json, type: alpaca}]", "rows.json", set()),
        ("[{path: owner/name, name: en, type: completion}]", "owner/name:en", set()),
        ("[{path: owner/name, type: completion, field: body}]", "owner/name", {"datasets.field"}),
        ("[{path: owner/name, split: 'train[:1%]', type: alpaca}]", "owner/name", {"datasets.split"}),
        ("[{path: a.jsonl, type: input_output}]", "a.jsonl", {"datasets.type"}),
        (
            "[{path: a.jsonl, type: chat_template, field_messages: conversations, roles_to_train: [assistant], "
            "message_property_mappings: {role: from, content: value}, train_on_eos: turn, roles: {}}]",
            "a.jsonl",
            set(),
        ),
        ("[{path: a.jsonl, type: chat_template, field_messages: talk}]", "a.jsonl", {"datasets.field_messages"}),
        ("[{path: a.jsonl, type: chat_template, roles_to_train: [user]}]", "a.jsonl", {"datasets.roles_to_train"}),
        ("[{path: a.jsonl, type: chat_template, shards: 4, odd: 1}]", "a.jsonl", {"datasets.shards", "datasets.odd"}),
        (
            "[{path: a.jsonl, type: {field_instruction: instruction, field_output: reply, format: '{instruction}'}}]",
            "a.jsonl",
            {"datasets.type.field_output", "datasets.type.format"},
        ),
        ("[{path: a.jsonl, type: alpaca}, {path: b.jsonl, type: alpaca}]", "all-rows.jsonl", {"datasets"}),
    ],
)
def test_data_sets(data, source, missing, translated, told):
    text = LEAST.replace("[{path: rows.jsonl, type: chat_template}]", data)
    found = translated(text)
    assert found.options["data"] == source
    assert told(found, "missing").keys() == missing


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("adapter: lora", "adapter: llama-adapter", "another kind of adapter"),
        ("lora_target_linear: true", "", "lora_target_modules"),
        ("lora_r: 8", "lora_r: 8\nload_in_4bit: true\nload_in_8bit: true", "both on"),
        ("lora_r: 8", "lora_r: 8\nwarmup_steps: 10\nwarmup_ratio: 0.1", "warmup_ratio for 0.1"),
        ("lora_r: 8", "lora_r: 8\nrl: grpo", "rl is 'grpo'"),
        ("path: rows.jsonl", "source: rows.jsonl", "has no path"),
    ],
)
def test_what_cannot_be_trained_is_refused(old, new, words, translated):
    with pytest.raises(ConfigError, match="cannot be translated") as error:
        translated(LEAST.replace(old, new))
    assert words in str(error.value)


@pytest.mark.parametrize("adapter", ["", "adapter:"])
def test_without_an_adapter_all_weights_are_trained(adapter, translated, told):
    found = translated(LEAST.replace("adapter: lora", adapter), fields=("lora_r", "lora_target_linear"))
    assert found.options["method"] == "full"
    assert not {"rank", "targets"} & found.options.keys()
    assert "of adapters" in told(found, "held")["lora_r"]
