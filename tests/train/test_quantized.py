"""`quantize`: runs on bases that another library stores in few bits."""

import io
import sys

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from theodora import AdapterConfig, ConfigError, TheodoraError, TrainConfig, inject_adapter, train
from theodora.adapters.models import load_model
from theodora.adapters.quantized import quantization_of
from theodora.adapters.state import trained_tensors
from theodora.files.adapter import read_trained_on
from theodora.train.out_of_memory import memory_advice

pytest.importorskip("bitsandbytes")


def panel_of(options, **others):
    output = io.StringIO()
    result = train(TrainConfig.from_options(options | others), console=Console(file=output, width=160))
    return result, output.getvalue()


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_on_a_quantised_base(kind, method, run, tmp_path, losses):
    result = run(quantize=kind, method=method, max_steps=12)
    assert quantization_of(result.model).kind == kind
    found = losses(tmp_path / "run")
    assert sum(found[-3:]) < sum(found[:3])
    # TRL would have made them bfloat16, magnitudes and all.
    assert {tensor.dtype for tensor in trained_tensors(result.model).values()} == {torch.float32}
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["quantize"] == kind
    assert f"| quantize | {kind} |" in (tmp_path / "run" / "README.md").read_text()
    assert read_trained_on(tmp_path / "run").quantize == kind


def test_the_panel_names_quantisation_and_memory(options):
    _, said = panel_of(options, quantize="nf4", max_steps=1)
    assert "bitsandbytes nf4, double-quantised, 0.08 MB in all, the rest float32, on " in said
    assert "32,928 parameters" in said


def test_resumed_equals_uninterrupted(resumes):
    resumes(quantize="nf4")


def test_training_goes_on_from_an_adapter_on_the_base_that_it_knows(run, options, tmp_path):
    run(quantize="nf4", max_steps=2)
    go_on = {"from_adapter": str(tmp_path / "run"), "model": "", "max_steps": 1}
    result = run(**go_on, output=str(tmp_path / "second"))
    assert quantization_of(result.model).kind == "nf4"
    assert yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())["quantize"] == "nf4"
    with pytest.warns(UserWarning, match="away from those"):
        result = run(**go_on, quantize="none", output=str(tmp_path / "third"))
    assert quantization_of(result.model) is None
    with pytest.warns(UserWarning, match="away from those"):
        result = run(**go_on, quantize="fp8", output=str(tmp_path / "fourth"))
    assert quantization_of(result.model).kind == "fp8"


def test_fp8_is_one_thing_under_two_names(options):
    one, other = (TrainConfig.from_options(options | o) for o in ({"quantize": "fp8"}, {"base_dtype": "fp8"}))
    assert one.to_options() == other.to_options()
    with pytest.raises(ConfigError, match="base_dtype=fp8 and quantize=nf4 are both given"):
        TrainConfig.from_options(options | {"base_dtype": "fp8", "quantize": "nf4"})


def test_a_folder_of_quantised_weights_is_trained_on_as_it_is(run, options, tiny_tokenizer, tmp_path):
    folder = tmp_path / "quantised"
    load_model(options["model"], quantize="nf4").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    result = run(model=str(folder), max_steps=1)
    assert quantization_of(result.model).kind is None
    with pytest.raises(ConfigError, match="is quantised already"):
        run(model=str(folder), quantize="nf4", output=str(tmp_path / "second"))


def test_modules_trained_in_full_stay_as_they_are(run):
    result = run(quantize="nf4", max_steps=2, targets=["q_proj"], modules_to_save=["down_proj"])
    layer = result.model.model.layers[0]
    assert layer.mlp.down_proj.weight.dtype == torch.float32
    assert layer.mlp.up_proj.weight.dtype == torch.uint8


def test_want_of_memory_says_what_makes_room(run, options, tmp_path, monkeypatch):
    def fails(*_args, **_kwargs):
        raise torch.OutOfMemoryError("GPU memory is full")

    monkeypatch.setattr(sys.modules["theodora.train.run"], "_run", fails)
    with pytest.raises(TheodoraError, match=r"What makes room: --quantize nf4, the frozen weights in a quarter"):
        run(max_steps=1)
    with pytest.raises(TheodoraError, match=r"What makes room: --gradient-checkpointing"):
        run(max_steps=1, quantize="nf4", output=str(tmp_path / "second"))
    config = TrainConfig.from_options(options | {"gradient_checkpointing": True})
    model = inject_adapter(load_model(options["model"], quantize="nf4"), AdapterConfig())
    assert memory_advice(config, model) == ""


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_trainers_of_others_take_a_quantised_model_with_our_adapter(trainer, options, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        options["model"],
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    inject_adapter(model, AdapterConfig(rank=2))
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 4
    if trainer == "trl":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        arguments = SFTConfig(
            str(tmp_path), max_steps=1, report_to=[], bf16=False, activation_checkpointing=False, use_cpu=True
        )
        made = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer(options))
    else:
        made = Trainer(
            model, TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True), train_dataset=rows
        )
    made.train()
    assert {tensor.dtype for tensor in trained_tensors(model).values()} == {torch.float32}
    assert model.is_loaded_in_4bit


def _tokenizer(options):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(options["model"])
