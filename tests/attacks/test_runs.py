"""Kills at any write, two runs on one folder, damaged checkpoints, changed inputs, what kills leave in TMPDIR."""

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import tiny
from theodora import locks
from theodora.cli.main import main
from theodora.config import TrainConfig
from theodora.errors import ConfigError, UsageError
from theodora.export import exporting
from theodora.files.alone import LOCK, alone_in
from theodora.merging import merge_checkpoint as merge
from theodora.train import train
from theodora.train.checkpoints import check_output, find_checkpoint, is_doomed, newest_checkpoint

merge_checkpoint = importlib.import_module("theodora.merging.checkpoint")  # the package has its function there
_OPTIONS = {"rank": 2, "per_device_train_batch_size": 4, "held_out": 0, "bf16": False, "save_total_limit": 9}


@pytest.fixture
def command(tiny_model_dir, rows, tmp_path, capsys):
    """Run `theodora train` in this process; gives its exit code and all that it said."""

    def run(*more, **options):
        options = {"model": tiny_model_dir(), "data": rows, "output": tmp_path / "run", **_OPTIONS, **options}
        given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        code = main(["train", *given, *more])
        said = capsys.readouterr()
        return code, " ".join((said.out + said.err).replace("│", " ").split())

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir, rows):
    """A run with checkpoints at steps 2 and 4. Copy it."""
    output = tmp_path_factory.mktemp("finished") / "run"
    options = {**_OPTIONS, "model": str(tiny_model_dir()), "data": str(rows), "output": str(output)}
    train(TrainConfig.from_options({**options, "max_steps": 4, "save_steps": 2}))
    return output


class Kills:
    """What a kill before each change of a name in a folder would leave there: copies, taken while a run goes on."""

    def __init__(self, monkeypatch, folder: Path, copies: Path) -> None:
        self.folder, self.copies, self.seen = folder, copies, set[str]()
        self.link = os.link  # names of the same files do: all but the log is written aside, and renamed
        for name in ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "link"):
            monkeypatch.setattr(os, name, self._watched(getattr(os, name)))

    def _watched(self, change):
        def changed(*args, **kwargs):
            self._copy()
            return change(*args, **kwargs)

        return changed

    def _copy(self) -> None:
        if not self.folder.is_dir() or self.copies in self.folder.parents:
            return
        files = sorted(path for path in self.folder.rglob("*"))
        look = repr([(str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in files])
        if look not in self.seen:
            self.seen.add(look)
            watched, self.folder = self.folder, self.copies / "nowhere"
            shutil.copytree(watched, self.copies / str(len(self.seen)), copy_function=self.link)
            self.folder = watched

    def __iter__(self):
        return iter(sorted(self.copies.iterdir(), key=lambda path: int(path.name)))


def may_go_on(state):
    """Check what is asked before a run goes on in, or begins over, what a kill left."""
    check_output(state, overwrite=True, resume=None)
    check_output(state, overwrite=False, resume="auto")
    return find_checkpoint("auto", state)


def test_a_kill_at_any_write_of_a_new_run_leaves_what_auto_and_overwrite_take(command, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kills = Kills(patch, tmp_path / "run", tmp_path / "killed")
        assert command("--resume", "auto", max_steps=2, save_steps=1)[0] == 0
    found = [may_go_on(state) for state in kills]
    steps = [0 if checkpoint is None else int(checkpoint.name.partition("-")[2]) for checkpoint in found]
    assert len(steps) > 20
    assert {*steps} == {0, 1, 2}
    assert steps == sorted(steps)  # what was whole stays
    assert all((state / "config.yaml").is_file() for state in kills if (state / "checkpoints").exists())
    assert not list((tmp_path / "run").glob(".*"))  # neither lock nor leftovers beside a finished adapter


def test_a_kill_at_any_write_of_an_overwriting_run_leaves_the_old_one_or_none(command, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    with monkeypatch.context() as patch:
        kills = Kills(patch, tmp_path / "run", tmp_path / "killed")
        assert command("--overwrite", max_steps=1, save_steps=1, seed=7)[0] == 0
    old = {path.name for path in finished.iterdir()}
    for state in kills:
        if "seed: 7" in (state / "config.yaml").read_text() or is_doomed(state):
            assert (may_go_on(state) or state / "checkpoint-1").name == "checkpoint-1"  # never one of the old run's
        else:
            check_output(state, overwrite=True, resume=None)
            assert newest_checkpoint(state).name == "checkpoint-4"
            assert old <= {path.name for path in state.iterdir()}
    assert any(is_doomed(state) for state in kills)


def test_what_a_killed_beginning_leaves_is_begun_anew_and_foreign_files_are_not(command, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("# Every setting of this run. It has only begun.\n")
    (tmp_path / "run" / LOCK).write_text("{}")
    check_output(tmp_path / "run", overwrite=False, resume=None)
    (tmp_path / "run" / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"README.md, but no run of theodora"):
        check_output(tmp_path / "run", overwrite=True, resume=None)
    (tmp_path / "run" / "README.md").unlink()
    assert command(max_steps=1)[0] == 0


def test_a_run_that_is_refused_leaves_no_mark(command, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert command(data=tmp_path / "empty.jsonl")[0] == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused_to_all_and_names_the_holder(command, finished, tmp_path):
    output = shutil.copytree(finished, tmp_path / "run")
    before = sorted(output.rglob("*"))
    with alone_in(output):
        for how in (["--overwrite"], ["--resume"], ["--resume", "auto"], []):
            code, said = command(*how, max_steps=4)
            assert code == 2
            assert f"in use by process {os.getpid()} on" in said
    assert sorted(output.rglob("*")) == before
    assert command("--resume", "auto", max_steps=4)[0] == 0


def test_a_lock_is_not_taken_on_a_file_that_was_deleted_in_between(tmp_path, monkeypatch):
    """Else the one has the file that is gone, and the next one that comes has another: both are at work."""
    calls = []

    def slow(descriptor):
        if not calls:  # the holder before ends now: it had deleted the file, which was opened already
            calls.append((tmp_path / LOCK).unlink())
        return locks.try_lock(descriptor)

    monkeypatch.setattr("theodora.files.alone.try_lock", slow)
    with alone_in(tmp_path), pytest.raises(UsageError, match="in use"), alone_in(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_forked_process_does_not_hold_what_its_parent_held(tmp_path):
    with (tmp_path / "file").open("w") as file, (tmp_path / "file").open("w") as other:
        assert locks.try_lock(file.fileno())
        (reading, writing), (ready, tell) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.write(tell, b"x")
            os.read(reading, 1)  # outlives the lock
            os._exit(int(locks.holds(file.fileno())))
        os.read(ready, 1)
        assert locks.try_lock(other.fileno()) is False  # that it closed its copy took nothing from this process
        locks._held.discard(file.fileno())
        file.close()  # as the kernel does when a process dies
        assert locks.try_lock(other.fileno()) is True
        locks._held.discard(other.fileno())
        os.write(writing, b"x")
        assert os.waitpid(child, 0)[1] == 0
        for end in (reading, writing, ready, tell):
            os.close(end)


@pytest.mark.parametrize("kind", ["a link", "a folder", "no plain file"])
def test_what_stands_at_the_locks_name_is_neither_followed_nor_waited_for(kind, tmp_path):
    make = {"a link": lambda path: path.symlink_to(tmp_path / "x"), "a folder": Path.mkdir, "no plain file": os.mkfifo}
    make[kind](tmp_path / LOCK)
    with pytest.raises(UsageError, match=f"is {kind}; expected the file of a lock"), alone_in(tmp_path):
        pass
    assert os.path.lexists(tmp_path / LOCK)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("host", ["elsewhere", None])
def test_what_was_left_by_another_machine_or_without_locks_is_said(host, tmp_path, monkeypatch):
    owner = {"pid": 7, "host": host, "machine": "x", "since": "[red]then"}
    (tmp_path / LOCK).write_text(json.dumps(owner) if host else "no JSON")
    if host is None:
        monkeypatch.setattr(locks, "fcntl", None)
    with alone_in(tmp_path) as notes:
        assert "process 7 on elsewhere, begun" in notes[0] if host else "has no locks" in notes[0]
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(command, finished, tmp_path):
    output = shutil.copytree(finished, tmp_path / "run")
    file = output / "checkpoints" / "checkpoint-4" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[::-1])  # of the same size
    code, said = command("--resume", max_steps=4, save_steps=2)
    assert code == 0
    assert "passed over" in said
    assert "optimizer.pt has changed" in said


def test_data_changed_in_place_are_refused_and_moved_ones_go_on(command, finished, tiny_model_dir, rows, tmp_path):
    output, data = tmp_path / "run", tmp_path / "rows.jsonl"
    shutil.copytree(finished, output)
    shutil.copy(rows, data)
    assert command("--resume", data=data, max_steps=5)[0] == 0  # the same rows, elsewhere
    data.write_text(data.read_text().replace("1 + 1 = 2", "1 + 1 =  3").replace('" 2"', '" 3"'))
    for how in (["--resume"], ["--resume", "auto"]):
        code, said = command(*how, data=data, max_steps=6)
        assert code == 2
        assert f"data: the rows of {data} have changed" in said
        assert "--from-adapter" in said
    assert newest_checkpoint(output).name == "checkpoint-5"
    other = shutil.copy(data, tmp_path / "other.jsonl")  # asked for by name: a note
    code, said = command("--resume", data=other, max_steps=6)
    assert code == 0
    assert "changed since the run began: the rows of data" in said


@pytest.mark.parametrize("what", ["the weights of the base model", "the tokenizer or its chat template"])
def test_a_base_or_template_changed_in_place_is_refused(what, command, tiny_model_dir, tmp_path):
    model = shutil.copytree(tiny_model_dir(), tmp_path / "model")
    assert command(model=model, max_steps=1)[0] == 0
    if "base" in what:
        tiny.tiny_model(seed=1).save_pretrained(model)
    else:
        file = model / "chat_template.jinja"
        file.write_text(file.read_text().replace("<|im_start|>", "<|im_start|>:"))
    code, said = command("--resume", model=model, max_steps=2)
    assert code == 2
    assert what in said


@pytest.mark.parametrize("name", ["checkpoint-9", "mine/run"])
def test_no_run_begins_among_the_checkpoints_of_another(name, command, finished, tmp_path):
    output = shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "link").symlink_to(output / "checkpoints")
    before = sorted(output.rglob("*"))
    for inner in (output / "checkpoints" / name, tmp_path / "link" / name):
        code, said = command(output=inner, max_steps=1)
        assert code == 2
        assert "among the checkpoints" in said
    assert sorted(output.rglob("*")) == before


def test_a_merge_or_export_does_not_replace_a_run_that_began_in_its_place(finished, tmp_path, monkeypatch):
    output = tmp_path / "out"

    def run_begins(folder, form, **more):
        written(folder, form, **more)
        with contextlib.suppress(FileExistsError):
            shutil.copytree(finished, output)

    for module, make in ((merge_checkpoint, merge), (exporting, exporting.export_adapter)):
        written = module.mark_written
        monkeypatch.setattr(module, "mark_written", run_begins)
        with pytest.raises(UsageError, match=r"no earlier (merge|export)"):
            make(finished, output, *(["peft"] if module is exporting else []), overwrite=True)
        assert newest_checkpoint(output)
        shutil.rmtree(output)
        assert not list(tmp_path.glob(".out*"))


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """An empty TMPDIR."""
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_folders_that_a_kill_left_in_tmpdir_go_and_no_others(temporary, tmp_path):
    dead, lock = locks._new_folder("data")
    (dead / "files" / "rows.arrow").write_text("rows")
    locks.release(lock)  # as the kernel does when a process dies
    elsewhere, lock = locks._new_folder("export")
    (elsewhere / locks._OWNER).write_text(json.dumps({"host": "another", "machine": "another", "pid": 1}))
    locks.release(lock)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / locks._OWNER).write_text(json.dumps(locks.this_process()))
    (temporary / "theodora-data-abcdefgh").symlink_to(tmp_path / "precious")
    (temporary / "theodora-data-mineown1").mkdir()
    with locks.temporary_folder("data") as living:
        locks.clear_dead(temporary)
        assert living.is_dir()
        left = {path.name for path in temporary.iterdir()}
        assert left == {living.parent.name, elsewhere.name, "theodora-data-abcdefgh", "theodora-data-mineown1"}
    assert not living.parent.exists()
    assert (tmp_path / "precious").is_dir()


@pytest.mark.long
def test_what_a_kill_left_is_gone_on_from_to_the_same_bits(command, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kills = Kills(patch, tmp_path / "run", tmp_path / "killed")
        assert command("--resume", "auto", max_steps=3, save_steps=1)[0] == 0
    wanted = load_file(tmp_path / "run" / "adapter_model.safetensors")
    for state in list(kills)[::7]:
        assert command("--resume", "auto", output=state, max_steps=3, save_steps=1)[0] == 0
        found = load_file(state / "adapter_model.safetensors")
        assert all((found[key] == wanted[key]).all() for key in wanted), state
        assert not list(state.glob(".*.partial-*"))


@pytest.mark.long
def test_sigkill_leaves_nothing_in_tmpdir_for_good_and_no_lock(tiny_model_dir, rows, tmp_path):
    folder, output = tmp_path / "t", tmp_path / "run"
    folder.mkdir()
    words = ["--model", str(tiny_model_dir()), "--data", str(rows), "--output", str(output), "--rank", "2"]
    words = [sys.executable, "-m", "theodora", "train", *words, "--held-out", "0", "--dataloader-num-workers", "1"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    process = subprocess.Popen([*words, "--max-steps", "5000", "--save-steps", "2"], env=environment)
    deadline = time.monotonic() + 120
    while newest_checkpoint(output) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    again = subprocess.run([*words, "--overwrite"], env=environment, capture_output=True, text=True)
    assert again.returncode == 2
    assert f"process {process.pid}" in again.stderr
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(folder.glob("theodora-data-*"))
    steps = int(newest_checkpoint(output).name.partition("-")[2])
    subprocess.run([*words, "--resume", "auto", "--max-steps", str(steps + 3)], env=environment, check=True)
    assert not list(folder.glob("theodora-*"))
    assert not (output / LOCK).exists()


@pytest.mark.long
def test_of_two_runs_begun_at_once_one_is_refused(tiny_model_dir, rows, tmp_path):
    words = ["--model", str(tiny_model_dir()), "--data", str(rows), "--output", str(tmp_path / "run")]
    words = [sys.executable, "-m", "theodora", "train", *words, "--held-out", "0", "--max-steps", "9"]
    runs = [subprocess.Popen([*words, "--seed", str(seed)], stderr=subprocess.PIPE, text=True) for seed in (1, 2)]
    said = [run.communicate()[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2]
    assert any("already holds a run" in text or "in use by" in text for text in said)
