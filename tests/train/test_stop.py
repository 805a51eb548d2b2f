"""Preemption and Ctrl-C: a run stops where it can go on exactly, within a bound, and goes on by itself."""

import json
import os
import re
import shutil
import signal
import sys
import threading
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from crash import jobs
from crash.killing import fork_server
from theodora.cli import main as cli
from theodora.config import TrainConfig
from theodora.errors import ConfigError
from theodora.train import callbacks, train, trainer, trainer_logs
from theodora.train import stop as stopping
from theodora.train.processes import Agreement
from theodora.train.stop import StopOnSignal, TrainingInterrupted

ALL = ("loss", "eval_loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "mean_token_accuracy", "step")

ACCUMULATED = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}


@pytest.fixture
def send(monkeypatch):
    """Send this process a signal at a step of the next run."""

    def at(event, step, number=signal.SIGTERM, nth=1):
        class Sender(callbacks.CountUpdates):
            pass

        seen = []

        def hook(self, args, state, control, **kwargs):
            if state.global_step == step:
                seen.append(step)
                if len(seen) == nth:
                    os.kill(os.getpid(), number)

        setattr(Sender, event, hook)
        monkeypatch.setattr(sys.modules["theodora.train.run"], "CountUpdates", Sender)

    yield at
    monkeypatch.undo()


def same(one, other, losses):
    for name in ALL:
        assert losses(one, name) == losses(other, name), name
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("event", "step", "saved", "settings"),
    [
        ("on_step_begin", 3, 4, {"max_steps": 6, "eval_steps": 2, "early_stopping_patience": 9}),
        ("on_substep_end", 5, 5, {**ACCUMULATED, "max_steps": 8, "logging_steps": 4}),
        ("on_substep_end", 13, 13, {**ACCUMULATED, "max_steps": 14}),  # an epoch has 13 steps
        ("on_step_begin", 8, 9, {"max_steps": 11}),  # an epoch has 9 steps
        ("on_prediction_step", 4, 4, {"max_steps": 6, "eval_steps": 2, "per_device_eval_batch_size": 1}),
        ("on_prediction_step", 6, 6, {"max_steps": 6, "eval_steps": 3, "per_device_eval_batch_size": 1}),
    ],
    ids=["step", "micro-batch", "first of an epoch", "epoch end", "evaluation", "last evaluation"],
)
def test_sigterm_saves_and_auto_goes_on_with_the_same_bits(
    event, step, saved, settings, run, whole, send, tmp_path, losses, monkeypatch
):
    settings = {
        "save_steps": 100,
        "held_out": 2,
        "dropout": 0.1,
        "eval_steps": 100,
        "resume": "auto",
        **settings,
    }
    with monkeypatch.context():
        send(event, step)
        with pytest.raises(TrainingInterrupted, match=r"--resume") as caught:
            run(**settings)
    monkeypatch.undo()
    assert caught.value.exit_code == 0
    found = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert f"checkpoint-{saved}" in found
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    run(**settings)
    same(tmp_path / "run", whole(**settings), losses)


def test_a_run_that_stops_has_all_lines_of_its_log(run, whole, send, tmp_path, losses, monkeypatch):
    settings = {**ACCUMULATED, "max_steps": 8, "save_steps": 100, "held_out": 0, "resume": "auto"}
    choose = trainer.AdapterTrainer.choose_graphs

    def lag_behind(self):
        self.defers_logs = True
        choose(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_logs.DeferredMetrics, "ready", lambda self: False)
        patch.setattr(trainer.AdapterTrainer, "choose_graphs", lag_behind)
        send("on_substep_end", 5)
        with pytest.raises(TrainingInterrupted):
            run(**settings)
    monkeypatch.undo()
    assert losses(tmp_path / "run", "step") == [1, 2, 3, 4, 5]
    run(**settings)
    same(tmp_path / "run", whole(**settings), losses)


def test_auto_begins_goes_on_and_finishes(run, tmp_path, losses):
    first = run(resume="auto", max_steps=3)
    assert first.steps == 3
    second = run(resume="auto", max_steps=5)
    assert second.steps == 5
    assert losses(tmp_path / "run", "step").count(4) == 3  # its line, its evaluation, and how far it has moved
    before = load_file(tmp_path / "run" / "adapter_model.safetensors")
    (tmp_path / "run" / "adapter_model.safetensors").unlink()  # as if the last run had died just before its end
    third = run(resume="auto", max_steps=5)
    assert third.eval_loss == second.eval_loss
    after = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_auto_does_not_overwrite_a_result_without_checkpoints(run, tmp_path):
    run()
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        (checkpoint / "trainer_state.json").unlink()
    with pytest.raises(ConfigError, match=r"already holds a run \(adapter_config.json.*--overwrite"):
        run(resume="auto")
    with pytest.raises(ConfigError, match=r"no whole checkpoint.*--overwrite.*--resume auto"):
        run(resume=True)


def test_true_and_false_in_any_spelling():
    def resume(value):
        return TrainConfig(model="m", data="d", output="o", resume=value).resume

    assert [resume(v) for v in (True, "true", False, "False", None, "auto", "a/b")] == [
        True,
        True,
        None,
        None,
        None,
        "auto",
        "a/b",
    ]


def test_a_run_that_stopped_early_is_not_trained_on(run, tmp_path, losses):
    settings = {"max_steps": 12, "eval_steps": 1, "save_steps": 1, "early_stopping_patience": 2, "learning_rate": 0.5}
    first = run(**settings)
    curve, adapter = losses(tmp_path / "run", "eval_loss"), load_file(tmp_path / "run" / "adapter_model.safetensors")
    (tmp_path / "run" / "adapter_model.safetensors").unlink()
    second = run(**settings, resume="auto")
    assert second.steps == first.steps < 12
    assert losses(tmp_path / "run", "eval_loss") == curve
    again = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(torch.equal(adapter[key], again[key]) for key in adapter)


def test_checkpoints_that_a_killed_run_had_still_to_delete_go(run, tmp_path, losses):
    settings = {"max_steps": 4, "save_steps": 1, "save_total_limit": 2}
    run(**settings)
    checkpoints, curve = tmp_path / "run" / "checkpoints", losses(tmp_path / "run")
    # As if the process had been killed when checkpoint-4 had its name, and checkpoint-2 not yet gone.
    shutil.copytree(checkpoints / "checkpoint-3", checkpoints / "checkpoint-2")
    (tmp_path / "run" / "adapter_model.safetensors").unlink()
    run(**settings, resume="auto")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    assert losses(tmp_path / "run") == curve
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_going_back_to_an_earlier_checkpoint_leaves_the_later_ones(run, tmp_path):
    run(max_steps=6, save_steps=2, save_total_limit=9)
    checkpoints = tmp_path / "run" / "checkpoints"
    run(max_steps=3, save_steps=3, save_total_limit=9, resume=str(checkpoints / "checkpoint-2"))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_signals_do_not_outlive_a_run_and_reach_it_while_it_loads(run, options, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def load(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(sys.modules["theodora.train.run"], "prepare", load)
    with pytest.raises(TrainingInterrupted, match=r"before training began") as caught:
        run()
    assert caught.value.exit_code == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_step_that_takes_too_long_is_given_up_at_the_bound(options, tmp_path):
    options |= {"grace_period": 0.5, "save_steps": 2, "max_steps": 6}
    process = fork_server().Process(target=jobs.stuck, args=(options, 3, tmp_path))
    process.start()
    while process.is_alive() and not (tmp_path / "stuck").exists():
        time.sleep(0.01)
    assert process.is_alive(), (tmp_path / "log.txt").read_text()
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    log = (tmp_path / "log.txt").read_text()
    assert process.exitcode == 143, log
    assert time.monotonic() - began < 10
    assert re.search(r"no checkpoint within 0.5 s; .*checkpoint-2 is whole", log)
    result = train(TrainConfig.from_options(options | {"resume": "auto"}), console=Console(quiet=True))
    assert result.steps == 6


def test_the_command_exits_with_0_after_sigterm(options, send, tmp_path):
    send("on_step_begin", 2)
    flags = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]
    assert cli.main(["train", *flags, "--resume", "auto"]) == 0
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-3").is_dir()
    assert not (tmp_path / "run" / "README.md").exists()


def test_several_processes_stop_at_the_same_step(tmp_path):
    processes = [fork_server().Process(target=jobs.vote, args=(n, tmp_path)) for n in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [json.loads((tmp_path / f"{n}.json").read_text()) for n in (0, 1)] == [[False, False, False, True]] * 2


@pytest.mark.parametrize("again", [signal.SIGINT, signal.SIGTERM])
def test_only_a_second_ctrl_c_ends_a_run_at_once(again, tmp_path):
    stop = StopOnSignal(tmp_path, grace_period=60)
    with stop.listening(), stop.training():
        signal.raise_signal(signal.SIGINT)
        assert stop.exit_code == 130
        if again == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(again)
        else:
            signal.raise_signal(again)
            assert stop.exit_code == 0
    assert stop._watchdog is None or stop._watchdog.finished.wait(5)  # it does not outlive the run


def test_ctrl_c_after_the_last_step_is_not_held_back(tmp_path):
    stop = StopOnSignal(tmp_path, grace_period=60)
    with stop.listening():
        with stop.training():
            pass
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_thread_leaves_signals_alone(tmp_path):
    before, seen = signal.getsignal(signal.SIGINT), []

    def listen():
        with StopOnSignal(tmp_path, grace_period=60).listening():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_worker_of_a_data_loader_goes_on_until_it_is_asked_again(tmp_path, monkeypatch):
    stop, handlers = StopOnSignal(tmp_path, grace_period=60), []
    monkeypatch.setattr(stopping.signal, "signal", lambda number, handler: handlers.append((number, handler)))
    monkeypatch.setattr(stopping.os, "getpid", lambda: -1)  # as in a fork
    stop._on_signal(signal.SIGINT, None)
    assert handlers == []
    stop._on_signal(signal.SIGTERM, None)
    assert handlers == [(signal.SIGTERM, signal.SIG_DFL)]
    assert stop.requested is None


def test_a_run_without_checkpoints_says_so_at_its_bound(tmp_path, monkeypatch):
    said, codes = [], []
    monkeypatch.setattr(stopping.os, "write", lambda to, text: said.append((to, text.decode())))
    monkeypatch.setattr(stopping.os, "_exit", codes.append)
    StopOnSignal(tmp_path, grace_period=1.5)._give_up()
    assert said == [(2, "SIGTERM: no checkpoint within 1.5 s; no checkpoint was written yet.\n")]
    assert codes == [143]


def test_an_agreement_is_told_of_in_the_step_after(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        agree = Agreement()
        assert [agree(stop) for stop in (False, True, False, False)] == [False, False, True, False]
    finally:
        torch.distributed.destroy_process_group()
