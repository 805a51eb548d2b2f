"""Runs over HTTP: begun, followed, stopped, resumed, in a queue; found in folders, and again after a new start."""

import json
import os
import signal
from pathlib import Path

import pytest

import dying
from crash.killing import fork_server
from theodora.files.run_files import RECORD_HEAD
from theodora.locks import this_process
from theodora.studio.processes import begin, holder_of, is_alive, started_at


def test_a_run_is_started_followed_stopped_and_resumed_and_another_one_waits(studio_of, options, tmp_path):
    studio = studio_of(tmp_path / "runs")
    long = studio.post("/api/runs", {"options": options | {"max_steps": "3000", "save_steps": "3000"}})["id"]
    short = studio.post("/api/runs", {"options": options | {"output": str(tmp_path / "runs" / "second")}})["id"]
    assert studio.state(short)["state"] == "waiting"
    studio.until(long, "training", step=2)

    found = studio.get(f"/api/runs/{long}")
    assert found["anew"]
    assert found["state"]["steps"] == 3000
    assert [line["step"] for line in found["lines"] if "loss" in line][:2] == [1, 2]
    studio.until(long, "training", step=found["lines"][-1]["step"] + 1)
    more = studio.get(f"/api/runs/{long}?cursor={found['cursor']}")
    assert not more["anew"]
    assert more["lines"][0]["step"] >= found["lines"][-1]["step"]
    assert studio.state(short)["state"] == "waiting"  # the queue
    assert "waits" in studio.post(f"/api/runs/{short}/resume", status=400)["error"]

    studio.post(f"/api/runs/{long}/stop")
    stopped = studio.until(long, "stopped")
    assert stopped["can_resume"]
    done = studio.until(short, "finished")
    assert (done["step"], done["can_stop"], done["can_resume"]) == (4, False, False)
    texts = studio.get(f"/api/runs/{short}/texts")
    assert "## Results" in texts["card"]
    assert "The adapter is in" in texts["log"]
    assert texts["typed"] == options | {"output": str(tmp_path / "runs" / "second")}
    assert studio.client.get(f"/api/runs/{short}/loss.png").content.startswith(b"\x89PNG")
    paces = studio.get(f"/api/runs/{short}")["paces"]
    assert paces[-1]["step"] == paces[-1]["steps"] == 4
    assert paces[-1]["tokens_per_second"] > 0
    assert paces[-1]["memory"] > 1e6

    studio.post(f"/api/runs/{long}/resume")
    studio.until(long, "training", step=stopped["step"] + 1)
    studio.post(f"/api/runs/{long}/resume", status=400)  # it is at work
    cursor = found["cursor"]
    assert studio.get(f"/api/runs/{long}?cursor={cursor}")["anew"]  # the run has written its metrics anew
    studio.post(f"/api/runs/{long}/stop")
    studio.until(long, "stopped")


def test_runs_go_on_without_the_studio_and_are_there_again(studio_of, options):
    first = studio_of()
    id = first.post("/api/runs", {"options": options | {"max_steps": "3000", "save_steps": "3000"}})["id"]
    first.until(id, "training", step=1)
    pid = first.runs.memory.known.begun[options["output"]].pid
    first.close()
    assert started_at(pid)
    again = studio_of()
    assert again.until(id, "training", step=2)["can_stop"]
    again.post(f"/api/runs/{id}/stop")
    again.until(id, "stopped")


def test_what_cannot_begin_says_so_by_field(studio_of, options, tmp_path):
    studio = studio_of()
    problems = studio.post("/api/runs", {"options": {"rank": "abc", "data": "x"}}, status=400)["problems"]
    assert problems["rank"] == ["rank is 'abc'; expected a whole number"]
    assert problems["output"] == ["output is missing"]
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "README.md").write_text("mine")
    error = studio.post("/api/runs", {"options": options | {"output": str(taken)}}, status=400)["error"]
    assert error.startswith("output: ")
    assert os.listdir(taken) == ["README.md"]
    (taken / "README.md").rename(taken / "studio.log")
    assert (
        "not of this studio"
        in studio.post("/api/runs", {"options": options | {"output": str(taken)}}, status=400)["error"]
    )
    assert (taken / "studio.log").read_text() == "mine"


def test_a_run_that_fails_shows_its_message_and_can_begin_again(studio_of, options, rows):
    good = rows.read_text()
    rows.write_text('{"prompt": 1}\n')
    studio = studio_of()
    id = studio.post("/api/runs", {"options": options})["id"]
    assert studio.until(id, "failed")["can_resume"]
    assert str(rows) in studio.get(f"/api/runs/{id}/texts")["log"]
    rows.write_text(good)
    studio.post(f"/api/runs/{id}/resume")
    assert studio.until(id, "finished")["step"] == 4


def test_runs_of_elsewhere_appear_when_their_folder_is_named(studio_of, tmp_path):
    run = tmp_path / "elsewhere" / "<img src=x onerror=alert(1)>"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"{RECORD_HEAD}\nmodel: m\nmethod: lora\nrank: 3\nmax_steps: 9\n")
    lines = [{"step": 1, "loss": 2.5, "note": "<b>", "nan": float("nan")}, {"step": 2, "loss": 2.0}]
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + '\nnonsense\n{"step": 3, "lo')
    studio = studio_of()
    assert studio.get("/api/runs")["runs"] == []
    studio.post("/api/folders", {"path": str(tmp_path / "nowhere")}, status=400)
    studio.post("/api/folders", {"path": ""}, status=400)
    studio.post("/api/folders", {"path": str(run.parent)})
    (found,) = studio.get("/api/runs")["runs"]
    assert (found["name"], found["state"], found["step"], found["steps"]) == (run.name, "stopped", 2, 9)
    assert (found["loss"], found["method"]) == (2.0, "lora 3")
    lines = studio.get(f"/api/runs/{found['id']}")["lines"]
    assert lines == [{"step": 1, "loss": 2.5, "nan": None}, {"step": 2, "loss": 2.0}]  # figures alone
    studio.post("/api/folders/forget", {"path": str(run.parent)})
    assert studio.get("/api/runs")["runs"] == []
    studio.get(f"/api/runs/{found['id']}", status=404)


def test_a_run_that_learns_from_rewards_shows_its_reward(studio_of, tmp_path):
    lines = [{"step": 1, "loss": 1e-9, "reward": 0.25}, {"step": 2, "eval_loss": 1e-9}]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = studio_of(tmp_path / "run").get("/api/runs")["runs"]
    assert (found["loss"], found["reward"]) == (None, 0.25)


def test_a_run_of_a_terminal_is_at_work_here_and_can_be_stopped(studio_of, options, tmp_path):
    words = ["train"]
    for name, value in (options | {"max_steps": "3000", "save_steps": "3000"}).items():
        words += [f"--{name}", value]
    process = fork_server().Process(target=dying.studio_run, args=(words, tmp_path / "log", str(tmp_path)))
    process.start()
    try:
        studio = studio_of(tmp_path / "runs")
        while not studio.get("/api/runs")["runs"]:  # its folder is made when it begins
            assert process.is_alive(), (tmp_path / "log").read_text()
        (found,) = studio.get("/api/runs")["runs"]
        assert studio.until(found["id"], "training", step=2)["can_stop"]
        assert holder_of(tmp_path / "runs" / "first" / ".theodora.lock") == (process.pid, started_at(process.pid))
        studio.post(f"/api/runs/{found['id']}/stop")
        stopped = studio.until(found["id"], "stopped")
        assert stopped["can_resume"]
        process.join(60)
        assert process.exitcode == 0  # as after any SIGTERM that found the time for a checkpoint
    finally:
        process.kill()
        process.join()


def test_a_folder_of_runs_does_not_lead_out_of_it(studio_of, tmp_path):
    (tmp_path / "secret").write_text("secret")
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    for name in ("README.md", "config.yaml", "loss.png", "studio.log"):
        (run / name).symlink_to(tmp_path / "secret")
    studio = studio_of(run)
    (found,) = studio.get("/api/runs")["runs"]
    assert "secret" not in json.dumps(studio.get(f"/api/runs/{found['id']}/texts"))
    assert studio.client.get(f"/api/runs/{found['id']}/loss.png").status_code == 404


def test_a_lock_that_nobody_holds_ends_nobody(studio_of, tmp_path):
    """A folder from elsewhere may name any process of the user's."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (run / ".theodora.lock").write_text(json.dumps(this_process()))
    assert holder_of(run / ".theodora.lock") is None
    studio = studio_of(run)
    (found,) = studio.get("/api/runs")["runs"]
    assert (found["state"], found["can_stop"]) == ("stopped", False)
    studio.post(f"/api/runs/{found['id']}/stop", status=400)


def test_what_only_its_user_can_grant_is_not_granted_by_a_button(studio_of, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"{RECORD_HEAD}\nmodel: m\ndata: d\noutput: {run}\ntrust_remote_code: true\n")
    studio = studio_of(run)
    (found,) = studio.get("/api/runs")["runs"]
    error = studio.post(f"/api/runs/{found['id']}/resume", status=400)["error"]
    assert "--trust-remote-code" in error


def test_a_process_is_known_again_by_its_start(tmp_path):
    log = tmp_path / "log"
    pid, started = begin(["--version"], log, str(tmp_path))
    assert started
    assert not is_alive(pid, "another start")
    assert not is_alive(pid, "")
    deadline = 600
    while is_alive(pid, started) and deadline:
        signal.sigtimedwait([], 0.1)
        deadline -= 1
    assert started_at(pid) is None
    assert log.read_text().startswith("theodora ")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"folders": 3, "begun": {"/x": 4}, "waiting": [1]}'])
def test_what_is_remembered_may_be_damaged(studio_of, tmp_path, text):
    (tmp_path / "studio").mkdir()
    (tmp_path / "studio" / "known.json").write_text(text)
    studio = studio_of(tmp_path)
    assert studio.get("/api/runs")["runs"] == []
    assert str(tmp_path) in json.loads((tmp_path / "studio" / "known.json").read_text())["folders"]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("train.jsonl", "train.jsonl"),
        ("../../evil.jsonl", "evil.jsonl"),
        ("..\\evil.csv", "evil.csv"),
        ("<b>.json", "_b_.json"),
        ("notes.txt", None),
        (".jsonl", None),
        ("", None),
    ],
)
def test_dropped_files_stay_in_the_studios_folder(studio_of, name, kept):
    studio = studio_of()
    headers = {"origin": "http://127.0.0.1:7860", "content-type": "application/octet-stream"}

    def drop(content):
        return studio.client.post("/api/upload", params={"name": name}, content=content, headers=headers)

    reply = drop(b"one")
    if kept is None:
        assert reply.status_code == 400
        return
    path = Path(reply.json()["path"])
    assert path == studio.folder / "data" / kept
    assert drop(b"one").json()["path"] == str(path)  # the same again
    other = Path(drop(b"two").json()["path"])
    assert (other.parent, other.read_bytes(), path.read_bytes()) == (path.parent, b"two", b"one")
    assert sorted(os.listdir(path.parent)) == sorted([path.name, other.name])
