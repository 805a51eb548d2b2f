"""Pushing to a hub on loopback: what is sent, what is not, and what is refused before anything is."""

import importlib
import json

import huggingface_hub
import pytest
from rich.console import Console

import fake_hub
from theodora.cli.main import main
from theodora.config import TrainConfig
from theodora.errors import CheckpointError, ConfigError, UsageError
from theodora.files.hub import check_place, files_to_push, push_folder
from theodora.train import train

ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "config.yaml", "loss.png", "tokenizer.json"}


@pytest.fixture
def hub(monkeypatch):
    with fake_hub.running() as server:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        for module in ("constants", "hf_api", "_commit_api", "utils._http", "lfs"):
            found = importlib.import_module(f"huggingface_hub.{module}")
            if hasattr(found, "ENDPOINT"):
                monkeypatch.setattr(found, "ENDPOINT", server.url)
        own = huggingface_hub.HfApi
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda **kwargs: own(endpoint=server.url, **kwargs))
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def folder(tmp_path):
    """What a run leaves, and what others have put there."""
    run = tmp_path / "first"
    (run / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    names = [*ADAPTER, "metrics.jsonl", "held_out.jsonl", "bad_batches.jsonl", "theodora_files.json", "notes.txt"]
    for name in [*names, ".env", "checkpoints/checkpoint-4/adapter_model.safetensors", "train.jsonl", "my.py"]:
        (run / name).write_bytes(f"{name}: its content".encode())
    (run / "tokenizer_config.json").symlink_to(run / ".env")
    return run


def test_exactly_what_belongs_is_sent(hub, folder):
    said = []
    place = check_place("my-adapter")
    assert str(place) == "me/my-adapter (private, new)"
    assert hub.repos == {}  # so far it was asked alone
    pushed = push_folder(folder, place, said.append)
    assert set(hub.files("me/my-adapter")) == ADAPTER == set(pushed.files)
    assert hub.files("me/my-adapter")["README.md"] == b"README.md: its content"
    assert hub.repos["me/my-adapter"]["private"]
    assert all(name in said[0] for name in ADAPTER)
    assert "private, new" in said[0]


def test_a_model_takes_its_shards_and_its_code_along(folder):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    with pytest.raises(UsageError, match="neither an adapter"):
        files_to_push(folder)
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        (folder / name).write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    plain = {file.name for file in files_to_push(folder)}
    assert plain >= {"config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModelForCausalLM": "my.Model"}}))
    assert {file.name for file in files_to_push(folder)} - plain == {"my.py"}


def test_a_repository_stays_as_private_or_public_as_it_is(hub, folder, capsys):
    hub.add("me/open", private=False)
    hub.add("me/closed", private=True)
    with pytest.raises(ConfigError, match="public, and was to be private"):
        check_place("me/open", private=True)
    push_folder(folder, check_place("me/open"))
    assert main(["push", str(folder), "me/closed", "--public", "--revision", "v2"]) == 0
    assert hub.repos["me/closed"]["private"]
    assert set(hub.files("me/closed", "v2")) == ADAPTER
    assert not hub.files("me/closed")
    assert "me/closed at v2 (private)" in " ".join(capsys.readouterr().out.split())
    assert main(["push", str(folder), "team/new", "--public", "--json"]) == 0
    assert not hub.repos["team/new"]["private"]
    assert json.loads(capsys.readouterr().out)["name"] == "team/new"


@pytest.mark.parametrize(
    ("token", "name", "word"),
    [
        ("hf_of_nobody", "me/x", "no valid token"),
        (fake_hub.READ_TOKEN, "me/x", "may only read"),
        (fake_hub.TOKEN, "others/new", "Expected an owner among me, team"),
        (fake_hub.TOKEN, "others/there", "may not write to it"),
        (fake_hub.TOKEN, "a/b/c", "Expected owner/name"),
        (fake_hub.TOKEN, "--x", "Expected owner/name"),
    ],
)
def test_what_may_not_be_written_is_refused_before_anything_is_sent(hub, monkeypatch, token, name, word):
    hub.add("others/there", private=False)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match=word):
        check_place(name)
    assert not [line for line in hub.asked if line.startswith("POST")]


def test_off_the_network_nothing_is_tried(monkeypatch):
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        check_place("me/x")


@pytest.fixture
def run(tiny_model_dir, tmp_path):
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{a} + 1 =", "completion": f" {a + 1}"}) + "\n" for a in range(9)))
    options = {"model": str(tiny_model_dir()), "data": str(data), "output": str(tmp_path / "run"), "max_steps": 2}
    return lambda **others: train(
        TrainConfig.from_options(options | others, granted=["push_to_hub"]), console=Console(quiet=True)
    )


def test_a_run_asks_first_and_pushes_last(hub, run, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="owner among"):
        run(push_to_hub="others/x")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    run(push_to_hub="x", method="full", learning_rate=1e-3)
    sent = hub.files("me/x")
    assert sent["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    assert not [name for name in sent if "checkpoint" in name or name.endswith(".jsonl")]
    hub.refuses_commits = True
    with pytest.raises(CheckpointError, match="theodora push"):
        run(push_to_hub="x", overwrite=True)
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_a_recipe_cannot_push():
    options = {"model": "m", "data": "d", "output": "o", "push_to_hub": "a-stranger/x"}
    with pytest.raises(ConfigError, match="--push-to-hub a-stranger/x"):
        TrainConfig.from_options(options)
