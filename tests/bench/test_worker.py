"""A variant's process from inside: what it measures, and how it answers."""

import multiprocessing
from dataclasses import replace

import pytest
import torch

from theodora.bench import VARIANTS, Job, Workload, worker
from theodora.bench.worker import Failure, Loaded, Stepper, Turn
from tiny import FAMILIES, VOCAB_SIZE


def job(name, **changes):
    model = {"model_type": "llama", "vocab_size": VOCAB_SIZE, "pad_token_id": 0, **FAMILIES["llama"]}
    given = {"model": model, "dtype": "float32", "batch": 2, "length": 8, "rank": 4} | changes
    return Job(name=name, variant=VARIANTS[name], workload=Workload(**given))


@pytest.mark.parametrize("optimizer", [False, True])
@pytest.mark.parametrize("name", ["floor", "dora"])
def test_steps_are_timed_and_the_adapter_moves_between_them(name, optimizer):
    stepper = Stepper(job(name, optimizer=optimizer))
    loaded = stepper.load()
    trained = stepper.step.trained
    before = [p.detach().clone() for p in trained]
    turn = stepper.turn(1, 3)
    assert len(turn.seconds) == 3
    assert all(seconds > 0 for seconds in turn.seconds)
    assert turn.memory.peak >= turn.memory.idle > 0
    assert loaded.trained_parameters == sum(p.numel() for p in trained)
    assert loaded.first_loss == pytest.approx(float(stepper.step.loss().detach()), abs=0.5)
    # Else what holds for one optimizer step would be used in the next, which no training can do.
    assert any(not torch.equal(p, was) for p, was in zip(trained, before, strict=True)) == bool(trained)
    assert all(p.grad is None for p in trained)


@pytest.fixture
def answers(monkeypatch, tmp_path):
    """Run a worker here on commands that were sent beforehand, and hear what it says."""
    monkeypatch.setattr(worker, "_redirect_output", lambda log: None)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker.os, "_exit", lambda code: None)

    def run(job, *commands):
        ours, theirs = multiprocessing.Pipe()
        for command in commands:
            ours.send(command)
        worker.work(theirs, job, str(tmp_path / "log"))
        found = []
        while ours.poll():
            found.append(ours.recv())
        return found

    return run


def test_a_worker_answers_each_command(answers):
    imported, loaded, turn = answers(job("lora"), ("load",), ("turn", 0, 2), ("stop",))
    assert imported == "imported"
    assert isinstance(loaded, Loaded)
    assert isinstance(turn, Turn)


def test_a_worker_says_why_it_cannot(answers):
    missing = replace(VARIANTS["floor"], imports=("a_module_that_is_not_there",))
    (failure,) = answers(replace(job("floor"), variant=missing))
    assert isinstance(failure, Failure)
    assert "a_module_that_is_not_there" in failure.reason
    assert "Traceback" in failure.traceback
    assert not failure.out_of_memory


def test_a_worker_ends_with_its_parent(answers, monkeypatch):
    monkeypatch.setattr(multiprocessing.connection.Connection, "recv", lambda _: (_ for _ in ()).throw(EOFError))
    ours, theirs = multiprocessing.Pipe()
    worker.work(theirs, job("floor"), "log")
    monkeypatch.undo()
    assert ours.recv() == "imported"
    assert not ours.poll()  # nor a failure: nobody hears it


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_memory_is_known_without_proc(monkeypatch, tmp_path, platform):
    known = worker.process_bytes("VmHWM")
    monkeypatch.setattr(worker, "Path", lambda _: tmp_path / "absent")
    monkeypatch.setattr(worker.sys, "platform", platform)
    unit = 1024 if platform == "darwin" else 1  # macOS counts bytes, others KiB
    assert worker.process_bytes("VmHWM") * unit >= known / 2


@pytest.mark.parametrize(
    ("error", "out_of_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (ValueError("a shape\nof 3"), False),
    ],
    ids=str,
)
def test_memory_that_ran_out_is_known_from_other_failures(error, out_of_memory):
    failure = worker._failure(error)
    assert failure.out_of_memory == out_of_memory
    assert failure.reason == ("out of memory" if out_of_memory else "ValueError: a shape of 3")
