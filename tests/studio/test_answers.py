"""Before and after over HTTP: begun, followed, found again, stopped; and what is wrong where it is wrong."""

import json

import pytest

from theodora.studio.answers import Answers, Comparison, _progress


def test_rows_before_and_after_an_adapter(studio_of, adapter, rows):
    studio = studio_of()
    asked = {"model": str(adapter), "data": str(rows), "limit": "6", "max_new_tokens": "3"}
    id = studio.post("/api/look/answers", asked)["id"]
    assert "at work" in studio.post("/api/look/answers", asked, status=400)["error"]
    studio.post(f"/api/look/answers/{id}/forget", status=400)
    found = studio.until_ended("answers", id)
    assert (found["state"]["state"], found["progress"]) == ("finished", None), found["log"]
    assert [row["row"] for row in found["rows"]] == [1, 2, 3, 4, 5, 6]
    assert [row["expected"] for row in found["rows"]] == ["0", "2", "4", "6", "8", "10"]
    assert all(row["loss"] != row["base"]["loss"] for row in found["rows"])
    assert found["state"]["command"].startswith(f"theodora evaluate --model {adapter} --base --data {rows} --limit 6 ")
    assert "base: answers 6/6" in found["log"]

    studio.close()
    again = studio_of()
    (kept,) = again.get("/api/look/answers")["works"]
    assert (kept["id"], kept["state"]) == (id, "finished")
    again.post(f"/api/look/answers/{id}/forget")
    assert again.get("/api/look/answers")["works"] == []
    again.get(f"/api/look/answers/{id}", status=404)


def test_a_merged_model_is_compared_with_the_model_that_it_was_and_losses_are_enough(studio_of, tiny_model_dir, rows):
    studio = studio_of()
    asked = {"model": str(tiny_model_dir("gpt2")), "data": str(rows), "answers": False}
    problems = studio.post("/api/look/answers", asked, status=400)["problems"]
    assert "what it was before" in problems["base"]
    id = studio.post("/api/look/answers", asked | {"base": str(tiny_model_dir())})["id"]
    found = studio.until_ended("answers", id)
    assert found["state"]["state"] == "finished", found["log"]
    assert len(found["rows"]) == 24
    assert all(row["answer"] is row["base"]["answer"] is None for row in found["rows"])


def test_rows_that_a_run_held_out_are_there_by_themselves(studio_of, adapter, rows, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    studio = studio_of()
    assert "held_out.jsonl" in studio.post("/api/look/answers", {"model": str(run)}, status=400)["problems"]["data"]
    (run / "held_out.jsonl").write_bytes(rows.read_bytes())
    id = studio.post("/api/look/answers", {"model": str(run)})["id"]
    assert studio.get(f"/api/look/answers/{id}")["state"]["data"] == str(run / "held_out.jsonl")
    found = studio.until_ended("answers", id)  # there are no weights
    assert found["state"]["state"] == "failed"
    assert "adapter_model.safetensors" in found["log"]
    studio.post(f"/api/look/answers/{id}/stop", status=400)
    assert studio.get(f"/api/look/answers/{id}")["state"]["state"] == "failed"


def test_what_is_stopped_is_stopped(studio_of, adapter, rows):
    studio = studio_of()
    id = studio.post("/api/look/answers", {"model": str(adapter), "data": str(rows), "max_new_tokens": "400"})["id"]
    studio.post(f"/api/look/answers/{id}/stop")
    assert studio.until_ended("answers", id)["state"]["state"] == "stopped"
    assert "ended" in studio.post(f"/api/look/answers/{id}/stop", status=400)["error"]


@pytest.mark.parametrize(
    ("typed", "field"),
    [
        ({"model": "", "data": "rows.jsonl"}, "model"),
        ({"model": "/nowhere", "data": "rows.jsonl"}, "model"),
        ({"model": "not a name", "data": "rows.jsonl"}, "model"),
        ({"model": "--trust-remote-code", "data": "rows.jsonl"}, "model"),
        ({"model": ".", "data": "rows.jsonl"}, "model"),  # no model, no adapter
        ({"model": "owner/name", "base": "other/name"}, "data"),
        ({"model": "owner/name", "base": "other/name", "data": "--split"}, "data"),
        ({"model": "owner/name", "base": "other/name", "data": "x", "limit": "many"}, "limit"),
        ({"model": "owner/name", "base": "other/name", "data": "x", "limit": "0"}, "limit"),
        ({"model": "owner/name", "base": "other/name", "data": "x", "max_new_tokens": "-1"}, "max_new_tokens"),
    ],
)
def test_what_is_wrong_is_said_at_its_field(studio_of, typed, field):
    assert list(studio_of().post("/api/look/answers", typed, status=400)["problems"]) == [field]


def test_progress_is_the_share_of_the_passes_that_are_done(tmp_path):
    asked = Comparison("m", "", "d")
    assert _progress(tmp_path, asked) == {"share": 0.0, "what": "loading"}
    (tmp_path / "log").write_text("base: loss 8/8\nbase: answers 4/8\nWarning: base: x 1/2\n")
    assert _progress(tmp_path, asked) == {"share": 0.375, "what": "answers"}


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{}", '{"model": 1, "base": "", "data": ""}', '{"unknown": 1}', "[" * 100_000]
)
def test_what_is_remembered_may_be_damaged(tmp_path, text):
    for name, content in (("bad", text), ("good", json.dumps({"model": "m", "base": "", "data": "d"}))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "asked.json").write_text(content)
    assert [each["id"] for each in Answers(tmp_path).works.states()] == ["good"]
