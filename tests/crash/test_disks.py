"""Full disks, read-only folders, limits on files: a clear error, and the checkpoint from before is there, whole."""

import os

import pytest

from crash import disks, jobs
from crash.killing import check_whole, contents, fork_server

_LONG = pytest.mark.skipif("THEODORA_KILLS" not in os.environ, reason="seconds: make test-kills")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        pytest.param("no room", "No space left", marks=_LONG),
        ("room for some", "No space left"),
        pytest.param("room for the adapter", "No space left", marks=_LONG),
        ("read-only", "Read-only file system"),
        ("limit", "File too large"),
    ],
)
def test_a_disk_that_fails_costs_no_checkpoint(how, message, inputs, tmp_path):
    processes = fork_server()
    process = processes.Process(target=disks.fail, args=(how, inputs, tmp_path))
    process.start()
    process.join(240)
    assert process.exitcode == 0, (tmp_path / "log.txt").read_text()
    said = (tmp_path / "message").read_text()
    if said.startswith("skipped"):
        pytest.skip(f"no mounts here: {said}")
    assert message in said
    assert "nothing was changed there" in said
    kept = tmp_path / "kept"
    check_whole(kept)
    assert (kept / "run/checkpoints/checkpoint-4").is_dir()
    assert not list(kept.glob("run/checkpoints/.*")) or how == "read-only"
    process = processes.Process(target=jobs.train_kind, args=("plain", inputs, kept), kwargs={"max_steps": 8})
    process.start()
    process.join(240)
    assert process.exitcode == 0
    assert "run/adapter_model.safetensors" in contents(kept)
