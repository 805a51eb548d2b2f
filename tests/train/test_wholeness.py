"""A damaged checkpoint is told, passed over by `--resume auto`, and refused by name; a whole one goes on as ever."""

import io
import json
import shutil
import zipfile

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from theodora.config import TrainConfig
from theodora.errors import CheckpointError, ConfigError, TheodoraError
from theodora.files.ours import MARK, changes
from theodora.train import train, wholeness
from theodora.train.checkpoints import check_output, find_checkpoint, newest_checkpoint, passed_over
from theodora.train.inputs import INPUTS_FILE
from theodora.train.outcome import Outcome
from theodora.train.wholeness import faults, read_state


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir, sums):
    """A run with checkpoints at steps 2 and 4."""
    output = tmp_path_factory.mktemp("run") / "run"
    options = {"max_steps": 4, "save_steps": 2, "save_total_limit": 9, "held_out": 0, "bf16": False}
    options |= {"model": str(tiny_model_dir()), "data": str(sums), "output": str(output), "rank": 2}
    train(TrainConfig.from_options(options | {"learning_rate": 1e-2}), console=Console(quiet=True))
    return output


@pytest.fixture
def output(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def flip(path, at):
    """Turn one bit over; `at` is a share of the file."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def flip_in_archive(path):
    """Turn one bit of the largest record over (between records there is padding, which nothing reads)."""
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
        with archive.open(record) as file:
            before = file.read()
    flip(path, (path.read_bytes().index(before) + 0.5) / path.stat().st_size)


def state(checkpoint, **others):
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | others))


def cut(name, to=0.5):
    def damage(newest, _):
        path = newest / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * to)])

    return damage


def of_another(name):
    return lambda newest, older: shutil.copy(older / name, newest / name)


DAMAGES = {
    "optimizer.pt cut off": ("optimizer.pt", cut("optimizer.pt")),
    "optimizer.pt empty": ("optimizer.pt", cut("optimizer.pt", 0)),
    "scheduler.pt cut off": ("scheduler.pt", cut("scheduler.pt")),
    "rng_state.pth cut off": ("rng_state.pth", cut("rng_state.pth")),
    "unlogged.json empty": ("unlogged.json", cut("unlogged.json", 0)),
    "a bit of the adapter": ("adapter_model.safetensors", lambda n, _: flip(n / "adapter_model.safetensors", 0.9)),
    "a bit of the optimizer": ("optimizer.pt", lambda n, _: flip_in_archive(n / "optimizer.pt")),
    "the optimizer of another": ("optimizer.pt", of_another("optimizer.pt")),
    "the adapter of another": ("adapter_model.safetensors", of_another("adapter_model.safetensors")),
    "the state of another": ("trainer_state.json", of_another("trainer_state.json")),
    "a list as state": ("trainer_state.json", lambda n, _: (n / "trainer_state.json").write_text("[]")),
    "null steps": ("trainer_state.json", lambda n, _: state(n, global_step=None)),
    "negative steps": ("trainer_state.json", lambda n, _: state(n, global_step=-4)),
    "no optimizer": ("optimizer.pt", lambda n, _: (n / "optimizer.pt").unlink()),
    "no random states": ("rng_state.pth", lambda n, _: (n / "rng_state.pth").unlink()),
    "other bytes, one size": ("scheduler.pt", lambda n, _: flip_in_archive(n / "scheduler.pt")),
    "no manifest": (MARK, lambda n, _: (n / MARK).unlink()),
    "a manifest that is none": (MARK, lambda n, _: (n / MARK).write_text("{")),
    "a manifest that is a list": (MARK, lambda n, _: (n / MARK).write_text("[]")),
}
# What can be told without a manifest: these files tell of themselves.
SELF_TOLD = [
    name
    for name in DAMAGES
    if name
    not in ("the optimizer of another", "the adapter of another", "no random states", "other bytes, the same size")
    and "manifest" not in name
]


def as_of_an_older_version(checkpoint):
    for name in (MARK, INPUTS_FILE):
        (checkpoint / name).unlink()


def damaged(output, damage):
    checkpoints = output / "checkpoints"
    DAMAGES[damage][1](checkpoints / "checkpoint-4", checkpoints / "checkpoint-2")
    return checkpoints / "checkpoint-4", checkpoints / "checkpoint-2"


def test_a_checkpoint_lists_its_files_last(finished):
    for step in (2, 4):
        checkpoint = finished / "checkpoints" / f"checkpoint-{step}"
        listed = json.loads((checkpoint / MARK).read_text())
        assert listed["form"] == "checkpoint"
        assert {*listed["sha256"], MARK} == {path.name for path in checkpoint.iterdir()}
        assert {"optimizer.pt", "rng_state.pth", "trainer_state.json", "unlogged.json"} <= {*listed["sha256"]}
        assert all((checkpoint / MARK).stat().st_mtime_ns >= path.stat().st_mtime_ns for path in checkpoint.iterdir())
        assert faults(checkpoint) == changes(checkpoint) == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_passed_over_and_refused(damage, output):
    name, _ = DAMAGES[damage]
    newest, older = damaged(output, damage)
    assert any(fault.startswith(name) for fault in faults(newest))
    assert find_checkpoint("auto", output) == find_checkpoint(True, output) == older
    (note,) = passed_over(output, older)
    assert note.startswith(f"passed over {newest}: {name}")
    with pytest.raises(CheckpointError) as refusal:
        find_checkpoint(str(newest), output)
    assert name in str(refusal.value)
    assert f"Go on from the newest whole one, {older}" in str(refusal.value)


@pytest.mark.parametrize("damage", SELF_TOLD)
def test_of_an_older_version_what_can_be_read_is_checked(damage, output):
    for checkpoint in (output / "checkpoints").iterdir():
        as_of_an_older_version(checkpoint)
    newest, older = damaged(output, damage)
    assert any(fault.startswith(DAMAGES[damage][0]) for fault in faults(newest))
    assert find_checkpoint("auto", output) == older
    passed, unlisted = passed_over(output, older)
    assert str(newest) in passed
    assert f"{older} has no list of its files" in unlisted


def test_of_an_older_version_a_whole_one_goes_on_with_a_word(output):
    newest = output / "checkpoints" / "checkpoint-4"
    as_of_an_older_version(newest)
    assert find_checkpoint(str(newest), output) == newest
    (note,) = passed_over(output, newest)
    assert "could not be" in note


def test_what_was_expected_and_found_is_said(output):
    newest, _ = damaged(output, "a bit of the optimizer")
    expected = json.loads((newest / MARK).read_text())["sha256"]["optimizer.pt"]
    (fault,) = faults(newest)
    assert f"written as {expected[:12]}" in fault
    assert expected[:12] not in fault.partition("written as")[0]


def test_the_folders_number_is_the_states(output):
    moved = (output / "checkpoints" / "checkpoint-4").rename(output / "checkpoints" / "checkpoint-7")
    assert faults(moved) == ["trainer_state.json is of another checkpoint: its global_step is 4, and the folder's 7"]
    elsewhere = shutil.copytree(output / "checkpoints" / "checkpoint-2", output / "kept")
    assert find_checkpoint(str(elsewhere), output) == elsewhere


@pytest.mark.parametrize("resume", ["auto", "named"])
def test_a_run_goes_on_from_the_whole_one_and_says_so(resume, output, finished, tiny_model_dir, sums):
    newest, older = damaged(output, "the optimizer of another")
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        (output / name).unlink()
    options = {"max_steps": 4, "save_steps": 2, "save_total_limit": 9, "held_out": 0, "bf16": False}
    options |= {"model": str(tiny_model_dir()), "data": str(sums), "output": str(output), "rank": 2}
    options |= {"learning_rate": 1e-2, "resume": str(newest) if resume == "named" else "auto"}
    console = Console(file=io.StringIO(), width=400)
    if resume == "named":
        with pytest.raises(CheckpointError, match=r"optimizer.pt has changed"):
            train(TrainConfig.from_options(options), console=console)
        return
    train(TrainConfig.from_options(options), console=console)
    said = console.file.getvalue()
    assert f"passed over {newest}: optimizer.pt has changed" in said
    wanted = load_file(finished / "adapter_model.safetensors")
    found = load_file(output / "adapter_model.safetensors")
    assert all((found[key] == wanted[key]).all() for key in wanted)  # the same bits as without the damage
    assert newest_checkpoint(output) == newest  # written anew
    assert older.is_dir()


def test_none_is_whole(output):
    for checkpoint in (output / "checkpoints").iterdir():
        (checkpoint / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"checkpoint-4: optimizer.pt has changed(.|\n)*checkpoint-2: optimizer.pt"):
        find_checkpoint(True, output)
    assert find_checkpoint("auto", output) is None
    assert len(passed_over(output, None)) == 2
    with pytest.raises(ConfigError, match=r"passed over .*checkpoint-4: optimizer.pt has changed"):
        check_output(output, overwrite=False, resume="auto")


def test_nothing_is_hashed_twice(output, monkeypatch):
    hashed = []
    monkeypatch.setattr(wholeness, "changes", lambda folder: hashed.append(folder) or [])
    wholeness._faults.cache_clear()
    for _ in range(3):
        newest_checkpoint(output)
    assert len(hashed) == 1
    cut("optimizer.pt")(output / "checkpoints" / "checkpoint-4", None)
    newest_checkpoint(output)
    assert len(hashed) == 2


@pytest.mark.parametrize("leftover", [None, ".checkpoint-2.partial-x", ".checkpoint-2.begun-x"])
def test_a_run_killed_before_its_record_was_written_begins_again(leftover, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    if leftover:
        (tmp_path / "checkpoints" / leftover).mkdir()
    check_output(tmp_path, overwrite=False, resume="auto")
    (tmp_path / "checkpoints" / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match="none of"):
        check_output(tmp_path, overwrite=False, resume="auto")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "it holds a list"),
        ("null", "it holds null"),
        ("{}", "its global_step is null"),
        ('{"global_step": -1}', "its global_step is -1"),
        ('{"global_step": 0}', "its global_step is 0"),
        ('{"global_step": true}', "its global_step is true"),
        ('{"global_step": 2.5}', "its global_step is 2.5"),
        ('{"global_step": "4"}', 'its global_step is "4"'),
        ('{"global_step": 4, "log_history": {}}', "its log_history is a mapping"),
        ('{"global_step": 4, "log_history": [1]}', "its log_history is a list"),
        ('{"global_step": 4, "max_steps": "x"}', "its max_steps is a text"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_states_that_are_none(text, why, tmp_path):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(ValueError, match=why.replace("(", r"\(")):
        read_state(tmp_path)


def test_an_adapter_in_a_checkpoint_written_by_another_program_is_told(output):
    newest = output / "checkpoints" / "checkpoint-4"
    path = newest / "adapter_model.safetensors"
    save_file({key: 2 * tensor for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert faults(newest)[0].startswith("adapter_model.safetensors has changed")


def test_a_checkpoint_whose_next_step_diverged_is_passed_over(tmp_path, run, monkeypatch):
    """Else a run that is started again goes on from ruined weights for ever, whatever its learning rate is by then."""
    steps = {"save_steps": 1, "save_total_limit": 9, "held_out": 0, "method": "lora", "max_grad_norm": 0}
    monkeypatch.setattr(Outcome, "check", lambda self: None)  # as where the rows of the step itself do not tell
    with pytest.raises(TheodoraError, match="diverged: loss is nan at step 2"):
        run(learning_rate=1e30, **steps)
    ruined = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    assert "diverged.json" in faults(ruined)[0]
    assert run(learning_rate=1e-3, resume="auto", **steps).steps == 4
    assert faults(ruined) == []  # written anew
