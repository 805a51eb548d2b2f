"""Inspect, export, merge and verify over HTTP: begun, followed, found again; nothing is replaced."""

import json
import os

import pytest

from theodora.studio.jobs import Jobs


def test_what_changed_with_its_figures(studio_of, adapter):
    studio = studio_of()
    id = studio.post("/api/look/jobs", {"kind": "inspect", "runs": [str(adapter), ""]})["id"]
    found = studio.until_ended("jobs", id)
    assert found["state"]["state"] == "finished", found["log"]
    (run,) = found["report"]["runs"]
    assert run["method"] == "dora"
    assert all(module["direction"] > 0 for module in run["checkpoints"][-1]["modules"])
    assert "largest movers" in found["log"]
    assert found["figures"] == ["heat_map.png", "scatter.png"]
    assert found["state"]["command"].startswith(f"theodora inspect {adapter} ")
    picture = studio.client.get(f"/api/look/jobs/{id}/figure/scatter.png")
    assert picture.content.startswith(b"\x89PNG")
    assert picture.headers["content-disposition"] == "attachment"
    assert studio.client.get(f"/api/look/jobs/{id}/figure/..%2Freport.json").status_code == 404
    studio.close()
    again = studio_of()
    (kept,) = again.get("/api/look/jobs")["works"]
    assert (kept["id"], kept["state"], kept["kind"]) == (id, "finished", "inspect")
    again.post(f"/api/look/jobs/{id}/forget")
    again.get(f"/api/look/jobs/{id}", status=404)
    assert adapter.is_dir()


def test_a_model_is_made_and_compared_and_nothing_is_replaced(studio_of, adapter, tmp_path):
    studio, output = studio_of(), tmp_path / "merged"
    asked = {"kind": "export", "adapter": str(adapter), "form": "hf", "output": str(output)}
    id = studio.post("/api/look/jobs", asked)["id"]
    assert "at work" in studio.post("/api/look/jobs", asked, status=400)["error"]
    found = studio.until_ended("jobs", id)
    assert found["state"] | {"seconds": None} == found["state"]
    assert (found["state"]["state"], found["state"]["result"]) == ("finished", str(output)), found["log"]
    assert "The two forms agree." in found["log"]
    assert (output / "model.safetensors").is_file()
    problems = studio.post("/api/look/jobs", asked, status=400)["problems"]
    assert problems == {"output": f"{output} is there already; nothing is replaced"}

    both = {"kind": "verify", "a": str(adapter), "b": str(output)}
    assert studio.until_ended("jobs", studio.post("/api/look/jobs", both)["id"])["state"]["state"] == "finished"


def test_what_fails_says_so_and_leaves_nothing(studio_of, adapter, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    studio = studio_of()
    asked = {"kind": "merge", "adapter": str(broken), "output": str(tmp_path / "out")}
    found = studio.until_ended("jobs", studio.post("/api/look/jobs", asked)["id"])
    assert found["state"]["state"] == "failed"
    assert "adapter_model.safetensors" in found["log"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"kind": "inspect", "runs": []}, "runs"),
        ({"kind": "inspect", "runs": ["--json"]}, "runs"),
        ({"kind": "inspect", "runs": "x"}, "runs"),
        ({"kind": "export", "adapter": "ADAPTER", "form": "exe", "output": "free"}, "form"),
        ({"kind": "export", "adapter": "ADAPTER", "form": "gguf", "output": "free"}, "output"),
        ({"kind": "export", "adapter": "ADAPTER", "form": "gguf-lora", "output": "free.gguf"}, "lora_rank"),
        ({"kind": "export", "adapter": "ADAPTER", "form": "peft", "output": "free", "lora_rank": "-3"}, "lora_rank"),
        ({"kind": "export", "adapter": "MODEL", "form": "hf", "output": "free"}, "adapter"),
        ({"kind": "export", "adapter": "ADAPTER", "form": "hf", "output": "free", "base_model": "--x"}, "base_model"),
        ({"kind": "merge", "adapter": "ADAPTER", "output": "free", "onto": "else"}, "onto"),
        ({"kind": "merge", "adapter": "ADAPTER", "output": ""}, "output"),
        ({"kind": "combine", "adapters": ["ADAPTER"], "output": "free"}, "adapters"),
        ({"kind": "combine", "adapters": ["ADAPTER", "ADAPTER"], "output": "free", "weights": "1 x"}, "weights"),
        ({"kind": "combine", "adapters": ["ADAPTER", "ADAPTER"], "output": "free", "density": "2"}, "density"),
        ({"kind": "verify", "a": "ADAPTER", "b": "nowhere.gguf"}, "b"),
    ],
)
def test_what_makes_no_sense_is_said_at_its_field(
    asked, field, studio_of, adapter, tiny_model_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    places = {"ADAPTER": str(adapter), "MODEL": str(tiny_model_dir())}
    given = {
        key: [places.get(each, each) for each in value] if isinstance(value, list) else places.get(value, value)
        for key, value in asked.items()
    }
    studio = studio_of()
    assert list(studio.post("/api/look/jobs", given, status=400)["problems"]) == [field]
    assert studio.get("/api/look/jobs")["works"] == []


def test_other_kinds_and_damaged_records_are_nothing(studio_of, tmp_path):
    studio = studio_of()
    assert "expected one of" in studio.post("/api/look/jobs", {"kind": "rm", "runs": ["/"]}, status=400)["error"]
    for number, text in enumerate(
        ("", "[]", '{"kind": 1, "title": "x"}', '{"kind": "merge", "title": "x", "more": 1}')
    ):
        (tmp_path / "jobs" / str(number)).mkdir(parents=True)
        (tmp_path / "jobs" / str(number) / "asked.json").write_text(text)
    assert Jobs(tmp_path / "jobs").works.states() == []


HOSTILE = """<!doctype html><html><head><title>no</title><style>p { color: red }</style></head><body>
<h1>A &amp; B</h1><script>alert(1)</script><p class="warning">Not <b>finished</b>: 2 left.</p>
<h2 onclick="alert(1)">Results</h2><img src=x onerror=alert(1)>
<table><thead><tr><th>method</th><th>score</th></tr></thead><tbody><tr><td>lora &lt;img src=x&gt;</td><td>81 ± 1
</td></tr></tbody></table><svg onload="alert(1)" viewBox="0 0 1 1"><script>alert(2)</script></svg>
<ul><li>one<li>two \u202e</ul><details><summary>All</summary><table><tr><td>loose
"""


def test_a_report_is_text_tables_and_pictures(studio_of, tmp_path):
    folder = tmp_path / "runs" / "comparison"
    folder.mkdir(parents=True)
    (folder / "report.html").write_text(HOSTILE)
    (tmp_path / "secret").write_text("<p>secret</p>")
    (tmp_path / "runs" / "other").mkdir()
    os.symlink(tmp_path / "secret", tmp_path / "runs" / "other" / "report.html")
    studio = studio_of(tmp_path / "runs")
    reports = {each["name"]: each["id"] for each in studio.get("/api/look/reports")["reports"]}
    found = studio.get(f"/api/look/reports/{reports['comparison']}")
    assert found["blocks"] == [
        {"kind": "h1", "text": "A & B"},
        {"kind": "note", "text": "Not finished: 2 left."},
        {"kind": "h2", "text": "Results"},
        {"kind": "table", "head": ["method", "score"], "rows": [["lora <img src=x>", "81 ± 1"]]},
        {"kind": "figure", "number": 0},
        {"kind": "li", "text": "one"},
        {"kind": "li", "text": "two \\u202e"},
        {"kind": "summary", "text": "All"},
    ]
    figure = studio.client.get(f"/api/look/reports/{reports['comparison']}/figure/0")
    assert figure.headers["content-type"].startswith("image/svg+xml")
    assert figure.headers["content-disposition"] == "attachment"  # opened by itself it would be a page of ours
    assert "script-src 'self'" in figure.headers["content-security-policy"]
    assert b'xmlns="http://www.w3.org/2000/svg"' in figure.content
    assert studio.client.get(f"/api/look/reports/{reports['comparison']}/figure/1").status_code == 404
    assert "secret" not in json.dumps([studio.get(f"/api/look/reports/{id}") for id in reports.values()])
    studio.get("/api/look/reports/none", status=404)
