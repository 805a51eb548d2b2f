"""Runs that must trace each other: accumulated and not, resumed and not, interrupted and not."""

import io
import os
import shutil
import signal
import sys

import pytest
import torch
from rich.console import Console

from theodora.config import TrainConfig
from theodora.errors import CheckpointError, ConfigError, UsageError
from theodora.train import callbacks, train
from theodora.train.stop import TrainingInterrupted


@pytest.mark.parametrize("head", [False, True], ids=["", "adapted head"])
def test_accumulation_traces_the_large_batch(head, run, tmp_path, losses):
    extra = {"targets": ["q_proj", "lm_head"]} if head else {}
    run(output=str(tmp_path / "1x8"), per_device_train_batch_size=8, **extra)
    run(output=str(tmp_path / "8x1"), per_device_train_batch_size=1, gradient_accumulation_steps=8, **extra)
    torch.testing.assert_close(losses(tmp_path / "1x8"), losses(tmp_path / "8x1"), rtol=1e-5, atol=1e-5)


def test_the_held_out_loss_does_not_depend_on_the_batch_size(run, tmp_path, losses):
    run(output=str(tmp_path / "a"), held_out=7, per_device_eval_batch_size=1)
    run(output=str(tmp_path / "b"), held_out=7, per_device_eval_batch_size=5)
    torch.testing.assert_close(
        losses(tmp_path / "a", "eval_loss"), losses(tmp_path / "b", "eval_loss"), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_resumed_equals_uninterrupted(method, resumes):
    # Step 13 is done again; 9 steps make an epoch.
    resumes(method=method, max_steps=14, save_steps=6, dropout=0.1, eval_steps=4)


def test_resume_takes_the_newest_whole_checkpoint_or_the_one_named(run, tmp_path, losses):
    settings = {"max_steps": 6, "save_steps": 2, "save_total_limit": 9}
    run(**settings)
    first = losses(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "checkpoint-6" / "trainer_state.json").write_text('{"global')
    (checkpoints / ".checkpoint-8.partial-x").mkdir()
    run(**settings, resume="auto")
    assert losses(tmp_path / "run") == first
    assert not (checkpoints / ".checkpoint-8.partial-x").exists()
    run(**settings, resume=str(checkpoints / "checkpoint-2"))
    assert losses(tmp_path / "run") == first
    with pytest.raises(ConfigError, match=r"holds 6 steps, and this run has 4"):
        run(max_steps=4, resume="auto")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors"):
        run(max_steps=6, resume=str(tmp_path))


def test_there_may_be_nothing_to_resume(run):
    with pytest.raises(ConfigError, match=r"no whole checkpoint.*without --resume"):
        run(resume=True)


@pytest.mark.parametrize("during", ["on_step_begin", "on_prediction_step"])
def test_ctrl_c_saves_a_checkpoint_from_which_the_run_goes_on(during, run, whole, tmp_path, monkeypatch, losses):
    settings = {"max_steps": 6, "eval_steps": 3, "save_steps": 5, "per_device_eval_batch_size": 1}
    handler = signal.getsignal(signal.SIGINT)

    class PressCtrlC(callbacks.CountUpdates):
        pass

    def press(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    setattr(PressCtrlC, during, press)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["theodora.train.run"], "CountUpdates", PressCtrlC)
        with pytest.raises(
            TrainingInterrupted, match=r"Go on with:\n\n  theodora train --config .*config.yaml --resume"
        ):
            run(**settings)
    assert signal.getsignal(signal.SIGINT) is handler  # which ignores it where the tests run in the background
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == ("checkpoint-4" if during == "on_step_begin" else "checkpoint-3")
    run(resume="auto", **settings)
    assert losses(tmp_path / "run") == losses(whole(**settings))


def test_a_full_disk_while_saving_leaves_no_half_checkpoint(run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(CheckpointError, match=r"No space left"):
        run()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_disk_that_is_too_small_is_noticed_before_training(run, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(CheckpointError, match=r"1 MB free; this run needs about"):
        run()
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_diverging_run_ends_at_once(run, tmp_path):
    with pytest.raises(Exception, match=r"diverged.*lower learning_rate"):
        run(learning_rate=1e30, max_steps=8, max_grad_norm=0)
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_nothing_is_trained_if_the_output_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written: .*file is a file"):
        run(output=str(tmp_path / "file" / "run"))


def test_a_resumed_run_says_what_has_changed(options, tmp_path):
    train(TrainConfig.from_options(options), console=Console(quiet=True))
    console = Console(file=io.StringIO(), width=120)
    more = {"max_steps": 6, "learning_rate": 0.005, "resume": "auto"}
    train(TrainConfig.from_options(options | more), console=console, show_result=False)
    text = console.file.getvalue()
    assert "going on from step 4" in text
    assert "max_steps from 4 to 6" in text
    assert "learning_rate from 0.01 to 0.005" in text
    assert "held_out" not in text
