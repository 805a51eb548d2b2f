"""Training with adapters on fused experts, through everything a run does."""

import io
import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig

import tiny
import tiny_families
from several import Scenario, launch
from theodora import AdapterConfig, inject_adapter
from theodora.adapters.state import adapter_layers
from theodora.config import TrainConfig
from theodora.errors import ConfigError
from theodora.layers.experts import ExpertParameter
from theodora.train import beforehand, train
from theodora.train.expert_loads import ExpertLoad, ExpertLoads, described, expert_changes, has_collapsed, load_of
from theodora.train.processes import Processes
from theodora.train.sharding import why_not


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """The folder of a tiny model of a family."""
    made: dict[str, str] = {}

    def folder(name="qwen3_moe"):
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            tiny_families.tiny_family(name, tiny_families.families()[name]).save_pretrained(path)
            tiny.tiny_tokenizer().save_pretrained(path)
            made[name] = str(path)
        return made[name]

    return folder


@pytest.fixture
def options(options, moe):
    return options | {"model": moe(), "experts": True, "per_device_train_batch_size": 8}


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, other):
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key], msg=key)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_families_are_trained(family, run, moe, tmp_path):
    result = run(model=moe(family), max_steps=3)
    assert result.moved["lora_B"][0] == result.moved["lora_B"][1] > 0
    assert result.eval_loss < result.eval_loss_before
    assert [load.experts for load in result.experts] == [4] * (1 if family == "deepseek_v3" else 2)
    assert any(name.endswith("experts.lora_A.weight") for name in weights(tmp_path / "run"))


def test_what_is_trained_is_said_beforehand_and_seen_afterwards(options, tmp_path):
    out = io.StringIO()
    result = train(TrainConfig.from_options(options), console=Console(file=out, width=200))
    printed = out.getvalue()
    panel, rest = printed.split("step 0/", 1)
    # In each of 2 layers 4 experts of rank 8: A and B of both parameters, and m of each output row.
    numbers = 2 * 4 * (8 * (32 + 96) + 96 + 8 * (48 + 32) + 32)
    adapter = f"{4 * numbers / 1e3:.1f} kB"
    said = f"{numbers:,} of them in 4 experts each of 2 layers (gate_up_proj, down_proj)"
    assert f"{said}: {adapter} of A, B and m, {adapter} of gradients, " in panel
    assert f"{8 * numbers / 1e3:.1f} kB of the optimizer's" in panel
    (sentence,) = described(result.experts)
    assert sentence in rest
    assert "8 of 8 experts in 2 layers had tokens" in sentence
    card = (tmp_path / "run" / "README.md").read_text()
    assert "8 of 8 experts in 2 layers" in card
    first = result.experts[0]
    assert f"| model.layers.0.mlp.experts | 4 | 4 | {first.effective:.1f} | {first.busiest:.1%} | 0 |" in card
    assert json.loads(json.dumps(result.to_dict()))["experts"][0]["reached"] == 4


@pytest.mark.filterwarnings("default:.*stay frozen:UserWarning")
def test_without_the_flag_experts_stay_frozen_and_that_is_said(options):
    out = io.StringIO()
    with pytest.warns(UserWarning, match="4 weights of fused experts .* stay frozen"):
        result = train(TrainConfig.from_options(options | {"experts": None}), console=Console(file=out, width=200))
    assert result.experts == ()
    assert not any(isinstance(layer, ExpertParameter) for layer in adapter_layers(result.model).values())


def test_experts_that_quantising_leaves_as_they_are_are_named(options):
    console = Console(file=io.StringIO(), width=160)
    train(TrainConfig.from_options(options | {"quantize": "nf4", "max_steps": 1}), console=console)
    assert "weights of fused experts are not quantised: 0.0 GB of" in " ".join(console.file.getvalue().split())


def test_a_resumed_run_is_the_uninterrupted_one(run, options, tmp_path):
    run(max_steps=4, save_steps=2, output=str(tmp_path / "whole"))
    run(max_steps=4, save_steps=2, output=str(tmp_path / "again"))
    import shutil

    shutil.rmtree(tmp_path / "again" / "checkpoints" / "checkpoint-4")
    run(max_steps=4, save_steps=2, output=str(tmp_path / "again"), resume="auto")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "again")[name]), name


def test_recomputing_and_pieces_change_nothing(run, tmp_path, monkeypatch):
    of_rows = {"router_aux_loss_coef": 0.0}  # the balancing loss is one of a whole batch
    plain = run(output=str(tmp_path / "plain"), **of_rows)
    again = run(output=str(tmp_path / "again"), gradient_checkpointing=True, **of_rows)
    same(weights(tmp_path / "plain"), weights(tmp_path / "again"))
    for one, other in zip(plain.experts, again.experts, strict=True):
        assert one.effective == pytest.approx(other.effective)
        assert one.busiest == pytest.approx(other.busiest)
    passes = import_module("theodora.train.trainer_passes").PassOverrides
    one_pass, failed = passes.one_pass, []

    def fails_once(self, inputs, *args: Any, **kwargs: Any):
        if len(inputs["input_ids"]) == 8 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("too large")
        return one_pass(self, inputs, *args, **kwargs)

    monkeypatch.setattr(passes, "one_pass", fails_once)
    run(output=str(tmp_path / "pieces"), **of_rows)
    assert failed
    same(weights(tmp_path / "plain"), weights(tmp_path / "pieces"))


def test_going_on_from_an_adapter_on_experts(run, tmp_path):
    first = run(max_steps=2)
    second = run(max_steps=2, output=str(tmp_path / "more"), from_adapter=str(tmp_path / "run"), experts=None)
    assert second.eval_loss_before == pytest.approx(first.eval_loss, abs=1e-5)
    assert second.eval_loss < first.eval_loss
    assert weights(tmp_path / "more").keys() == weights(tmp_path / "run").keys()


def test_stopping_early_keeps_the_best(run):
    result = run(early_stopping_patience=1, eval_steps=1, save_steps=1, learning_rate=0.5, max_steps=8)
    assert result.steps < 8


def test_two_processes_train_what_one_does(run, options, alike, tmp_path, losses):
    shared = options | {"held_out": 8, "max_steps": 3, "router_aux_loss_coef": 0.0}
    runs: Mapping[str, Any] = {
        "ddp": shared | {"per_device_train_batch_size": 4},
        "fsdp2": shared | {"sharding": "fsdp2", "data": "nothing.jsonl"},
    }
    balanced = options | {"data": alike, "held_out": 0, "max_steps": 2, "router_aux_loss_coef": 0.7}
    runs |= {way: balanced | {"per_device_train_batch_size": 4} for way in ("balanced", "balanced and fused")}
    scenarios = [
        Scenario(name, own | {"output": str(tmp_path / name)}, as_on_gpu="fused" in name) for name, own in runs.items()
    ]
    found = launch(2, scenarios, tmp_path)
    assert [each["error"] for each in found["ddp"]] == [None, None], found["ddp"]
    result = run(held_out=8, max_steps=3, router_aux_loss_coef=0.0, output=str(tmp_path / "one"))
    one, two = (weights(tmp_path / name) for name in ("one", "ddp"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-4, msg=name)
    for mine, theirs in zip(result.experts, found["ddp"][1]["experts"], strict=True):
        assert mine.effective == pytest.approx(theirs["effective"], rel=0.02)
    run(**balanced | {"output": str(tmp_path / "whole")})
    for way in ("balanced", "balanced and fused"):  # the balancing loss is a mean over the processes
        assert [each["error"] for each in found[way]] == [None, None], found[way]
        for name in ("loss", "grad_norm", "aux_loss"):
            one, two = losses(tmp_path / "whole", name), losses(tmp_path / way, name)
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    for each in found["fsdp2"]:  # before the data, which is not there, is looked for
        assert each["error"] in ("ConfigError", "OtherFailed", "SaidByFirst")
        assert "fused experts are adapted cannot be sharded" in each["text"]


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"experts": True}, True),
        ({"targets": ["q_proj", "down_proj"]}, True),
        ({"targets": r".*\.down_proj"}, True),
        ({"targets": ["q_proj", "down_proj"], "experts": False}, False),
        ({"targets": ["q_proj"]}, False),
        ({}, False),
    ],
)
def test_sharding_of_adapted_experts_is_refused_before_the_model_loads(options, refused):
    model_config = tiny_families.small_config(Qwen3MoeConfig)
    config = TrainConfig.from_options({"model": "m", "data": "d", "output": "o"} | options)
    why = beforehand.why_not_cut(config, model_config, "fsdp2")
    assert why is None if not refused else "--no-experts" in why


def model_of_experts(name="qwen3_moe"):
    model = tiny_families.tiny_family(name, tiny_families.families()[name])
    return inject_adapter(model, AdapterConfig(experts=True))


def test_a_sharded_model_cannot_have_adapted_experts():
    assert "cannot be sharded" in why_not(model_of_experts(), "fsdp2")


def counted(model, ids, **inputs):
    loads = ExpertLoads(model, print)
    with loads.counting():
        model.train()
        model(input_ids=ids, **inputs)
        model.eval()
        model(input_ids=ids.flip(1)[:, :2])
    model.train()
    model(input_ids=ids)
    model.eval()
    return loads


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4_text"])
@pytest.mark.filterwarnings("ignore:all-linear leaves out 2 modules .router")
def test_rows_are_counted_without_padding_and_in_training_alone(name):
    model = model_of_experts(name)
    ids = torch.arange(5, 29).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    chosen = model.config.num_experts_per_tok
    whole, part = counted(model, ids), counted(model, ids, attention_mask=mask)
    for loads, tokens in ((whole, 24), (part, 17)):
        for counts in loads._counts.values():
            assert int(counts.counts_E1[:-1].sum()) == tokens * chosen
    alone = counted(model, ids[1:, :5])
    for path, counts in part._counts.items():
        first_row = whole._counts[path].counts_E1 - counted(model, ids[1:])._counts[path].counts_E1
        assert torch.equal(counts.counts_E1, first_row + alone._counts[path].counts_E1)


def test_how_even_is_the_exponential_of_the_entropy():
    load = load_of("l", torch.tensor([8, 8, 0, 0, 0, 0, 0, 0]), 2)
    assert (load.reached, load.busiest, load.chosen) == (2, 0.5, 2)
    assert load.effective == pytest.approx(2)
    assert load_of("l", torch.full((8,), 3), 2).effective == pytest.approx(8)
    assert load_of("l", torch.zeros(8), 2).reached == 0
    lines = described([load, ExpertLoad("m", 8, 2, 8, 0.2, 6.5, unmoved=(3, 5))])
    assert lines[0].startswith("10 of 16 experts in 2 layers had tokens, in each as evenly as 2.0 to 6.5 equal")
    assert "50.0% of the rows of l" in lines[0]
    assert lines[1].startswith("2 experts barely moved")
    assert lines[1].endswith("m 3, 5")


def test_what_counts_as_a_collapse():
    def load(effective):
        return ExpertLoad("l", 64, 4, 64, 0.1, effective)

    assert has_collapsed(load(8.0), 8.0)
    assert not has_collapsed(load(20.0), 20.0)
    assert has_collapsed(load(20.0), 50.0)
    assert not has_collapsed(load(30.0), 64.0)


def test_an_expert_that_nothing_moves_is_named():
    model = model_of_experts()
    layers = {path: layer for path, layer in adapter_layers(model).items() if isinstance(layer, ExpertParameter)}
    for layer in layers.values():
        torch.nn.init.normal_(layer.active.lora_B)
        layer.active.lora_B.data[2] *= 1e-4
        own = layer.active.scale * layer.active.lora_B @ layer.active.lora_A
        torch.testing.assert_close(expert_changes(layer), own.norm(dim=(1, 2)).double().detach(), rtol=1e-5, atol=0)
    loads = counted(model, torch.arange(5, 29).view(2, 12))
    assert [load.unmoved for load in loads.loads(Processes.here())] == [(2,), (2,)]


def test_a_router_that_collapses_is_warned_of_once(run, options, monkeypatch):
    out = io.StringIO()

    class Favourites(torch.nn.Module):
        def __init__(self, router):
            super().__init__()
            self.router = router

        def forward(self, *args, **kwargs):
            logits, values, index = self.router(*args, **kwargs)
            return logits, values, torch.arange(2).expand_as(index)

    prepare = import_module("theodora.train.run").prepare

    def prepared(*args):
        found = prepare(*args)
        mlp = found.model.model.layers[1].mlp
        mlp.gate = Favourites(mlp.gate)
        return found

    monkeypatch.setattr(import_module("theodora.train.run"), "prepare", prepared)
    config = TrainConfig.from_options(options | {"router_aux_loss_coef": 0.0, "max_steps": 6})
    result = train(config, console=Console(file=out, width=400))
    printed = out.getvalue()
    assert printed.count("the router of model.layers.1.mlp.experts sends most tokens to few of its 4 experts") == 1
    assert "the router of model.layers.0" not in printed
    assert "most tokens went to few experts at some time: model.layers.1.mlp.experts" in printed
    assert result.experts[1].reached == 2
    assert result.experts[1].unmoved == (2, 3)


def test_a_pattern_that_reaches_no_expert(run, tiny_model_dir):
    with pytest.raises(ConfigError, match="this model has no fused experts"):
        run(model=str(tiny_model_dir()))
