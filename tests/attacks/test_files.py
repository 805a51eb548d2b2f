"""Adapter folders that others write to while they are read, or that hold what no adapter does.

A server's adapter folder is where strangers put adapters: whatever they do there, and whenever they do it, the server
answers and goes on, and reads nothing outside of it.
"""

import contextlib
import http.client
import json
import os
import shutil
import struct
from pathlib import Path

import datasets
import pytest

import tiny
from serving import Server
from theodora.cli.main import main
from theodora.data.problems import Problems
from theodora.data.sources import open_source
from theodora.files.base_model import BaseCheckpoint
from theodora.files.folder import OpenFile
from theodora.serve import app
from theodora.serve.config import ServeConfig
from theodora.serve.engine import Engine

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("root") / "adapters"


@pytest.fixture(scope="module")
def server(adapter, root):
    """A server with `lora8`, and a folder to load others from."""
    root.mkdir()
    engine = Engine(
        tiny.tiny_model(), ServeConfig(model="base", kv_tokens=1024, max_batch_tokens=256, adapter_folder=str(root))
    )
    engine.load("lora8", adapter("lora8"))
    engine.start()
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(engine.stop)
        yield stack.enter_context(Server(engine, tiny.tiny_tokenizer()))


@pytest.fixture
def load(server):
    """Ask for an adapter to be loaded: status and message, or method. The server must answer others afterwards."""

    def load(path):
        engine = server.engine
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        body = json.dumps({"lora_name": "new", "lora_path": str(path)})
        connection.request("POST", "/v1/load_lora_adapter", body, {"content-type": "application/json"})
        reply = connection.getresponse()
        status, told = reply.status, json.loads(reply.read())
        connection.close()
        engine.unload("new")
        assert server.client.completions.create(model="lora8", prompt="a", max_tokens=1).choices
        return status, told["method"] if status == 200 else told["error"]["message"]

    return load


@pytest.fixture
def place(root, adapter):
    """`place("lora8")`: a copy of that adapter in the server's folder, removed after the test."""
    made = []

    def place(name="lora8", at="own"):
        shutil.copytree(adapter(name), root / at)
        made.append(root / at)
        return root / at

    place.root = root
    yield place
    for path in made:
        path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)


def header(tensors, data=0, metadata=None):
    """A safetensors file with this header."""
    tensors = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(tensors)) + tensors + bytes(data)


def between(monkeypatch, act, piece=2):
    """Do something just before the n-th piece of the weights is read: the length, the header, the tensors."""
    fill, pieces = OpenFile.fill, []

    def filled(file, memory, at=0):
        if file.path.name == WEIGHTS:
            pieces.append(at)
            if len(pieces) == piece + 1:
                act()
        return fill(file, memory, at)

    monkeypatch.setattr(OpenFile, "fill", filled)


# Written while it is read


@pytest.mark.parametrize("piece", [0, 1, 2])
@pytest.mark.parametrize("what", ["cut", "emptied", "longer", "other values", "replaced", "replaced config"])
def test_an_adapter_that_is_written_while_it_is_loaded(monkeypatch, load, place, adapter, piece, what):
    own = place()
    weights, other = own / WEIGHTS, (adapter("dora4") / WEIGHTS).read_bytes()
    whole = weights.read_bytes()

    def act():
        if what == "cut":
            os.truncate(weights, len(whole) - 5000)
        elif what == "emptied":  # as `cp` does before it writes anew
            os.truncate(weights, 0)
        elif what == "longer":
            with weights.open("ab") as file:
                file.write(bytes(5000))
        elif what == "other values":
            with weights.open("r+b") as file:
                file.seek(len(whole) - 4)
                file.write(b"\0\0\0\0")
            os.utime(weights, ns=(1, 1))
        else:
            name = WEIGHTS if what == "replaced" else CONFIG
            (own / "new").write_bytes(other if what == "replaced" else (adapter("dora4") / CONFIG).read_bytes())
            (own / "new").replace(own / name)

    between(monkeypatch, act, piece)
    status, told = load("own")
    assert status == 400
    assert "changed while it was read" in told or "cut short while it was read" in told
    assert WEIGHTS in told or what.startswith("replaced")
    monkeypatch.undo()
    weights.write_bytes(whole)
    shutil.copy(adapter("lora8") / CONFIG, own)
    assert load("own") == (200, "LoRA")


def test_info_on_an_adapter_that_is_cut_while_it_is_read(monkeypatch, capsys, tmp_path, adapter):
    shutil.copytree(adapter("lora8"), tmp_path / "own")
    between(monkeypatch, lambda: os.truncate(tmp_path / "own" / WEIGHTS, 100))
    assert main(["info", str(tmp_path / "own")]) == 1
    assert "was cut short while it was read" in " ".join(capsys.readouterr().err.split())


# Elsewhere


def links_out(own, outside):
    """What may stand in the place of `own` by the time that it is read, and where an adapter of another method is."""
    inner = own / "inner"
    return {
        "folder": lambda: (shutil.rmtree(own), own.symlink_to(outside)),
        "folder, up": lambda: (shutil.rmtree(own), own.symlink_to(f"../{outside.name}")),
        "folder, by two links": lambda: (
            shutil.rmtree(own),
            (own.parent / "hop").symlink_to(outside),
            own.symlink_to("hop"),
        ),
        "file": lambda: ((own / WEIGHTS).unlink(), (own / WEIGHTS).symlink_to(outside / WEIGHTS)),
        "both files": lambda: [
            ((own / name).unlink(), (own / name).symlink_to(f"../../{outside.name}/{name}"))
            for name in (CONFIG, WEIGHTS)
        ],
        "itself": lambda: (shutil.rmtree(own), own.symlink_to("own")),
        "root": lambda: (shutil.rmtree(own), own.symlink_to("/")),
        "template": lambda: (own / "chat_template.jinja").symlink_to("/etc/hostname"),
        "folder of templates": lambda: (own / "additional_chat_templates").symlink_to(inner.parent.parent.parent),
    }


WAYS = list(links_out(Path("own"), Path("outside")))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("late", [True, False], ids=["after the look", "before"])
def test_nothing_outside_of_the_adapter_folder_is_read(monkeypatch, load, place, root, adapter, way, late):
    own, outside = place(), root.parent / "outside"
    shutil.copytree(adapter("dora4"), outside, dirs_exist_ok=True)
    (outside / "tool_use.jinja").write_text("theirs")
    act = links_out(own, outside)[way]
    look = app.inside

    def inside(*asked):
        found = look(*asked)
        act()
        return found

    if late:
        monkeypatch.setattr(app, "inside", inside)
    else:
        act()
    try:
        status, told = load("own")
        if way == "folder of templates":  # which holds no templates within the folder
            assert (status, told) == (200, "LoRA") or status == 400
        else:
            assert status == 400, told
    finally:
        (root / "hop").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "asked",
    ["..", "../outside", "own/../../outside", "/", "/etc", "", "own\0", "x" * 300, "own/" + CONFIG, "~", "\ud83d"],
)
def test_paths_that_lead_out_or_nowhere(load, place, root, adapter, asked):
    place()
    shutil.copytree(adapter("dora4"), root.parent / "outside", dirs_exist_ok=True)
    assert load(asked)[0] == 400


def test_links_that_stay_inside_are_followed(load, place, root):
    own = place()
    kept = place(at="kept")
    (root / "latest").symlink_to("own")
    (root / "absolute").symlink_to(own)
    (kept / "snapshots").mkdir()
    for name in (CONFIG, WEIGHTS):  # as the hub's cache has them
        (kept / "snapshots" / name).symlink_to(f"../{name}")
    try:
        for asked in ("own", "latest", "absolute", "kept/snapshots", "kept/../own", str(own)):
            assert load(asked) == (200, "LoRA"), asked
    finally:
        (root / "latest").unlink()
        (root / "absolute").unlink()


# What is no file


def put(path, kind):
    if path.exists():
        path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 42)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "huge"])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "tokenizer_config.json", "generation_config.json"])
def test_what_is_no_file_is_refused_at_once(load, place, capsys, tmp_path, adapter, kind, name):
    put(place() / name, kind)
    status, told = load("own")
    assert status == 400, told
    assert {"pipe": "is a pipe", "folder": "is a folder", "huge": "expected at most"}.get(kind, "") in told
    assert name in told or "There is no adapter" in told
    if name in (CONFIG, WEIGHTS):
        shutil.copytree(adapter("lora8"), tmp_path / "own")
        put(tmp_path / "own" / name, kind)
        assert main(["info", str(tmp_path / "own")]) == 1
        told = " ".join(capsys.readouterr().err.split())
        assert name in told.replace(" ", "")
        assert "unexpected" not in told


def test_a_vocabulary_that_is_no_file_holds_up_nobody(server, place):
    """It is looked at when the adapter is first asked, to tell of tokens that the server does not cut."""
    put(place() / "tokenizer.json", "pipe")
    server.engine.load("new", place.root / "own")
    try:
        assert server.client.completions.create(model="new", prompt="a", max_tokens=1).choices
    finally:
        server.engine.unload("new")


@pytest.mark.parametrize("ends", [[10**9], [2**70], ["a"], [None], {}, True])
def test_ends_that_are_no_tokens_hold_up_nobody(server, place, ends):
    (place() / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    server.engine.load("new", place.root / "own")
    try:
        for options in ({}, {"extra_body": {"min_tokens": 2}}, {"logprobs": 2}):
            assert server.client.completions.create(model="new", prompt="a", max_tokens=2, **options).choices
    finally:
        server.engine.unload("new")


# Files that lie

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS = {
    "65 dimensions": header({KEY: F32 | {"shape": [1] * 65}}, 4),
    "a product that overflows": header({KEY: F32 | {"shape": [2**32, 2**32]}}, 4),
    "beside a 0": header({KEY: F32 | {"shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}}),
    "a size of 2**63": header({KEY: F32 | {"shape": [0, 2**63], "data_offsets": [0, 0]}}),
    "negative": header({KEY: F32 | {"shape": [-1, -1]}}, 4),
    "a fraction": header({KEY: F32 | {"shape": [1.0]}}, 4),
    "a truth": header({KEY: F32 | {"shape": [True]}}, 4),
    "a shape that is none": header({KEY: F32 | {"shape": 1}}, 4),
    "no shape": header({KEY: {"dtype": "F32", "data_offsets": [0, 4]}}, 4),
    "no offsets": header({KEY: {"dtype": "F32", "shape": [1]}}, 4),
    "three offsets": header({KEY: F32 | {"data_offsets": [0, 2, 4]}}, 4),
    "offsets backwards": header({KEY: F32 | {"data_offsets": [4, 0]}}, 4),
    "offsets beyond": header({KEY: F32 | {"data_offsets": [4, 8]}}, 4),
    "a gap": header({KEY: F32, "b": F32 | {"data_offsets": [8, 12]}}, 12),
    "an overlap": header({KEY: F32, "b": F32 | {"data_offsets": [2, 6]}}, 6),
    "bytes after": header({KEY: F32}, 5),
    "bytes missing": header({KEY: F32}, 3),
    "an unknown dtype": header({KEY: F32 | {"dtype": "F7"}}, 4),
    "F4": header({KEY: {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, 4),
    "F8": header({KEY: {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]}}, 4),
    "F8_E8M0": header({KEY: {"dtype": "F8_E8M0", "shape": [2, 2], "data_offsets": [0, 4]}}, 4),
    "BOOL": header({KEY: {"dtype": "BOOL", "shape": [2, 2], "data_offsets": [0, 4]}}, 4),
    "C64": header({KEY: {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, 8),
    "a dtype that is none": header({KEY: F32 | {"dtype": ["F32"]}}, 4),
    "a tensor that is none": header({KEY: None}),
    "twice": header(f'{{"{KEY}": {json.dumps(F32)}, "{KEY}": {json.dumps(F32)}}}'.encode(), 4),
    "a field twice": header(
        f'{{"{KEY}": {{"dtype": "F32", "dtype": "F16", "shape": [1], "data_offsets": [0, 4]}}}}'.encode(), 4
    ),
    "half a character": header(b'{"\\ud83d": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', 4),
    "no ASCII": header({"schlüssel\u202e\x1b[31m": F32}, 4),
    "no UTF-8": header(b'{"\xff": 1}'),
    "UTF-16": header(json.dumps({KEY: F32}).encode("utf-16"), 4),
    "a list": header(b"[]"),
    "nothing": b"",
    "seven bytes": bytes(7),
    "a header of nothing": bytes(8),
    "nested": header(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "a number of 5,000 digits": header(
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}'
    ),
    "a header longer than the file": struct.pack("<Q", 2**63) + b"{}",
    "metadata that is a list": header({"__metadata__": [], KEY: F32}, 4),
    "metadata of half a character": header(b'{"__metadata__": {"a": "\\ud83d"}}'),
    "metadata of numbers": header({"__metadata__": {"format": 1}, KEY: F32}, 4),
    "metadata of ours that is none": header({"__metadata__": {"theodora": "[]"}, KEY: F32}, 4),
    "no tensors": header({}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(load, place, capsys, tmp_path, adapter, name):
    weights = place() / WEIGHTS
    weights.write_bytes(HEADERS[name])
    status, told = load("own")
    assert status == 400, told
    assert WEIGHTS in told
    shutil.copytree(adapter("lora8"), tmp_path / "own")
    shutil.copy(weights, tmp_path / "own")
    assert main(["info", str(tmp_path / "own")]) == 1
    assert "unexpected" not in capsys.readouterr().err


def test_a_header_of_100_mb_is_not_unfolded(load, place):
    with (place() / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 100_000_000) + b'{"a":[')
        file.truncate(100_000_100)
    assert load("own")[0] == 400


def test_more_json_than_the_model_has_modules_is_not_unfolded(load, place):
    """It would take seconds in which nobody else's turn comes."""
    own = place()
    whole = (own / CONFIG).read_text()
    (own / CONFIG).write_text('{"a": [' + "[]," * (1 << 20) + "[]]}")
    status, told = load("own")
    assert status == 400
    assert f"{CONFIG} has 3,145,7" in told
    (own / CONFIG).write_text(whole)
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    (own / WEIGHTS).write_bytes(header({f"{KEY}{n}": nothing for n in range(18_000)}))
    status, told = load("own")
    assert status == 400
    assert "its header has" in told


def test_a_file_larger_than_any_adapter_of_the_model_is_not_read(load, place):
    """A sparse file costs its writer nothing, and its reader all memory."""
    size = 8 << 30
    tensors = json.dumps({KEY: {"dtype": "F32", "shape": [size >> 2], "data_offsets": [0, size]}}).encode()
    with (place() / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(tensors)) + tensors)
        file.truncate(8 + len(tensors) + size)
    status, told = load("own")
    assert status == 400
    assert "expected at most" in told


CONFIGS = {
    "deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "deep lists": '{"target_modules":' + "[" * 100_000 + "]" * 100_000 + "}",
    "alpha NaN": '{"peft_type": "LORA", "r": 8, "lora_alpha": NaN, "target_modules": ["q_proj"]}',
    "alpha infinite": '{"peft_type": "LORA", "r": 8, "lora_alpha": 1e999, "target_modules": ["q_proj"]}',
    "dropout NaN": '{"peft_type": "LORA", "r": 8, "lora_alpha": 8, "lora_dropout": NaN}',
    "r NaN": '{"peft_type": "LORA", "r": NaN}',
    "r of 5,000 digits": '{"peft_type": "LORA", "r": ' + "9" * 5000 + "}",
    "alpha of 400 digits": '{"peft_type": "LORA", "r": 8, "lora_alpha": ' + "9" * 400 + "}",
    "pattern NaN": '{"peft_type": "LORA", "r": 8, "alpha_pattern": {"q_proj": NaN}}',
    "twice": '{"peft_type": "LORA", "peft_type": "LORA"}',
    "half a character": '{"peft_type": "LORA", "r": 8, "base_model_name_or_path": 3, "\\ud83d": "\\ud83d"}',
    "half a base": '{"peft_type": "\\ud83d"}',
    "a list": "[]",
    "null": "null",
    "nothing": "",
    "MLX's": '{"fine_tune_type": "dora", "lora_parameters": {"rank": 1e999, "scale": NaN}}',
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_lie(load, place, capsys, tmp_path, adapter, name):
    config = place() / CONFIG
    config.write_text(CONFIGS[name])
    status, told = load("own")
    assert status == 400, told
    assert CONFIG in told
    shutil.copytree(adapter("lora8"), tmp_path / "own")
    shutil.copy(config, tmp_path / "own")
    assert main(["info", str(tmp_path / "own")]) == 1
    assert "unexpected" not in capsys.readouterr().err


# Beside adapters


def test_info_waits_for_no_pipe_beside_an_adapter(capsys, tmp_path, adapter):
    shutil.copytree(adapter("lora8"), tmp_path / "own")
    for name in ("config.yaml", "theodora_files.json", "README.md", "generation_config.json"):
        (tmp_path / "own" / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / "own" / name)
    assert main(["info", str(tmp_path / "own")]) == 0
    assert "unexpected" not in capsys.readouterr().err


def test_a_base_model_that_is_cut_while_it_is_merged(monkeypatch, capsys, tmp_path, adapter, tiny_model_dir):
    shutil.copytree(tiny_model_dir(), tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    read = BaseCheckpoint.read

    def cut(base, key):
        found = read(base, key)
        os.truncate(weights, 1000)
        return found

    monkeypatch.setattr(BaseCheckpoint, "read", cut)
    out = tmp_path / "out"
    assert main(["merge", str(adapter("lora8")), "--output", str(out), "--base-model", str(tmp_path / "base")]) == 1
    told = capsys.readouterr().err
    assert "model.safetensors" in told.replace("\n", "")
    assert "unexpected" not in told
    assert not out.exists()


@pytest.mark.parametrize("command", [["merge"], ["export", "--to", "peft"], ["info"]])
def test_a_base_model_that_is_cut_short(capsys, tmp_path, adapter, tiny_model_dir, command):
    shutil.copytree(tiny_model_dir(), tmp_path / "base")
    os.truncate(tmp_path / "base" / "model.safetensors", 20_000)
    name, *options = command
    places = [str(adapter("lora8"))] + ([] if name == "info" else ["--output", str(tmp_path / "out")])
    assert main([name, *places, *options, "--base-model", str(tmp_path / "base")]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "model.safetensors is damaged or cut short" in told
    assert "unexpected" not in told


def test_an_adapter_that_changes_while_it_is_exported(monkeypatch, capsys, tmp_path, adapter, tiny_model_dir):
    from theodora.files import read_back

    own = tmp_path / "own"
    shutil.copytree(adapter("lora8"), own)
    copy = shutil.copyfile

    def late(source, target, **options):
        if str(source).endswith(WEIGHTS):
            (own / WEIGHTS).write_bytes((adapter("dora4") / WEIGHTS).read_bytes())
        return copy(source, target, **options)

    monkeypatch.setattr(read_back.shutil, "copyfile", late)
    options = ["--to", "peft", "--no-verify", "--base-model", str(tiny_model_dir())]
    assert main(["export", str(own), "--output", str(tmp_path / "out"), *options]) == 1
    assert "changed while it was exported" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_saved_dataset_that_is_written_anew_while_it_is_read(tmp_path):
    datasets.Dataset.from_list([{"text": f"row {n} " * 50} for n in range(500)]).save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved", None)
    rows = source.rows(Problems("saved"))
    first = next(rows)
    for file in (tmp_path / "saved").glob("*.arrow"):
        os.truncate(file, 0)
    assert [row["text"] for _, row in [first, *rows]] == [f"row {n} " * 50 for n in range(500)]
