"""Training on from an adapter: its base, method, rank and targets are its own; its optimizer stays behind."""

import json
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from rich.console import Console

from theodora import AdapterConfig, ConfigError, TrainConfig, inject_adapter, load_adapter, save_mlx, train
from theodora.adapters.models import load_model
from theodora.adapters.state import adapter_layers, trained_tensors
from theodora.cli.main import main
from theodora.files.adapter import read_adapter

QUIET = Console(quiet=True)


@pytest.fixture
def other(sums, tmp_path):
    """Other rows than those of the first run."""
    rows = [json.loads(line) for line in sums.read_text().splitlines()]
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps({**row, "completion": " none"}) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def first(run, tmp_path):
    """A finished run."""
    run(output=str(tmp_path / "first"), method="lora", rank=4, alpha=6, targets=["q_proj", "up_proj"], dropout=0.1)
    return tmp_path / "first"


def go_on(options, first, other, **more):
    given = {name: options[name] for name in options if name != "model"} | {"data": other, "from_adapter": str(first)}
    return train(TrainConfig.from_options(given | more), console=QUIET)


def tensors_of(folder, base):
    return on_cpu(load_adapter(load_model(base, dtype="float32"), folder))


def on_cpu(model):
    return {name: tensor.cpu() for name, tensor in trained_tensors(model).items()}


def test_what_the_adapter_is_goes_on_and_what_it_learned_stays(options, first, other, tmp_path):
    result = go_on(options, first, other, output=str(tmp_path / "second"), learning_rate=1e-6, max_steps=1)
    layers = adapter_layers(result.model)
    assert {path.rpartition(".")[2] for path in layers} == {"q_proj", "up_proj"}
    before = tensors_of(first, options["model"])
    for name, tensor in on_cpu(result.model).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-5)
    record = yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())
    assert record["from_adapter"] == str(first)
    assert record["model"] == options["model"]
    assert {name: record[name] for name in ("method", "rank", "alpha", "dropout", "targets")} == {
        "method": "lora",
        "rank": 4,
        "alpha": 6.0,
        "dropout": 0.1,
        "targets": ["q_proj", "up_proj"],
    }
    card = (tmp_path / "second" / "README.md").read_text()
    assert f"goes on from the adapter in {first}" in card
    assert read_adapter(tmp_path / "second").config.rank == 4


def test_it_learns_the_other_rows_and_resumes(options, first, other, tmp_path, losses):
    go_on(options, first, other, output=str(tmp_path / "whole"))
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (newest,) = (tmp_path / "cut" / "checkpoints").glob("checkpoint-4")
    shutil.rmtree(newest)
    again = yaml.safe_load((tmp_path / "cut" / "config.yaml").read_text())
    train(TrainConfig.from_options(again | {"output": str(tmp_path / "cut"), "resume": True}), console=QUIET)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    model = options["model"]
    for name, tensor in tensors_of(tmp_path / "cut", model).items():
        assert torch.equal(tensor, tensors_of(tmp_path / "whole", model)[name]), name


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"rank": 16}, "rank is 16; the adapter has 4"),
        ({"rank": 8}, "rank is 8; the adapter has 4"),  # the default, chosen
        ({"method": "dora"}, "method is 'dora'; the adapter has 'lora'"),
        ({"alpha": 1}, "alpha is 1.0; the adapter has 6.0"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"targets": ["q_proj"]}, "targets and exclude name 2 modules"),
        ({"targets": "all-linear"}, "targets and exclude name 14 modules"),
    ],
)
def test_options_that_say_otherwise_are_refused(more, said, options, first, other, tmp_path, capsys):
    given = {
        "data": other,
        "output": tmp_path / "second",
        "from_adapter": first,
        "bf16": "false",
        "max_steps": 1,
    } | more
    words: list[str] = []
    for name, value in given.items():
        words += ["--" + name.replace("_", "-"), *(value if isinstance(value, list) else [str(value)])]
    assert main(["train", *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_options_that_say_the_same_are_welcome(options, first, other, tmp_path):
    go_on(options, first, other, output=str(tmp_path / "s"), rank=4, targets=r".*\.(q_proj|up_proj)", max_steps=1)


def test_in_python_what_is_not_as_by_default_was_chosen(options, first, other, tmp_path):
    config = TrainConfig(
        data=other, output=str(tmp_path / "s"), from_adapter=str(first), adapter=AdapterConfig(rank=16), max_steps=1
    )
    with pytest.raises(ConfigError, match="rank is 16; the adapter has 4"):
        train(config, console=QUIET)


def test_adapters_of_peft_and_mlx_go_on_too(options, other, tmp_path):
    base = load_model(options["model"], dtype="float32")
    theirs = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules=["v_proj"], bias="none"))
    theirs.save_pretrained(tmp_path / "peft")
    go_on(options, tmp_path / "peft", other, output=str(tmp_path / "a"), max_steps=1)
    assert read_adapter(tmp_path / "a").config.rank == 3

    model = inject_adapter(load_model(options["model"], dtype="float32"), AdapterConfig(rank=2, targets=("q_proj",)))
    save_mlx(model, tmp_path / "mlx")
    go_on(options, tmp_path / "mlx", other, output=str(tmp_path / "b"), max_steps=1)
    assert read_adapter(tmp_path / "b").config.rank == 2


@pytest.mark.parametrize("config", [{"init": "pissa", "rank": 2}, {"modules_to_save": ["lm_head"], "rank": 2}])
def test_starts_and_modules_in_full_go_on(config, run, options, other, tmp_path):
    run(output=str(tmp_path / "first"), max_steps=2, **config)
    result = go_on(options, tmp_path / "first", other, output=str(tmp_path / "second"), learning_rate=1e-6, max_steps=1)
    before = tensors_of(tmp_path / "first", options["model"])
    for name, tensor in on_cpu(result.model).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-5)


def test_a_base_that_has_moved_is_named(options, first, other, tmp_path, capsys):
    folder = tmp_path / "first" / "adapter_config.json"
    fields = json.loads(folder.read_text())
    folder.write_text(json.dumps(fields | {"base_model_name_or_path": "/another/machine/base"}))
    with pytest.raises(Exception, match=r"/another/machine/base(.|\n)*--model"):
        go_on(options, first, other, output=str(tmp_path / "second"), max_steps=1)
    go_on(options, first, other, output=str(tmp_path / "second"), max_steps=1, model=options["model"])


def test_a_run_is_not_overwritten_by_one_that_goes_on_from_it(options, first, other):
    with pytest.raises(ConfigError, match="choose another output"):
        go_on(options, first, other, output=str(first), overwrite=True)
