"""A run from end to end: what it writes, that it can be repeated, and that others can read it."""

import json
import shutil
from importlib import import_module

import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from theodora.config import TrainConfig
from theodora.errors import ConfigError
from theodora.train import train
from theodora.train.loss_figure import draw_losses


def test_a_run_leaves_an_adapter_and_its_record(run, options, tmp_path, losses, monkeypatch):
    monkeypatch.setattr(import_module("theodora.train.run"), "draw_losses", draw_losses)
    result = run()
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "README.md", "metrics.jsonl", "loss.png"}
    assert names >= {"config.yaml", "checkpoints", "tokenizer.json", "held_out.jsonl"}
    assert not [name for name in names if name.startswith(".")]
    assert len(losses(folder)) == result.steps == 4
    assert (
        losses(folder, "eval_loss")[0] == result.eval_loss_before > result.eval_loss == losses(folder, "eval_loss")[-1]
    )
    with Image.open(folder / "loss.png") as picture:
        assert picture.size == (1200, 675)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert f"{result.eval_loss:.4f}" in card
    assert str(options["data"]) in card
    assert len((folder / "held_out.jsonl").read_text().splitlines()) == 2  # 5 % of 40
    assert TrainConfig.from_options(yaml.safe_load((folder / "config.yaml").read_text())).held_out == 2


def test_checkpoints_hold_the_adapter_and_not_the_model(run, tmp_path):
    run(save_steps=2, save_total_limit=1)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == "checkpoint-4"
    assert not (checkpoint / "model.safetensors").exists()
    final = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(
        torch.equal(tensor, final[key]) for key, tensor in load_file(checkpoint / "adapter_model.safetensors").items()
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_peft_reads_the_result_with_equal_logits(family, run, tiny_model_dir, tmp_path):
    result = run(model=str(tiny_model_dir(family)))
    ids = torch.arange(3, 40)[None]
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir(family)), tmp_path / "run"
    ).eval()
    torch.testing.assert_close(peft(ids).logits, result.model.cpu()(ids).logits, rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(run, tmp_path, losses):
    outputs = [str(tmp_path / name) for name in "abc"]
    for output, seed in zip(outputs, [3, 3, 4], strict=True):
        run(output=output, seed=seed, dropout=0.1)
    a, b, c = (losses(output) for output in outputs)
    assert a == b
    assert a != c


def test_the_resolved_configuration_runs_again(run, tmp_path, losses):
    run(output=str(tmp_path / "a"), bf16=None, gradient_checkpointing=None)
    again = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert again["bf16"] is not None
    train(TrainConfig.from_options(again | {"output": str(tmp_path / "b")}), console=Console(quiet=True))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_folder_that_holds_a_run_is_refused_or_overwritten(run, tmp_path, losses):
    run()
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume.*--overwrite"):
        run()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run(overwrite=True, max_steps=2)
    assert len(losses(tmp_path / "run")) == 2
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if "4" in p.name] == []
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_fields_of_sft_config_reach_the_trainer(run, tmp_path, losses):
    run(optim="sgd", trainer={"lr_scheduler_kwargs": {}, "adam_beta1": "0.5"}, logging_steps=2)
    state = torch.load(tmp_path / "run" / "checkpoints" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert "momentum" in state["param_groups"][0]
    assert len(losses(tmp_path / "run")) == 2


def test_unknown_and_impossible_options_are_refused_together(run):
    other = {"average_tokens_across_devices": "false", "hub_private_repo": True, "save_on_each_node": True}
    with pytest.raises(ConfigError) as caught:
        run(max_stepz=3, lora_alpha=4, adam_beta1="much", **other)
    message = str(caught.value)
    assert "average_tokens_across_devices cannot be switched off" in message
    assert "did you mean max_steps" in message
    assert "lora_alpha; it is called alpha here: write alpha: 4" in message
    assert "theodora push FOLDER NAME --public" in message
    assert "save_on_each_node has no effect here: one process writes" in message
    assert "adam_beta1 is 'much'; expected a number" in message


@pytest.mark.parametrize(
    "wrong",
    [{"lr_scheduler_type": "cosin"}, {"optim": "adamw_torc"}, {"report_to": "tensorbord"}, {"report_to": [None]}],
)
def test_values_that_transformers_does_not_know_are_refused_before_anything_is_loaded(wrong, run):
    with pytest.raises(ConfigError, match=str(*wrong.values())):
        run(model="./nowhere", **wrong)


def test_a_reporter_that_is_not_installed_is_named_before_anything_is_loaded(run, monkeypatch):
    monkeypatch.setattr(import_module("theodora.train.arguments"), "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match="report_to is tensorboard, which is not installed: pip install tensorboard"):
        run(model="./nowhere", report_to="tensorboard")


def test_tensorboard_gets_the_losses(run, tmp_path):
    run(report_to="tensorboard")
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_modules_to_save_train_in_fp32_beside_bf16(run, options):
    result = run(modules_to_save=["lm_head"], bf16=True)
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}


def test_a_bf16_run_holds_the_model_in_bf16_and_the_adapter_in_fp32(run):
    result = run(bf16=True)
    assert result.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert {p.dtype for p in result.model.parameters() if p.requires_grad} == {torch.float32}


def test_the_model_is_its_own_again_after_training(run):
    result = run(targets=["q_proj"])
    assert "forward" not in result.model.__dict__
    assert not result.model.training
    assert result.model.config.use_cache


def test_early_stopping_keeps_the_best_adapter(run, tmp_path, losses):
    result = run(max_steps=12, eval_steps=1, save_steps=1, early_stopping_patience=2, learning_rate=0.5)
    curve = losses(tmp_path / "run", "eval_loss")
    assert result.steps < 12
    assert result.eval_loss == min(curve[1:])
    best = min(range(1, len(curve)), key=curve.__getitem__)
    kept = load_file(tmp_path / "run" / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(torch.equal(kept[key], saved[key]) for key in saved)


def test_text_without_held_out_rows(run, tmp_path):
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": "to be or not to be " * 20}) + "\n")
    result = run(data=str(data), max_length=32, packing=True)
    assert result.eval_loss is None
    assert not (tmp_path / "run" / "held_out.jsonl").exists()


def test_a_conversation_without_a_template_gets_one_that_is_saved(run, tiny_model, tiny_tokenizer, tmp_path):
    tiny_tokenizer.chat_template = None
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "chat.jsonl"
    rows = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in range(8)]
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    run(model=str(tmp_path / "model"), data=str(data))
    assert "### Response:" in (tmp_path / "run" / "chat_template.jinja").read_text()


def test_tokens_and_templates_of_the_users(run, tmp_path, tiny_tokenizer):
    with pytest.raises(ConfigError, match=r"eos_token is '<end>', which the tokenizer of .* does not have"):
        run(eos_token="<end>")
    with pytest.raises(ConfigError, match=r"chat_template_path is .*absent; expected a file with a Jinja template"):
        run(chat_template_path=str(tmp_path / "absent"))
    template = "{% for message in messages %}{{ message['content'] }}|{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    run(eos_token="<|im_end|>", chat_template_path=str(tmp_path / "chat.jinja"), max_steps=1)
    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert saved.eos_token == "<|im_end|>"
    assert saved.chat_template == template


def test_rows_that_are_all_one_row_are_trained_on_and_none_is_held_out(run, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n' * 5)
    run(data=str(tmp_path / "one.jsonl"), max_steps=1)
    assert not (tmp_path / "run" / "held_out.jsonl").exists()
    with pytest.raises(ConfigError):  # asked for, it is an error
        run(data=str(tmp_path / "one.jsonl"), max_steps=1, held_out=2, overwrite=True)


@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": "auto"}])
@pytest.mark.parametrize("name", ["README.md", "config.yaml", "held_out.jsonl", "checkpoints"])
def test_what_only_has_the_name_of_a_runs_file_is_never_lost(name, how, run, tmp_path):
    place = tmp_path / "run" / name
    place.mkdir(parents=True) if name == "checkpoints" else place.parent.mkdir()
    kept = place / "precious.bin" if name == "checkpoints" else place
    kept.write_text("model: mine")
    with pytest.raises(ConfigError, match=rf"holds {name}, but no run of theodora"):
        run(**how)
    assert kept.read_text() == "model: mine"
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_a_run_does_not_delete_what_it_reads(run, sums, tmp_path, options):
    first = run(max_steps=1, held_out=4)
    rows = (first.output / "held_out.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"eval_data is \S+held_out\.jsonl, which this run would write over"):
        run(overwrite=True, eval_data=str(first.output / "held_out.jsonl"))
    for how in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(ConfigError, match=r"data is \S+held_out\.jsonl, which this run would write over"):
            run(**how, data=str(first.output / "held_out.jsonl"))
    assert (first.output / "held_out.jsonl").read_text() == rows
    with pytest.raises(ConfigError, match="is the model's own; choose another one"):
        run(output=options["model"])
    run(overwrite=True)
    assert (first.output / "adapter_model.safetensors").is_file()


def test_rows_grouped_by_length_come_in_the_same_order_after_a_stop(run, losses, tmp_path):
    how = {"max_steps": None, "num_train_epochs": 2, "save_steps": 3, "save_total_limit": 20, "logging_steps": 1}
    how |= {"held_out": 0, "trainer": {"train_sampling_strategy": "group_by_length"}}
    whole = run(**how, output=str(tmp_path / "whole"))
    shutil.copytree(whole.output, tmp_path / "copy")
    for checkpoint in (tmp_path / "copy" / "checkpoints").iterdir():
        if int(checkpoint.name.partition("-")[2]) > 12:  # within the second epoch of ten steps
            shutil.rmtree(checkpoint)
    again = run(**how, output=str(tmp_path / "copy"), resume=True)
    assert losses(again.output)[12:] == losses(whole.output)[12:]
    tensors = [load_file(result.output / "adapter_model.safetensors") for result in (whole, again)]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
