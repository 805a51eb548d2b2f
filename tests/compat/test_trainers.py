"""An injected model in other people's trainers: their checkpoints hold the adapter, and they resume from them."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from theodora import AdapterConfig, ConfigError, inject_adapter, load_adapter
from theodora.adapters.state import trained_tensors
from tiny import tiny_model, tiny_tokenizer

# transformers renames gradient checkpointing; torch's loader complains of a pinned memory that no CPU has.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:torch")

ROWS = [torch.randint(3, 200, (16,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(32)]
DATA = Dataset.from_dict({"input_ids": ROWS, "labels": ROWS})


def new_model(**config):
    torch.manual_seed(0)
    return inject_adapter(tiny_model("llama"), AdapterConfig(rank=2, **config))


def arguments(kind, folder, **more):
    return kind(
        output_dir=str(folder),
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **({"bf16": False, "gradient_checkpointing": False} if kind is SFTConfig else {}),
        **more,
    )


def make(kind, model, folder, **more):
    if kind is Trainer:
        return Trainer(model, arguments(TrainingArguments, folder, **more), train_dataset=DATA, eval_dataset=DATA)
    return SFTTrainer(
        model,
        arguments(SFTConfig, folder, **more),
        train_dataset=DATA,
        eval_dataset=DATA,
        processing_class=tiny_tokenizer(),
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_checkpoints_hold_the_adapter_and_resume(kind, init, tmp_path):
    whole = make(kind, new_model(init=init), tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin", "config.json"}

    resumed = make(kind, new_model(init=init), tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)
    for name, tensor in trained_tensors(whole.model).items():
        assert torch.equal(trained_tensors(resumed.model)[name], tensor), name

    loaded = load_adapter(tiny_model("llama"), tmp_path / "whole" / "checkpoint-6")
    ids = torch.tensor(ROWS[:2])
    assert torch.equal(loaded(ids).logits, whole.model.eval()(ids).logits)


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
def test_best_model_is_found_again(kind, tmp_path):
    trainer = make(
        kind,
        new_model(),
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=3,
        metric_for_best_model="loss",
        greater_is_better=True,  # the worst, so that loading it changes something
        prediction_loss_only=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    expected = load_adapter(tiny_model("llama"), tmp_path / "checkpoint-3")
    for name, tensor in trained_tensors(trainer.model).items():
        assert torch.equal(trained_tensors(expected)[name], tensor), name


def test_fused_head_never_passes_an_adapted_head_by(tmp_path):
    model = new_model(targets=("lm_head", "q_proj"))
    with pytest.raises(ConfigError, match="output head"):
        make(SFTTrainer, model, tmp_path).train()


def test_trainers_still_load_whole_models(tmp_path):
    """The wrapped methods pass other models on."""
    new_model()  # wraps them
    trainer = make(Trainer, tiny_model("llama").train().requires_grad_(True), tmp_path)
    trainer.train()
    again = make(Trainer, tiny_model("llama").train().requires_grad_(True), tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(again) == losses(trainer)
