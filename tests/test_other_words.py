"""Recipes of other tools: every option that we call otherwise is told at once, with the line to write."""

from dataclasses import fields

import pytest
import yaml
from trl import SFTConfig

from theodora import AdapterConfig, TrainConfig
from theodora.cli.main import main
from theodora.config import OPTION_NAMES
from theodora.errors import ConfigError
from theodora.other_words import NAMES, advice, called

RECIPES = {
    "axolotl": (
        """
base_model: NousResearch/Llama-3.2-1B
load_in_4bit: true
adapter: qlora
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
dataset_prepared_path: last_run_prepared
val_set_size: 0.05
output_dir: ./outputs
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
micro_batch_size: 2
num_epochs: 3
optimizer: paged_adamw_8bit
lr_scheduler: cosine
bf16: auto
flash_attention: true
train_on_inputs: false
wandb_project: mine
""",
        [
            "base_model: it is called model here: write model: NousResearch/Llama-3.2-1B",
            "load_in_4bit: write quantize: nf4",
            "adapter: write method: lora (or dora) and quantize: nf4",
            "datasets: it is called data here: write data: mhenrichsen/alpaca_2k_test",
            "val_set_size: it is called held_out here: write held_out: 0.05",
            "sequence_len: it is called max_length here: write max_length: 2048",
            "sample_packing: it is called packing here: write packing: true",
            "lora_r: it is called rank here: write rank: 32",
            "micro_batch_size: it is called per_device_train_batch_size here",
            "optimizer: it is called optim here: write optim: paged_adamw_8bit",
            "train_on_inputs: write train_on: completion",
            "wandb_project: pass --report-to wandb",
        ],
    ),
    "llama-factory": (
        """
model_name_or_path: Qwen/Qwen2.5-0.5B
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: qwen
cutoff_len: 2048
output_dir: saves
overwrite_output_dir: true
val_size: 0.1
adapter_name_or_path: saves/first
""",
        [
            "model_name_or_path: it is called model here",
            "finetuning_type: write method: lora",
            "lora_target: write targets: all-linear",
            "dataset: it is called data here",
            "template: leave it out; the tokenizer's own template is used",
            "cutoff_len: it is called max_length here: write max_length: 2048",
            "overwrite_output_dir: it is called overwrite here: write overwrite: true",
            "adapter_name_or_path: it is called from_adapter here: write from_adapter: saves/first",
        ],
    ),
    "torchtune": (
        """
model:
  _component_: torchtune.models.llama3.lora_llama3_8b
  lora_rank: 8
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
checkpointer:
  checkpoint_dir: /tmp/Meta-Llama-3-8B
dataset:
  _component_: torchtune.datasets.alpaca_dataset
  source: tatsu-lab/alpaca
epochs: 1
batch_size: 2
enable_activation_checkpointing: true
""",
        [
            "model: write model: FOLDER (or a hub name)",
            "checkpointer: write model: FOLDER",
            "dataset: it is called data here: write data: tatsu-lab/alpaca",
            "epochs: it is called num_train_epochs here: write num_train_epochs: 1",
            "output is missing",
        ],
    ),
    "ms-swift": (
        "model: m\ntrain_type: lora\ndataset: [a.jsonl, b.jsonl]\ntorch_dtype: bfloat16\n"
        "target_modules: [all-linear]\n",
        [
            "dataset: it is called data here: write data: a.jsonl, one file of all",
            "torch_dtype: write bf16: true or false",
            "target_modules: write targets: all-linear",
            "output is missing",
        ],
    ),
    "mlx-lm": (
        "model: m\ndata: d\nfine_tune_type: dora\niters: 100\nadapter_path: out\nmask_prompt: true\n",
        ["fine_tune_type: write method: dora", "iters: it is called max_steps here", "train_on: completion"],
    ),
}


@pytest.mark.parametrize("tool", RECIPES)
def test_a_recipe_of_another_tool_is_told_as_a_whole(tool, tmp_path, capsys):
    recipe, lines = RECIPES[tool]
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    for line in lines:
        assert " ".join(line.split()) in said
    given = yaml.safe_load(recipe)
    assert not {"model", "model_name_or_path", "base_model"} & given.keys() or "model is missing" not in said
    assert not {"data", "dataset", "datasets"} & given.keys() or "data is missing" not in said


def test_what_was_told_works():
    config = TrainConfig.from_options(
        {"model": "m", "data": "d", "output_dir": "o", "rank": 32, "bf16": "auto", "targets": "q_proj, v_proj"}
    )
    assert (config.output, config.bf16, config.adapter.targets) == ("o", None, ("q_proj", "v_proj"))


def test_no_name_of_ours_or_of_trls_is_taken_for_another_tools():
    known = OPTION_NAMES | {f.name for f in fields(SFTConfig)}
    assert not [name for name in known if advice(name, None) is not None and name != "model"]
    assert not [ours for ours in NAMES.values() if ours not in known | {"eval_strategy"}]
    assert called("use_dora") == "method"
    assert called("rank") is None


@pytest.mark.parametrize("text", ["q_proj,v_proj", "q_proj, v_proj", ("q_proj,", "v_proj"), ("q_proj", "v_proj")])
def test_names_with_commas_are_names(text):
    assert AdapterConfig(targets=text).targets == ("q_proj", "v_proj")
    assert AdapterConfig(modules_to_save=text).modules_to_save == ("q_proj", "v_proj")


@pytest.mark.parametrize("expression", [r".*\.(q|v)_proj", r"layers\.\d{1,2}\.q_proj", r".*(q_proj,)?.*"])
def test_expressions_stay_expressions(expression):
    assert AdapterConfig(targets=expression).targets == expression


def test_several_reporters_with_commas():
    assert TrainConfig(model="m", data="d", output="o", report_to="wandb,tensorboard").report_to == (
        "wandb",
        "tensorboard",
    )


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"optim": "paged_adamw_8bit"}, "optim is paged_adamw_8bit.*not installed.*bitsandbytes"),
        ({"use_liger_kernel": True}, "use_liger_kernel is on, and this run is on a CPU"),
        ({"activation_offloading": True}, "activation_offloading is on, and this run is on a CPU"),
    ],
)
def test_what_this_machine_cannot_do_is_said_before_anything_is_loaded(option, said, tmp_path):
    import importlib.util

    from theodora import train

    if "optim" in option and importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    config = TrainConfig(
        model="./nowhere", data="nothing.jsonl", output=str(tmp_path / "o"), trainer={"use_cpu": True, **option}
    )
    with pytest.raises(ConfigError, match=said):
        train(config)
