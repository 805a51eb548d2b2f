"""Scripts and notebooks of Unsloth's: the literal arguments of their calls, and what only a run would tell."""

import json

import pytest

from theodora.errors import ConfigError
from theodora.foreign import translate

SCRIPT = """
from unsloth import FastLanguageModel, is_bfloat16_supported
from unsloth.chat_templates import get_chat_template, standardize_sharegpt, train_on_responses_only
from datasets import load_dataset
from trl import SFTTrainer, SFTConfig

raise SystemExit("this must not run")
max_seq_length = 4096
dtype = None
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = "unsloth/Llama-3.2-1B-Instruct", max_seq_length = max_seq_length, dtype = dtype, load_in_4bit = True,
)
model = FastLanguageModel.get_peft_model(
    model, r = 32, target_modules = ["q_proj", "v_proj"], lora_alpha = 64, lora_dropout = 0, bias = "none",
    use_gradient_checkpointing = "unsloth", random_state = 3407, use_rslora = False, loftq_config = None,
)
tokenizer = get_chat_template(tokenizer, chat_template = "llama-3.1")
dataset = load_dataset("mlabonne/FineTome-100k", split = "train")
dataset = standardize_sharegpt(dataset)
dataset = dataset.map(lambda rows: rows, batched = True)
trainer = SFTTrainer(
    model = model, tokenizer = tokenizer, train_dataset = dataset, dataset_text_field = "text",
    max_seq_length = max_seq_length, packing = False,
    args = SFTConfig(
        per_device_train_batch_size = 2, gradient_accumulation_steps = 4, warmup_steps = 5, max_steps = 60,
        learning_rate = 2e-4, fp16 = not is_bfloat16_supported(), bf16 = is_bfloat16_supported(), logging_steps = 1,
        optim = "adamw_8bit", weight_decay = 0.01, lr_scheduler_type = "linear", seed = 3407, output_dir = "outputs",
        report_to = "none",
    ),
)
trainer = train_on_responses_only(trainer, instruction_part = "<user>", response_part = "<assistant>")
trainer.train()
model.save_pretrained("lora_model")
"""
LEAST = """
model, tokenizer = FastLanguageModel.from_pretrained("gpt2")
model = FastLanguageModel.get_peft_model(model)
dataset = load_dataset("json", data_files="rows.jsonl", split="train")
trainer = SFTTrainer(model, args=SFTConfig(), train_dataset=dataset)
"""
FIELDS = ("model_name", "max_seq_length", "load_in_4bit", "r", "target_modules", "lora_alpha", "lora_dropout", "bias")
FIELDS += ("use_gradient_checkpointing", "random_state", "use_rslora", "loftq_config", "dataset_text_field", "packing")
FIELDS += ("per_device_train_batch_size", "warmup_steps", "fp16", "bf16", "optim", "seed", "output_dir", "dtype")


def test_a_documented_script(translated, told):
    found = translated(SCRIPT, name="train.py", fields=FIELDS)
    assert found.tool == "Unsloth"
    assert found.options == {
        "model": "unsloth/Llama-3.2-1B-Instruct",
        "data": "mlabonne/FineTome-100k",
        "output": "outputs",
        "method": "lora",
        "rank": 32,
        "alpha": 64,
        "rslora": False,
        "dropout": 0,
        "targets": ["q_proj", "v_proj"],
        "held_out": 0,
        "train_on": "completion",
        "max_length": 4096,
        "packing": False,
        "num_train_epochs": 3.0,
        "max_steps": 60,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 5,
        "weight_decay": 0.01,
        "quantize": "nf4",
        "gradient_checkpointing": True,
        "seed": 3407,
        "logging_steps": 1,
        "report_to": [],
        "optim": "adamw_8bit",
    }
    assert told(found, "missing").keys() == {"get_chat_template", "map"}
    assert "main memory" in told(found, "differs")["use_gradient_checkpointing"]


def test_a_notebook_says_the_same(translated):
    lines = ["!pip install unsloth\n", "%%capture\n"]
    cells = [{"cell_type": "code", "source": lines[:1]}, {"cell_type": "code", "source": [*lines[1:], "junk )"]}]
    cells += [{"cell_type": "markdown", "source": ["# Words"]}, {"cell_type": "code", "source": SCRIPT}]
    found = translated(json.dumps({"cells": cells}), name="train.ipynb")
    assert found.options == translated(SCRIPT, name="train.py").options


def test_what_unsloth_does_by_default_is_written(translated, told):
    found = translated(LEAST, name="train.py")
    assert {name: found.options[name] for name in told(found, "default")} == {
        "quantize": "nf4",
        "max_length": 2048,
        "rank": 16,
        "alpha": 16.0,
        "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-5,
        "weight_decay": 0.01,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "train_on": "all",
        "held_out": 0,
        "output": "outputs",
    }
    assert found.options["data"] == "rows.jsonl"


@pytest.mark.parametrize(
    ("old", "new", "options"),
    [
        ("get_peft_model(model)", "get_peft_model(model, use_dora=True)", {"method": "dora"}),
        ('from_pretrained("gpt2")', 'from_pretrained("gpt2", load_in_8bit=True)', {"quantize": "int8"}),
        ("SFTConfig()", "SFTConfig(assistant_only_loss=True)", {"train_on": "completion"}),
        ("SFTTrainer(model, args=SFTConfig()", "DPOTrainer(model, args=DPOConfig(beta=0.2)", {"objective": "dpo"}),
        ("SFTConfig()", "TrainingArguments(num_train_epochs=1, adam_beta2=0.95)", {"adam_beta2": 0.95}),
        ('load_dataset("json", data_files="rows.jsonl"', 'load_dataset("owner/name", "en"', {"data": "owner/name:en"}),
        ("SFTConfig()", "SFTConfig(report_to='tensorboard')", {"report_to": ["tensorboard"]}),
    ],
)
def test_arguments_with_a_counterpart(old, new, options, translated):
    found = translated(LEAST.replace(old, new), name="train.py")
    assert {name: found.options[name] for name in options} == options


@pytest.mark.parametrize(
    ("old", "new", "field", "words"),
    [
        ("SFTConfig()", "SFTConfig(learning_rate=rate())", "learning_rate", "known only when the script runs"),
        ("SFTConfig()", "SFTConfig(**options)", "**options", "known only when the script runs"),
        ("SFTConfig()", "SFTConfig(embedding_learning_rate=1e-5)", "embedding_learning_rate", "a rate of their own"),
        ("args=SFTConfig()", "args=SFTConfig(), formatting_func=f", "formatting_func", "known only when"),
        ("args=SFTConfig()", "args=SFTConfig(), eval_dataset=held", "eval_dataset", "write eval_data"),
        ("(model)\n", "(model, layers_to_transform=[0, 1])\n", "layers_to_transform", "expression"),
        ("(model)\n", "(model, odd=1)\n", "odd", "no field that is known"),
        ("(model)\n", "(model, 8)\n", "argument 2", "no field that is known"),
        (
            'load_dataset("json", data_files="rows.jsonl"',
            "load_dataset(NAME",
            "load_dataset (line 4)",
            "only when it runs",
        ),
        ('split="train"', 'split="train[:10]"', "load_dataset (line 4).split", "write these rows into a file"),
        ("dataset = load_dataset", "dataset = mine", "load_dataset", "no rows are loaded"),
    ],
)
def test_what_has_none_is_told(old, new, field, words, translated, told):
    found = translated(LEAST.replace(old, new), name="train.py")
    assert words in told(found, "missing")[field]


def test_a_name_that_changes_is_not_taken_for_a_constant(translated, told):
    found = translated("n = 8\nif big: n = 64\n" + LEAST.replace("(model)\n", "(model, r=n)\n"), name="train.py")
    assert "r" in told(found, "missing")
    assert found.options["rank"] == 16


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (LEAST + LEAST, "there are 2 calls of from_pretrained, in lines 2, 7"),
        (LEAST.replace("get_peft_model", "prepare"), "calls no get_peft_model"),
        (LEAST.replace("SFTConfig", "GRPOConfig"), "calls GRPOConfig"),
        ("import torch\nmodel = AutoModel.from_pretrained('gpt2')", "no script of Unsloth's"),
        ("def broken(:", "no Python that can be read"),
    ],
)
def test_what_is_ambiguous_or_something_else_is_refused(script, words, translated):
    with pytest.raises(ConfigError) as error:
        translated(script, name="train.py")
    assert words in str(error.value)


def test_nothing_is_run(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + LEAST.replace("SFTConfig()", "SFTConfig(seed=1 .real)"))
    translate(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("adapts", ["model = FastLanguageModel.get_peft_model(model, r=8)\n", ""])
def test_all_weights(adapts, translated, told):
    script = LEAST.replace('("gpt2")', '("gpt2", full_finetuning=True, load_in_4bit=True)')
    found = translated(script.replace("model = FastLanguageModel.get_peft_model(model)\n", adapts), name="train.py")
    assert found.options["method"] == "full"
    assert not {"rank", "targets", "quantize"} & found.options.keys()
    assert "full_finetuning" in told(found, "held")["load_in_4bit"]
    assert ("get_peft_model.r" in told(found, "held")) == bool(adapts)
