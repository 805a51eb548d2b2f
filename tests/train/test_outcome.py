"""What a step has made of the weights is known before they are saved."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from theodora.errors import TheodoraError
from theodora.train import outcome
from theodora.train import trainer as trainer_module
from theodora.train.callbacks import Diverged


def _checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").glob("checkpoint-*"))


@pytest.mark.parametrize("ruined", ["optimizer", "weights"])
def test_neither_weights_nor_an_optimizers_state_that_is_not_finite_is_saved(run, ruined, tmp_path, monkeypatch):
    check = outcome.Outcome.check

    def spoil(self):
        if self.trainer.state.global_step == 2:
            state = next(iter(self.trainer.optimizer.state.items()))
            tensor = state[1]["exp_avg_sq"] if ruined == "optimizer" else state[0].data
            tensor.view(-1)[0] = torch.inf
        check(self)

    monkeypatch.setattr(outcome.Outcome, "check", spoil)
    said = "exp_avg_sq" if ruined == "optimizer" else "lora_A"
    with pytest.raises(Diverged, match=rf"{said}.* is not finite after step 2, and nothing of that was saved"):
        run(save_steps=1, held_out=0)
    assert _checkpoints(tmp_path) == ["checkpoint-1"]
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_held_out_loss_that_is_not_finite_ends_the_run_before_anything_is_saved(run, tmp_path, monkeypatch):
    loop = trainer_module.AdapterTrainer.evaluation_loop

    def bad(self, *args, **kwargs):
        output = loop(self, *args, **kwargs)
        if self.state.global_step == 4:
            output.metrics["eval_loss"] = float("nan")
        return output

    monkeypatch.setattr(trainer_module.AdapterTrainer, "evaluation_loop", bad)
    for early in ({}, {"early_stopping_patience": 1}):
        with pytest.raises(TheodoraError, match="eval_loss is nan at step 4"):
            run(save_steps=2, eval_steps=2, overwrite=True, **early)
        assert _checkpoints(tmp_path) == ["checkpoint-2"]
        assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_looking_leaves_no_trace(run, losses, tmp_path, monkeypatch):
    settings = {"save_steps": 1, "held_out": 0, "dropout": 0.2, "logging_steps": 3, "gradient_accumulation_steps": 2}
    run(output=str(tmp_path / "looked"), **settings)
    monkeypatch.setattr(outcome.Outcome, "check", lambda self: None)
    run(output=str(tmp_path / "not"), **settings)
    assert losses(tmp_path / "looked") == losses(tmp_path / "not")
    accuracies = [losses(tmp_path / name, "mean_token_accuracy") for name in ("looked", "not")]
    assert accuracies[0] == accuracies[1]
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("looked", "not"))
    assert all(torch.equal(one[key], other[key]) for key in one)
