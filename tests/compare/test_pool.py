"""Workers of a comparison, from inside and from outside: what they say, and what becomes of one that dies."""

import multiprocessing
import sys

import pytest
import torch

from theodora.compare import CompareConfig, pool
from theodora.compare.cells import Record
from theodora.errors import TheodoraError


@pytest.fixture
def serve(monkeypatch):
    """Run a worker here, with a bench of the test's own, on cells that were sent beforehand."""
    monkeypatch.setattr(pool.signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def run(bench, *cells):
        import theodora.compare.worker

        monkeypatch.setattr(sys.modules[theodora.compare.worker.__name__], "Bench", bench)
        left, found = list(cells), []

        class Pipe:
            send = staticmethod(found.append)

            @staticmethod
            def recv():
                if not left:
                    raise EOFError  # the parent has gone
                return left.pop(0)

        pool._serve(Pipe(), None, "cpu", 1)
        return found

    return run


class Bench:
    def __init__(self, config, device):
        assert device == torch.device("cpu")

    def run(self, cell):
        return f"record of {cell}"


def test_it_loads_once_and_answers_each_cell(serve):
    assert serve(Bench, "a", "b") == ["ready", "record of a", "record of b"]


def test_it_says_why_it_cannot_begin(serve):
    def missing(config, device):
        raise TheodoraError("There is no model")

    def broken(config, device):
        raise ZeroDivisionError("a bug")

    assert serve(missing) == ["There is no model"]
    (said,) = serve(broken)
    assert said.startswith("A worker on cpu failed:\nTraceback")
    assert "ZeroDivisionError: a bug" in said


class Process:
    """A process that is never there."""

    exitcode = -9

    def __init__(self):
        self.ended = []

    def join(self, timeout):
        self.ended.append("joined")

    def terminate(self):
        self.ended.append("terminated")

    def is_alive(self):
        return True

    def kill(self):
        self.ended.append("killed")


@pytest.fixture
def processes(monkeypatch):
    """`Processes` on two places without a process behind them, and the workers' ends of the pipes, by place."""
    theirs = {}

    def start(self, place):
        ours, theirs[place] = multiprocessing.Pipe()
        return pool._Worker(place, Process(), ours)

    monkeypatch.setattr(pool.Processes, "_start", start)
    return pool.Processes(None, ["cuda:0", "cuda:1"]), theirs


def heard(found):
    return list(found.done())


def test_a_cell_goes_to_a_worker_that_is_ready(processes):
    found, theirs = processes
    theirs["cuda:1"].send("ready")
    found.begin("first")  # nobody has said so yet: any
    theirs["cuda:0"].send("ready")
    record = object.__new__(Record)
    theirs["cuda:0"].send(record)
    ((cell, got),) = heard(found)
    assert cell == "first"
    assert isinstance(got, Record)
    assert found.free() == 2
    assert theirs["cuda:0"].recv() == "first"
    found.begin("second")
    assert found.running() == ["second"]


@pytest.mark.parametrize("dies", ["after the cell was sent", "before"])
def test_a_cell_whose_worker_died_comes_back_and_another_worker_begins(dies, processes):
    found, theirs = processes
    theirs["cuda:0"].send("ready")
    theirs["cuda:1"].send("ready")
    for worker in found._workers:
        list(found._hear(worker))
    if dies == "before":
        theirs["cuda:0"].close()  # killed for memory, say
    found.begin("one")
    theirs["cuda:0"].close()
    assert heard(found) == [("one", "killed by signal 9 (SIGKILL)")]
    assert found.free() == 2
    found.begin("one")
    assert found.running() == ["one"]


@pytest.mark.parametrize(
    ("death", "says"),
    [(None, r"on cuda:0 died while it loaded .*killed by signal 9 .*Lower workers_per_gpu"), ("why", "^why$")],
)
def test_a_worker_that_cannot_begin_ends_the_comparison(processes, death, says):
    found, theirs = processes
    found.begin("one")
    theirs["cuda:0"].send(death) if death else theirs["cuda:0"].close()
    with pytest.raises(TheodoraError, match=says):
        heard(found)


def test_a_worker_killed_while_it_loads_in_place_of_another_is_replaced_and_its_cell_never_began(processes):
    found, theirs = processes
    for place in ("cuda:0", "cuda:1"):
        theirs[place].send("ready")
    for worker in found._workers:
        list(found._hear(worker))
    theirs["cuda:0"].close()
    found.begin("one")
    assert heard(found) == [("one", "killed by signal 9 (SIGKILL)")]
    found._workers[1].cell = "elsewhere"  # so that the new worker gets the cell, which it has not loaded for yet
    for _ in range(2):
        found.begin("one")
        theirs["cuda:0"].close()
        assert heard(found) == [("one", None)]
    found.begin("one")
    theirs["cuda:0"].close()
    with pytest.raises(TheodoraError, match="died while it loaded"):  # three times: no accident
        heard(found)


@pytest.mark.parametrize(
    ("code", "says"),
    [(-9, "killed by signal 9 (SIGKILL)"), (-11, "killed by signal 11 (SIGSEGV)"), (1, "ended with exit code 1")],
)
def test_how_a_worker_ended(code, says):
    assert pool.how_it_ended(code) == says


def test_a_worker_that_does_not_end_is_killed(processes):
    found, _ = processes
    found.close()
    assert [worker.process.ended for worker in found._workers] == [["terminated", "joined", "killed"]] * 2
    assert all(worker.pipe.closed for worker in found._workers)


@pytest.mark.parametrize(("gpus", "where"), [(0, ["cpu"]), (2, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"])])
def test_every_gpu_has_as_many_workers_as_were_asked_for(gpus, where, options, monkeypatch):
    monkeypatch.setattr(pool, "best_device", lambda: torch.device("cuda" if gpus else "cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert pool.places(CompareConfig.from_options(options | {"workers_per_gpu": 2})) == where
