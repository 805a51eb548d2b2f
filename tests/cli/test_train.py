"""`theodora train`: flag over file over default, every option reachable in every way, and the command as a process."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import dying
from crash.killing import fork_server
from theodora.cli import main as cli
from theodora.cli import train as command
from theodora.cli.arguments import field_docstrings
from theodora.config import OPTION_NAMES, AdapterConfig, TrainConfig
from theodora.errors import ConfigError

REQUIRED = ["--model", "m", "--data", "d", "--output", "o"]


def parse(*argv: str) -> TrainConfig:
    parser = cli.Parser(prog="theodora train")
    command.add_arguments(parser)
    args, args_others = parser.parse_known_args(argv)
    args.other_options = args_others
    return command.read_config(args)


def test_the_defaults_are_those_of_the_configuration():
    assert parse(*REQUIRED) == TrainConfig(model="m", data="d", output="o")


# Option -> what is typed, what the field then holds.
TYPED = {
    "model": ("m", "m"),
    "from_adapter": ("runs/first", "runs/first"),
    "data": ("d", "d"),
    "output": ("o", "o"),
    "method": ("lora", "lora"),
    "rank": ("4", 4),
    "alpha": ("3", 3.0),
    "rslora": (None, True),
    "dropout": ("0.1", 0.1),
    "targets": ("q_proj v_proj", ("q_proj", "v_proj")),
    "experts": ("true", True),
    "exclude": ("o_proj", ("o_proj",)),
    "rank_pattern": ("q_proj=2 v_proj=3", {"q_proj": 2, "v_proj": 3}),
    "alpha_pattern": ("q_proj=2.5", {"q_proj": 2.5}),
    "modules_to_save": ("lm_head", ("lm_head",)),
    "init": ("pissa", "pissa"),
    "adapter_dtype": ("base", "base"),
    "eval_data": ("e.jsonl", "e.jsonl"),
    "held_out": ("20", 20),
    "replay": ("g.jsonl", "g.jsonl"),
    "replay_share": ("0.2", 0.2),
    "general": ("g.jsonl", "g.jsonl"),
    "train_on": ("all", "all"),
    "use_chat_template": ("false", False),
    "resize_embeddings": (None, True),
    "trainable_token_indices": ("3 5", (3, 5)),
    "max_length": ("99", 99),
    "packing": (None, True),
    "num_train_epochs": ("1.5", 1.5),
    "max_steps": ("7", 7),
    "per_device_train_batch_size": ("2", 2),
    "gradient_accumulation_steps": ("3", 3),
    "learning_rate": ("1e-3", 1e-3),
    "lr_scheduler_type": ("linear", "linear"),
    "warmup_steps": ("0.5", 0.5),
    "weight_decay": ("0.01", 0.01),
    "max_grad_norm": ("2", 2.0),
    "bf16": ("true", True),
    "base_dtype": ("fp8", "fp8"),
    "quantize": ("none", "none"),
    "kernels": ("reference", "reference"),
    "gradient_checkpointing": (None, True),
    "seed": ("5", 5),
    "logging_steps": ("0.25", 0.25),
    "eval_steps": ("10", 10.0),
    "per_device_eval_batch_size": ("2", 2),
    "early_stopping_patience": ("3", 3),
    "save_steps": ("10", 10.0),
    "save_total_limit": ("4", 4),
    "report_to": ("tensorboard wandb", ("tensorboard", "wandb")),
    "resume": (None, True),
    "grace_period": ("5", 5.0),
    "sharding": ("fsdp2", "fsdp2"),
    "cpu_offload": (None, True),
    "objective": ("dpo", "dpo"),
    "reference": ("base --objective dpo", "base"),
    "reward": ("exact_match length:9 --objective grpo", ("exact_match", "length:9")),
    "reward_weights": ("1 0.5 --objective grpo --reward exact_match token_f1", (1.0, 0.5)),
    "push_to_hub": ("me/first", "me/first"),
    "reward_timeout": ("5", 5.0),
    "on_nan": ("skip", "skip"),
    "max_loss": ("9", 9.0),
    "overwrite": (None, True),
    "trust_remote_code": (None, True),
    "revision": ("main", "main"),
}


def test_every_option_stands_in_the_table_and_in_one_group_of_the_help():
    grouped = [name for _, names in command.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(OPTION_NAMES - {"trainer"}) == sorted(TYPED)


@pytest.mark.parametrize("name", TYPED)
def test_a_flag_reaches_its_field(name):
    typed, expected = TYPED[name]
    flag = ["--" + name.replace("_", "-"), *([] if typed is None else typed.split())]
    required = [word for pair in zip(REQUIRED[::2], REQUIRED[1::2], strict=True) if pair[0] != flag[0] for word in pair]
    config = parse(*required, *flag)
    holder = config.adapter if name in {f.name for f in fields(AdapterConfig)} else config
    assert getattr(holder, name) == expected


@pytest.mark.parametrize("config_class", [AdapterConfig, TrainConfig])
def test_every_field_has_a_docstring(config_class):
    assert set(field_docstrings(config_class)) == {f.name for f in fields(config_class)}


def test_flags_go_before_the_file_and_the_file_before_the_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    options = {"model": "m", "data": "d", "output": "o", "rank": 4, "learning-rate": "1e-3", "optim": "sgd"}
    file.write_text(yaml.safe_dump({**options, "trainer": {"neftune_noise_alpha": 5, "adam_beta1": 0.8}}))
    config = parse("--config", str(file), "--rank", "2", "--neftune_noise_alpha=7", "--adam-beta2", "0.9", "--tf32")
    assert (config.adapter.rank, config.learning_rate, config.seed) == (2, 1e-3, 0)
    assert config.trainer == {
        "optim": "sgd",
        "neftune_noise_alpha": "7",
        "adam_beta1": 0.8,
        "adam_beta2": "0.9",
        "tf32": True,
    }


def test_overwrite_on_the_command_line_beats_resume_in_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": "m", "data": "d", "output": "o", "resume": "auto"}))
    config = parse("--config", str(file), "--overwrite")
    assert config.overwrite
    assert config.resume is None


def test_all_misses_are_named_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        parse("--model", "m", "--rank", "many", "--learning-rate", "fast", "--packing", "perhaps")
    for part in ("data is missing", "output is missing", "rank is 'many'", "learning_rate is 'fast'", "'perhaps'"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds list"),
        ("a: [\n", "no valid YAML"),
        (None, "No such file"),
        ("3: a\n", "the name 3 is no text"),
        ("max-steps: 1\nmax_steps: 2\n", "gives max_steps twice, once with - and once with _"),
        ("rank: 1\nlr: 2\nrank: 3\n", "has the key 'rank' twice in the mapping that begins in line 1"),
        ("[" * 3000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_configuration(text, message, tmp_path):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse("--config", str(file))


def test_an_argument_that_belongs_to_no_flag():
    with pytest.raises(ConfigError, match=r"unexpected argument 'rows.jsonl'. See theodora train --help"):
        parse("rows.jsonl", *REQUIRED)


RECIPES = [p for p in (Path(__file__).parents[2] / "recipes").glob("*.yaml") if not p.name.startswith("study")]


@pytest.mark.parametrize("recipe", sorted(RECIPES), ids=lambda p: p.name)
def test_recipes_are_configurations_that_trl_takes(recipe, tmp_path):
    from theodora.train.arguments import sft_arguments

    text = recipe.read_text()
    assert f"theodora train --config recipes/{recipe.name}" in text
    config = parse("--config", str(recipe), "--model", "m", "--data", "d", "--output", str(tmp_path), "--use-cpu")
    sft_arguments(config, tmp_path)


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}!"}) + "\n" for n in range(40)))
    return path


def test_the_command_trains_and_the_recorded_configuration_trains_again(rows, tiny_model_dir, tmp_path):
    output = tmp_path / "run"
    model = str(tiny_model_dir())
    argv = [
        "train",
        "--model",
        model,
        "--data",
        str(rows),
        "--output",
        str(output),
        "--max_steps",
        "3",
        "--optim",
        "sgd",
    ]
    assert cli.main(argv) == 0
    first = load_file(output / "adapter_model.safetensors")
    assert cli.main(argv) == 2
    words = ["train", "--config", str(output / "config.yaml"), "--overwrite"]
    ended = subprocess.run([sys.executable, "-m", "theodora", *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert "step 3/3" in ended.stdout
    assert f"theodora merge {output}" in ended.stdout.replace("\n", " ")
    again = load_file(output / "adapter_model.safetensors")
    assert all(torch.equal(first[key], again[key]) for key in again)


def test_ctrl_c_exits_with_130_and_the_command_it_names_resumes(rows, tiny_model_dir, tmp_path):
    output = tmp_path / "run"
    model = str(tiny_model_dir())
    argv = ["train", "--model", model, "--data", str(rows), "--output", str(output), "--max-steps", "3000"]
    words, errors = [*argv, "--held-out", "0", "--save-steps", "3000"], tmp_path / "errors.txt"
    process = fork_server().Process(target=dying.command, args=(words, errors))
    process.start()
    metrics = output / "metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    err = errors.read_text()
    assert process.exitcode == 130, err
    named = next(line.split() for line in err.splitlines() if "theodora train" in line)
    done = len(metrics.read_text().splitlines()) - 1  # the last line sums up
    assert cli.main([*named[1:], "--max-steps", str(done + 2)]) == 0
    steps = [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]
    assert steps == list(range(1, done + 3))


def test_bad_input_exits_with_its_code_and_one_message(rows, tiny_model_dir, tmp_path, capsys):
    model = str(tiny_model_dir())
    common = ["train", "--data", str(rows), "--output", str(tmp_path / "run"), "--model"]
    assert cli.main([*common, model, "--targets", "q_prj"]) == 2
    assert "q_proj" in capsys.readouterr().err
    assert cli.main([*common, "./nowhere"]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt":\n')
    assert cli.main([*common, model]) == 1
    assert "line 2" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_result_as_json_stands_alone_on_standard_output(rows, tiny_model_dir, tmp_path, capsys):
    rows.write_text("".join(json.dumps({"text": f"text {n}", "id": n or None}) + "\n" for n in range(4)))
    model, output = str(tiny_model_dir()), str(tmp_path / "run")
    assert (
        cli.main(["train", "--model", model, "--data", str(rows), "--output", output, "--max-steps", "1", "--json"])
        == 0
    )
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert (result["output"], result["steps"]) == (output, 1)
    assert result["left_out"] == [{"what": "the column 'id'", "rows": 3, "why": "not used"}]
    assert "Left out       the column 'id': not used (3 rows)" in printed.err
