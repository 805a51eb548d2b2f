"""What a cluster has room for, and what is said where it has not. Without Ray."""

import asyncio
import os
import socket
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from theodora.cli.main import main
from theodora.compare.cells import Cell, Record
from theodora.compare.pool import Workers
from theodora.errors import ConfigError, TheodoraError
from theodora.launch import cluster as clusters
from theodora.launch.cluster import (
    Cluster,
    Machine,
    Share,
    beside,
    go_to,
    how_it_died,
    share_for_cells,
    share_for_training,
)
from theodora.launch.mailbox import InOrder, Mailbox, Said, Wire
from theodora.launch.ray_cells import OnRay


def cluster(*machines: tuple[float, float], free: tuple[float, float] | None = None, own: bool = False) -> Cluster:
    """Of machines with (CPUs, GPUs) each."""
    there = tuple(Machine(id=str(i), address=f"10.0.0.{i}", cpus=c, gpus=g) for i, (c, g) in enumerate(machines))
    cpus, gpus = free or (sum(m.cpus for m in there), sum(m.gpus for m in there))
    return Cluster(machines=there, free_cpus=cpus, free_gpus=gpus, own=own)


def test_each_process_gets_a_gpu():
    assert share_for_training(cluster((16, 4), (16, 4)), None) == Share(count=8, cpus=1, gpus=1)
    assert share_for_training(cluster((16, 4), own=True), 2) == Share(count=2, cpus=8, gpus=1)


def test_without_gpus_the_cpus_of_this_machine_are_shared_out():
    assert share_for_training(cluster((8, 0), own=True), 2) == Share(count=2, cpus=4, gpus=0)


@pytest.mark.parametrize(
    ("there", "count", "said"),
    [
        (
            cluster((16, 2)),
            4,
            "4 workers want a GPU and a CPU each, and there is 1 machine of the Ray cluster with 2 GPUs",
        ),
        (cluster((2, 0), own=True), 4, r"4 workers want a CPU each, and there is this machine with 0 GPUs .* 2 CPUs"),
        (cluster((16, 4), free=(16, 1)), 4, r"others are at work in the cluster: .* 4 GPUs \(1 free\)"),
        (cluster((1, 0.0), own=True), None, "--num-workers is missing"),
        (cluster((1, 4), (16, 0)), 4, "room for 1"),  # the CPUs are where no GPU is
    ],
)
def test_what_there_is_not_is_said_before_anything_starts(there, count, said):
    with pytest.raises(ConfigError, match=said):
        share_for_training(there, count)


def test_cells_share_gpus():
    assert share_for_cells(cluster((16, 4), (16, 4)), 1, None) == Share(count=8, cpus=1, gpus=1)
    assert share_for_cells(cluster((16, 4), own=True), 2, None) == Share(count=8, cpus=2, gpus=0.5)
    assert share_for_cells(cluster((2, 4)), 1, None) == Share(count=4, cpus=0.5, gpus=1)
    assert share_for_cells(cluster((8, 0), (8, 0)), 1, None) == Share(count=2, cpus=8, gpus=0)
    assert share_for_cells(cluster((8, 0), own=True), 1, 4) == Share(count=4, cpus=2, gpus=0)
    with pytest.raises(ConfigError, match="room for 8"):
        share_for_cells(cluster((8, 0)), 1, 9)
    with pytest.raises(ConfigError, match="Nothing is free"):
        share_for_cells(cluster((8, 2), free=(8, 0)), 1, None)


def test_a_machine_that_does_not_see_the_output_folder_says_so(tmp_path):
    output = tmp_path / "runs" / "first"
    with beside(str(output)) as mark:
        go_to(os.getcwd(), mark, str(output))
        assert os.path.dirname(mark) == str(tmp_path)
    assert not any(tmp_path.iterdir())
    with pytest.raises(TheodoraError, match=r"does not see .* where .*first is to be written"):
        go_to(os.getcwd(), mark, str(output))


def test_an_address_where_nobody_is_is_refused_at_once():
    with socket.socket() as taken:  # bound, and listening to nobody
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match=r"Nobody answers at 127\.0\.0\.1:"):
            clusters._look_for(f"127.0.0.1:{taken.getsockname()[1]}")
    with pytest.raises(ConfigError, match="Nobody answers at here:soon"):
        clusters._look_for("here:soon")
    clusters._look_for("auto")


@pytest.mark.skipif("ray" in sys.modules, reason="Ray is here")
def test_without_ray_the_line_to_install_it_is_given(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(clusters, "find_spec", lambda name: None)
    arguments = ["train", "--model", "m", "--data", "d", "--output", str(tmp_path / "o"), "--launcher", "ray"]
    assert main(arguments) == 2
    assert "pip install 'theodora[ray]'" in capsys.readouterr().err


def test_flags_of_rays_without_it_are_refused(tmp_path, capsys):
    arguments = ["train", "--model", "m", "--data", "d", "--output", str(tmp_path / "o"), "--num-workers", "2"]
    assert main(arguments) == 2
    assert "--num-workers means nothing without --launcher ray" in capsys.readouterr().err


def test_two_launchers_are_one_too_many(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["train", "--model", "m", "--data", "d", "--output", str(tmp_path / "o"), "--launcher", "ray"]
    assert main(arguments) == 2
    assert "another launcher has started this process" in capsys.readouterr().err


def test_the_mailbox_waits_and_hands_over():
    async def talk():
        box = Mailbox()
        assert await box.take(0) == await box.take(0.01) == []
        waiting, asked = asyncio.create_task(box.take(10)), asyncio.create_task(box.signalled())
        await asyncio.sleep(0)
        await box.post(Said(number=0, text="a"))
        await box.signal(15)
        assert await waiting == [Said(number=0, text="a")]
        assert await asked == 15
        assert await box.take(0) == []

    asyncio.run(talk())


def test_text_arrives_in_its_order():
    posted: list[Any] = []
    mailbox = SimpleNamespace(post=SimpleNamespace(remote=posted.append))
    wire = Wire(SimpleNamespace(wait=lambda *_, **__: None), mailbox, "utf-8")
    for word in ("one ", "two ", "three"):
        print(word, end="", file=wire, flush=True)
    wire.finish()
    in_order = InOrder()
    assert [in_order(said) for said in (posted[1], posted[0], posted[2])] == ["", "one two ", "three"]


class FakeRay:
    """Actors in this process: `get` calls what was asked for."""

    class Gone(Exception):
        pass

    exceptions = SimpleNamespace(RayError=Gone)

    def __init__(self, actor: Any) -> None:
        self.actor, self.killed = actor, 0

    def remote(self, **_: Any) -> Any:
        def call(method: Any) -> Any:
            return SimpleNamespace(remote=lambda *args: (method, args))

        def make(*_: Any) -> Any:
            actor = self.actor()
            return SimpleNamespace(load=call(actor.load), run=call(actor.run))

        return lambda kind: SimpleNamespace(remote=make)

    def wait(self, refs: list[Any], timeout: float | None) -> Any:
        return refs[:1], refs[1:]

    def get(self, ref: Any) -> Any:
        method, args = ref
        return method(*args)

    def kill(self, actor: Any) -> None:
        self.killed += 1


def workers(actor: Any, count: int = 2) -> tuple[FakeRay, Workers]:
    ray = FakeRay(actor)
    return ray, OnRay(ray, SimpleNamespace(variants=()), Share(count=count, cpus=1, gpus=0), "")  # pyright: ignore


def test_cells_go_to_workers_that_are_ready():
    class Good:
        load = staticmethod(lambda: None)
        run = staticmethod(lambda cell: Record(key=cell.key, phase=cell.phase))

    ray, pool = workers(Good)
    assert pool.free() == 1
    pool.begin(cell := Cell(phase="base"))
    assert pool.running() == [cell]
    heard = list(pool.done())
    while not heard:
        heard = list(pool.done())
    assert heard == [(cell, Record(key="base", phase="base"))]
    assert pool.free() == 2
    pool.close()
    assert ray.killed == 2


def test_a_worker_that_dies_is_replaced_and_its_cell_told():
    class Dies:
        load = staticmethod(lambda: None)

        @staticmethod
        def run(cell):
            raise FakeRay.Gone("Worker unexpectedly exits with a connection error code 2.")

    _, pool = workers(Dies, count=1)
    assert pool.free() == 1
    pool.begin(cell := Cell(phase="base"))
    assert list(pool.done()) == [(cell, "killed (for want of memory, perhaps), or crashed")]
    assert pool.free() == 1


def test_workers_that_cannot_begin_end_the_comparison():
    class Refuses:
        load = staticmethod(lambda: "There is no model")
        run = None

    class Dies(Refuses):
        @staticmethod
        def load():
            raise FakeRay.Gone("gone")

    with pytest.raises(TheodoraError, match="There is no model"):
        workers(Refuses)[1].free()
    with pytest.raises(TheodoraError, match=r"died while it loaded the model \(gone\)"):
        workers(Dies)[1].free()


def test_a_machine_that_goes_away_says_nothing_of_the_cell():
    assert how_it_died(Exception("The actor died because its node has died.")) == "its node died"
    assert "out of memory" in how_it_died(Exception("killed by Ray's memory monitor"))
