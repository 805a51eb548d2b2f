"""Chats over HTTP: loaded, asked side by side, streamed, stopped; the server ends with the studio."""

import json
import os
import time

import pytest

from studios import ORIGIN
from theodora.studio.processes import started_at


def until(studio, *words):
    deadline = time.monotonic() + 120  # that it comes there is what counts
    while (state := studio.get("/api/look/chat"))["state"] not in words:
        assert time.monotonic() < deadline, state["log"]
        time.sleep(0.05)
    return state


def said(studio, columns, **settings):
    """The pieces of each column."""
    asked = {"columns": columns, "max_tokens": 6, "temperature": 0, **settings}
    reply = studio.client.post("/api/look/chat/say", json=asked, headers={"origin": ORIGIN})
    assert reply.status_code == 200, reply.text
    pieces = [json.loads(line) for line in reply.text.splitlines()]
    return [[piece for piece in pieces if piece["column"] == number] for number in range(len(columns))]


def text_of(pieces):
    return "".join(piece.get("text", "") for piece in pieces)


def column(name, text="What is the capital of Peru?"):
    return {"name": name, "messages": [{"role": "user", "content": text}]}


def test_base_and_adapter_answer_side_by_side_until_the_studio_ends(studio_of, adapter, tiny_model_dir):
    studio = studio_of()
    assert studio.get("/api/look/chat")["state"] == "none"
    assert "Load one" in studio.post("/api/look/chat/say", {"columns": [column("base")]}, status=400)["error"]
    studio.post("/api/look/chat", {"adapters": [str(adapter), " "]})
    state = until(studio, "ready", "failed")
    assert state["state"] == "ready", state["log"]
    assert state["model"] == str(tiny_model_dir())
    assert [each["name"] for each in state["columns"]] == ["base", "loud"]
    assert state["columns"][1]["told"] == "DoRA 2"
    key = studio.folder / "chat" / "key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert str(key) in state["command"]
    assert key.read_text().strip() not in json.dumps(state)

    base, loud = said(studio, [column("base"), column("loud")])
    for pieces in (base, loud):
        assert len(pieces) > 1
        assert pieces[-1]["end"] in ("length", "stop")
        assert 0 < pieces[-1]["tokens"] <= 6
    assert text_of(base) != text_of(loud)
    assert text_of(said(studio, [column("base")])[0]) == text_of(base)
    (wrong,) = said(studio, [column("base")], max_tokens=-1)
    assert "max_tokens" in wrong[-1]["error"]
    (unknown,) = said(studio, [column("nobody")])
    assert "nobody" in unknown[-1]["error"]

    long = [{"role": role, "content": "word " * 50} for role in ("user", "assistant")]
    turns = [{"role": "system", "content": "Be kind."}, *long, *long, *column("base")["messages"]]
    (pieces,) = said(studio, [{"name": "base", "messages": turns}])
    assert "no longer fits" in pieces[0]["note"]
    assert pieces[-1]["end"]

    pid = json.loads((studio.folder / "chat" / "asked.json").read_text())["pid"]
    assert started_at(pid)
    studio.close()
    assert started_at(pid) is None


def test_a_server_that_a_killed_studio_left_ends_when_the_next_one_opens(studio_of, adapter):
    studio = studio_of()
    studio.post("/api/look/chat", {"model": str(adapter)})
    assert [each["name"] for each in studio.get("/api/look/chat")["columns"]] == ["base", "loud"]
    pid = json.loads((studio.folder / "chat" / "asked.json").read_text())["pid"]
    assert started_at(pid)
    again = studio_of()
    assert started_at(pid) is None
    assert again.get("/api/look/chat")["state"] == "none"


def test_what_cannot_be_loaded_says_why(studio_of, adapter, tmp_path):
    studio = studio_of()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    studio.post("/api/look/chat", {"adapters": [str(damaged)]})
    assert "adapter_model.safetensors" in until(studio, "ready", "failed")["log"]
    studio.post("/api/look/chat", {"adapters": [str(adapter)]})
    studio.post("/api/look/chat/stop")
    assert studio.get("/api/look/chat")["state"] == "stopped"


def test_a_model_without_a_chat_template_goes_on_from_each_message_alone(studio_of, adapter, tiny_model_dir, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_model_dir().iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    studio = studio_of()
    studio.post("/api/look/chat", {"model": str(bare)})
    state = until(studio, "ready", "failed")
    assert state["state"] == "ready", state["log"]
    (pieces,) = said(studio, [column("base")])
    assert "no chat template" in pieces[0]["note"]
    assert any(piece.get("text") for piece in pieces)


@pytest.mark.parametrize(
    ("typed", "field"),
    [
        ({}, "model"),
        ({"model": "/nowhere"}, "model"),
        ({"model": "owner/name", "adapters": ["/nowhere"]}, "adapter-0"),
        ({"adapters": ["", "owner/name"]}, "adapter-1"),
        ({"model": "--trust-remote-code"}, "model"),
    ],
)
def test_what_is_wrong_is_said_at_its_field(studio_of, typed, field):
    assert list(studio_of().post("/api/look/chat", typed, status=400)["problems"]) == [field]


@pytest.mark.parametrize(
    "columns",
    [None, [], {}, [1], [{"name": 1}], [{"name": "base", "messages": []}], [column("base", 1)], [{"messages": ["x"]}]],
)
def test_what_is_no_conversation_is_refused(studio_of, columns):
    studio_of().post("/api/look/chat/say", {"columns": columns}, status=400)


def test_names_are_those_of_folders_each_another_one(tmp_path, adapter, studio_of):
    paths = []
    for at in ("a", "b"):
        folder = tmp_path / at / "base"
        os.makedirs(folder)
        (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
        paths.append(str(folder))
    studio = studio_of()
    studio.post("/api/look/chat", {"adapters": [*paths, paths[0]]})
    assert [each["name"] for each in studio.get("/api/look/chat")["columns"]] == ["base", "base-2", "base-3"]
