"""Slots on the device, some adapters in host memory, the rest on disk: answers are those of each adapter alone."""

import itertools
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from serving import alone, expected, settled
from theodora.errors import CheckpointError
from theodora.files.folder import Place
from theodora.serve import scheduler
from theodora.serve.requests import Sampling
from theodora.serve.stamp import Changed, FolderStamp
from theodora.serve.tiers import HostTier

GREEDY = Sampling(max_tokens=5, temperature=0.0)
NAMES = ("dora4", "lora8", "dora3", "lora1", "head", "rows")


def ask(engine, name, prompt):
    return engine.submit(prompt, GREEDY, name, every_token=False)


def answer(request):
    output = request.updates.get(timeout=60)
    assert output.error is None, output.error
    return output.generated_tokens


def answer_of(name, folder, prompt):
    return expected(alone("llama", name, folder), prompt, 5)[0]


@pytest.mark.parametrize(("slots", "host"), [(2, 1), (1, 3), (3, 2)])
def test_more_adapters_than_slots_and_host_memory(engine_of, adapter_dir, slots, host):
    engine = engine_of("llama", *NAMES, slots=slots, host_adapters=host)
    assert len(engine.host) == host
    prompts = [[5, 6, 7, 8], [200, 3, 9]]
    wanted = {(n, tuple(p)): answer_of(n, adapter_dir(n), p) for n in NAMES for p in prompts}
    for _ in range(3):
        asked = [(name, prompt) for prompt, name in itertools.product(prompts, NAMES)]
        requests = [ask(engine, name, prompt) for name, prompt in asked]
        for (name, prompt), request in zip(asked, requests, strict=True):
            assert answer(request) == wanted[name, tuple(prompt)]
        assert len(engine.host) <= host
        assert sum(a.modules is not None for a in engine.adapters.adapters()) <= host
    assert engine.host.reads >= 2 * (len(NAMES) - host - slots)
    assert settled(engine)


def test_requests_of_the_base_and_of_slotted_adapters_do_not_wait_for_the_disk(engine_of, monkeypatch):
    engine = engine_of("llama", "dora4", "lora8", "dora3", slots=2, host_adapters=1)
    answer(ask(engine, "dora3", [5, 6]))  # into a slot, from memory
    reading = threading.Event()
    read = engine.host.read

    def slowly(adapter):
        reading.wait(60)
        return read(adapter)

    monkeypatch.setattr(engine.host, "read", slowly)
    cold = ask(engine, "dora4", [5, 6, 7])
    for name in (None, "dora3"):
        answer(ask(engine, name, [5, 6, 7]))
    reading.set()
    answer(cold)


def test_an_adapter_whose_files_changed_fails_its_requests_only(server_of, adapter_dir, tmp_path):
    import openai

    folder = tmp_path / "own"
    shutil.copytree(adapter_dir("dora4"), folder)
    server = server_of("lora8", slots=1, host_adapters=1)
    engine, create = server.engine, server.client.completions.create
    engine.load("own", folder)
    create(model="lora8", prompt="a", max_tokens=1)  # both were used: one is in the slot, none needs the disk yet
    create(model="own", prompt="a", max_tokens=1)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()

    def evict():
        engine.host.forget(engine.adapters.get("own"))
        create(model="lora8", prompt="a", max_tokens=1)

    def unreadable(*_):
        raise OSError("the disk is away")

    for damage, status in (
        (lambda patch: patch.setattr("theodora.serve.engine.read_served", unreadable), 503),
        (lambda _: weights.write_bytes(whole[:-100]), 409),
        (lambda _: weights.unlink(), 409),
        (lambda _: weights.write_bytes(whole), 409),  # as it was, but nobody can know
    ):
        evict()
        with pytest.MonkeyPatch.context() as patch:
            damage(patch)
            with pytest.raises(openai.APIStatusError) as error:
                create(model="own", prompt="a", max_tokens=1)
        assert error.value.status_code == status
        assert "'own' cannot be read again" in str(error.value)
        assert ("retry-after" in error.value.response.headers) == (status == 503)
        assert (error.value.response.headers.get("x-should-retry") == "false") == (status == 409)
        assert ("has changed since it was loaded" in str(error.value)) == (status == 409)
        assert create(model="lora8", prompt="a", max_tokens=1).choices
    assert engine.unload("own")
    engine.load("own", folder)
    assert create(model="own", prompt="a", max_tokens=1).choices
    assert settled(engine)


def test_a_request_waits_for_a_slot_but_not_for_ever(engine_of, adapter_dir, monkeypatch):
    monkeypatch.setattr(scheduler, "PATIENCE", 0.1)
    engine = engine_of("llama", "dora4", "lora8", slots=1)
    done, begun = threading.Event(), threading.Event()

    def busy():  # some request with the adapter that has the slot runs at any time
        running = []
        while not done.is_set():
            running.append(engine.submit([5, 6], Sampling(max_tokens=60, temperature=0.0), "dora4", every_token=False))
            if engine.running():
                begun.set()
            time.sleep(0.02)
        for request in running:
            request.updates.get(timeout=60)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        assert begun.wait(60)
        assert answer(ask(engine, "lora8", [7, 8])) == answer_of("lora8", adapter_dir("lora8"), [7, 8])
    finally:
        done.set()
        thread.join(60)


class Fake(SimpleNamespace):
    """Enough of an adapter."""

    def __init__(self, serial):
        super().__init__(serial=serial, modules={"tensors": serial}, users=1, leaving=False)


def tier(most, read=lambda adapter: {"tensors": adapter.serial}):
    executor = ThreadPoolExecutor(1)
    arrived = threading.Semaphore(0)
    return HostTier(most, executor, read, arrived.release), arrived


def test_the_least_recently_used_gives_way():
    host, arrived = tier(2)
    a, b, c = (Fake(n) for n in range(3))
    host.add(a), host.add(b)
    assert host.take(a) == {"tensors": 0}
    host.placed(a)
    host.add(c)
    assert b.modules is None
    assert a.modules
    assert c.modules
    assert host.take(b) is None
    assert arrived.acquire(timeout=60)
    assert host.take(b) == {"tensors": 1}
    assert len(host) == 2
    assert a.modules is None


def test_no_more_is_read_at_once_than_has_room():
    host, _ = tier(2)
    adapters = [Fake(n) for n in range(6)]
    for adapter in adapters:
        host.add(adapter)
    cold = [adapter for adapter in adapters if adapter.modules is None]
    assert len(cold) == 4
    taken = set()
    deadline = time.monotonic() + 60
    while len(taken) < 4 and time.monotonic() < deadline:
        for adapter in cold:
            if adapter.serial not in taken and host.take(adapter) is not None:
                taken.add(adapter.serial)
                host.placed(adapter)
        assert len(host) <= 2
    assert len(taken) == 4


def test_what_is_forgotten_while_it_is_read_does_not_come_back():
    go = threading.Event()

    def read(adapter):
        go.wait(60)
        return {"tensors": adapter.serial}

    host, arrived = tier(1, read)
    a, b = Fake(0), Fake(1)
    host.add(a), host.add(b)
    assert host.take(a) is None
    a.leaving, a.users = True, 0
    host.forget(a)
    go.set()
    assert arrived.acquire(timeout=60)
    assert a.modules is None
    assert host.take(a) is None  # nor is it read again
    assert len(host) == 1


def test_a_failure_is_told_once():
    def read(adapter):
        raise OSError("no such disk")

    host, arrived = tier(1, read)
    a, b = Fake(0), Fake(1)
    host.add(a), host.add(b)
    assert host.take(a) is None
    assert arrived.acquire(timeout=60)
    with pytest.raises(CheckpointError, match="no such disk"):
        host.take(a)
    assert host.take(a) is None  # and tried again


def test_a_failure_is_not_told_to_those_who_come_later():
    broken = [True]

    def read(adapter):
        if broken:
            raise OSError("no such disk")
        return {"tensors": adapter.serial}

    host, arrived = tier(1, read)
    a, b = Fake(0), Fake(1)
    host.add(a), host.add(b)
    assert host.take(a) is None
    assert arrived.acquire(timeout=60)
    a.users = 0
    host.unneeded(a)
    broken.clear()
    a.users = 1
    assert host.take(a) is None
    assert arrived.acquire(timeout=60)
    assert host.take(a) == {"tensors": 0}


@pytest.mark.parametrize("when", ["while it is read", "when it has come"])
def test_what_was_read_for_requests_that_are_gone_makes_room(when):
    go = threading.Event()

    def read(adapter):
        go.wait(60)
        return {"tensors": adapter.serial}

    host, arrived = tier(1, read)
    a, b, c = (Fake(n) for n in range(3))
    host.add(a), host.add(b), host.add(c)
    assert host.take(a) is None
    if when == "when it has come":
        go.set()
        assert arrived.acquire(timeout=60)
    a.users = 0
    host.unneeded(a)
    if when == "while it is read":
        assert host.take(b) is None  # there is no room yet
        go.set()
        assert arrived.acquire(timeout=60)
    assert a.modules  # it may be asked for again
    assert host.take(b) is None
    assert arrived.acquire(timeout=60)
    assert host.take(b) == {"tensors": 1}
    assert a.modules is None


def test_what_waits_for_a_slot_stays():
    host, arrived = tier(1)
    a, b = Fake(0), Fake(1)
    host.add(a), host.add(b)
    for _ in range(3):  # both are asked for at each batch
        assert host.take(b) == {"tensors": 1}
        assert host.take(a) is None
    host.placed(b)
    assert host.take(a) is None
    assert arrived.acquire(timeout=60)
    for _ in range(3):
        assert host.take(a) == {"tensors": 0}
        assert host.take(b) is None
    assert host.reads == 1


def test_after_the_end_nothing_is_read():
    executor = ThreadPoolExecutor(1)
    host = HostTier(1, executor, lambda _: pytest.fail("it was read"), lambda: None)
    a, b = Fake(0), Fake(1)
    host.add(a), host.add(b)
    executor.shutdown()
    assert host.take(a) is None


@pytest.mark.parametrize("forgotten", [False, True])
def test_tensors_that_move_come_back_only_for_an_adapter_that_is_there(forgotten):
    host, _ = tier(None)
    a, went = Fake(0), Fake(1)
    went.modules = None
    host.add(a)

    def change(tensors):
        if forgotten:
            host.forget(a)
        return {"moved": tensors}

    host.move(a, change)
    host.move(went, change)
    assert a.modules == (None if forgotten else {"moved": {"tensors": 0}})
    assert went.modules is None


def test_a_failure_is_kept_for_nobody_who_has_gone():
    go = threading.Event()

    def read(adapter):
        go.wait(60)
        raise OSError("no such disk")

    host, arrived = tier(1, read)
    a, b = Fake(0), Fake(1)
    host.add(a), host.add(b)
    assert host.take(a) is None
    a.users = 0
    go.set()
    assert arrived.acquire(timeout=60)
    a.users = 1
    assert host.take(a) is None  # read again, and told if it fails again
    assert arrived.acquire(timeout=60)
    with pytest.raises(CheckpointError, match="no such disk"):
        host.take(a)


def test_a_folder_that_cannot_be_asked(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        FolderStamp.of(Place(tmp_path / ("x" * 300)))
    (tmp_path / "file").touch()
    assert FolderStamp.of(Place(tmp_path / "file")).files == (
        None,
        None,
    )  # as if it were not there


@pytest.mark.parametrize("inside", [True, False])
def test_a_folder_that_became_a_link_has_changed(tmp_path, adapter_dir, inside):
    own = tmp_path / "root" / "own"
    shutil.copytree(adapter_dir("lora8"), own)
    stamp = FolderStamp.of(Place(own, within=tmp_path / "root" if inside else None))
    stamp.check()
    own.rename(tmp_path / "was")
    own.symlink_to(adapter_dir("dora4"))
    with pytest.raises(Changed, match="has changed since it was loaded"):
        stamp.check()


def slowed(engine, monkeypatch):
    """Adapters are read when the event that this gives is set."""
    go, read = threading.Event(), engine.host.read
    monkeypatch.setattr(engine.host, "read", lambda adapter: read(adapter) if go.wait(60) else None)
    return go


def test_a_client_that_hangs_up_while_its_adapter_is_read_holds_up_nobody(engine_of, adapter_dir, monkeypatch):
    engine = engine_of("llama", "dora4", "lora8", "dora3", slots=1, host_adapters=1)
    go = slowed(engine, monkeypatch)
    gone = ask(engine, "dora4", [5, 6])
    deadline = time.monotonic() + 60
    while not engine.host.wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    engine.cancel(gone)
    go.set()
    assert answer(ask(engine, "lora8", [5, 6])) == answer_of("lora8", adapter_dir("lora8"), [5, 6])


def test_requests_that_wait_for_a_slot_read_the_disk_once(engine_of):
    engine = engine_of("llama", "dora4", "lora8", "dora3", slots=1, host_adapters=1)
    answer(ask(engine, "dora4", [5, 6]))
    before = engine.host.reads
    running = engine.submit([5, 6], Sampling(max_tokens=60, temperature=0.0), "dora4", every_token=False)
    waiting = [ask(engine, name, [5, 6]) for name in ("lora8", "dora3")]
    for request in (running, *waiting):
        answer(request)
    assert engine.host.reads - before <= 2


def test_an_adapter_that_is_unloaded_as_soon_as_it_is_there_leaves_nothing(engine_of, adapter_dir, monkeypatch):
    engine = engine_of("llama")
    add = engine.adapters.add
    monkeypatch.setattr(engine.adapters, "add", lambda adapter: (add(adapter), engine.unload(adapter.name))[0])
    engine.load("dora4", adapter_dir("dora4"))
    assert not len(engine.host)
    assert not engine.adapters.names()


def test_what_is_in_memory_does_not_change_with_the_file(engine_of, adapter_dir, tmp_path):
    shutil.copytree(adapter_dir("lora8"), tmp_path / "own")
    engine = engine_of("llama")
    adapter = engine.load("own", tmp_path / "own")
    held = [tensor for tensors in adapter.modules.values() for tensor in tensors.tensors()]
    before = [tensor.clone() for tensor in held]
    other = (adapter_dir("lora8", seed=1) / "adapter_model.safetensors").read_bytes()
    with (tmp_path / "own/adapter_model.safetensors").open("r+b") as file:  # in place
        file.write(other)
    assert all(map(torch.equal, held, before))


def test_a_folder_that_changes_while_it_is_read_is_not_loaded(engine_of, adapter_dir, tmp_path, monkeypatch):
    from theodora.serve import engine as module

    shutil.copytree(adapter_dir("lora8"), tmp_path / "own")
    engine, read = engine_of("llama"), module.read_served

    def racing(path, *rest):
        file = read(path, *rest)
        shutil.copyfile(adapter_dir("lora8", seed=1) / "adapter_model.safetensors", tmp_path / "new")
        (tmp_path / "new").replace(path / "adapter_model.safetensors")
        return file

    monkeypatch.setattr(module, "read_served", racing)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        engine.load("own", tmp_path / "own")
    monkeypatch.undo()
    engine.load("own", tmp_path / "own")


def test_memory_that_cannot_be_pinned_is_told(engine_of, monkeypatch, caplog):
    engine = engine_of("llama", "dora4")
    (adapter,) = engine.adapters.adapters()
    monkeypatch.setattr(engine.host, "move", lambda *_: 1 / 0)
    engine.move_to_host(adapter)
    assert "dora4 stays in the memory of cpu: division by zero" in caplog.text


def test_metrics_tell_the_tiers(server_of):
    import http.client

    server = server_of("dora4", "lora8", slots=1, host_adapters=1)
    for name in ("dora4", "lora8", "dora4"):
        server.client.completions.create(model=name, prompt="a", max_tokens=1)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found = {
        line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line.startswith("theodora_adapter")
    }
    assert found["theodora_adapters_in_host_memory"] == found["theodora_adapters_in_slots"] == 1, json.dumps(found)
    assert found["theodora_adapter_reads_total"] >= 1
