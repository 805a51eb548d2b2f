"""Whether a folder is as it was written: adapters by the header of their weights, all else by its list of files."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from theodora import AdapterConfig, inject_adapter, load_adapter, merge_checkpoint, save_adapter
from theodora.analysis import inspect_adapter
from theodora.cli.main import main
from theodora.files.ours import CHECKPOINT, MARK, changes, described, mark_written, why_not_ours
from tiny import tiny_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def adapter(tmp_path, tiny_model_dir):
    model = inject_adapter(tiny_model(), AdapterConfig(rank=2))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape))
    save_adapter(model, tmp_path / "adapter")
    change_config(tmp_path / "adapter", base_model_name_or_path=str(tiny_model_dir()))
    return tmp_path / "adapter"


def change_config(folder, **fields):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def flip_last_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_an_adapter_is_as_it_was_written_wherever_its_base_lies(adapter):
    assert changes(adapter) == []
    assert {path.name for path in adapter.iterdir()} == {WEIGHTS, CONFIG}
    change_config(adapter, base_model_name_or_path="elsewhere", revision="main")
    assert described(adapter) == "as it was written"
    save_adapter(load_adapter(tiny_model(), adapter), adapter)  # over itself
    assert changes(adapter) == []


def test_a_changed_bit_and_a_changed_option_are_told(adapter):
    flip_last_bit(adapter / WEIGHTS)
    (told,) = changes(adapter)
    assert told.startswith(f"{WEIGHTS} has changed (sha256 ")
    change_config(adapter, lora_alpha=99)
    assert [change.partition(" ")[0] for change in changes(adapter)] == [WEIGHTS, CONFIG]
    (adapter / CONFIG).unlink()
    assert changes(adapter) == [f"{CONFIG} is missing"]


@pytest.mark.parametrize("damage", ["cut", "empty", "config"])
def test_what_cannot_be_read_is_told(damage, adapter):
    path = adapter / (CONFIG if damage == "config" else WEIGHTS)
    path.write_bytes(b"[" if damage == "config" else path.read_bytes()[:-5] if damage == "cut" else b"")
    (told,) = changes(adapter)
    assert "cannot be read" in told


def test_of_others_nothing_is_known(adapter, tiny_model_dir):
    tensors = load_file(adapter / WEIGHTS)
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    assert changes(adapter) is None
    assert described(adapter) == "nothing says how it was written"
    assert described(tiny_model_dir()) == "nothing says how it was written"
    assert described(adapter / "nowhere") is None


def test_peft_reads_it_and_what_it_writes_says_nothing(adapter, tmp_path):
    PeftModel.from_pretrained(tiny_model(), adapter).save_pretrained(tmp_path / "theirs")
    assert changes(tmp_path / "theirs") is None


def test_info_says_so(adapter, capsys):
    assert main(["info", str(adapter)]) == 0
    assert "as it was written" in " ".join(capsys.readouterr().out.split())
    flip_last_bit(adapter / WEIGHTS)
    report = inspect_adapter(adapter)
    assert report.written.startswith(f"NOT as it was written: {WEIGHTS} has changed")
    assert main(["info", str(adapter), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["written"] == report.written
    assert any("not as it was written" in warning for warning in printed["warnings"])


def test_merged_folders_and_verify(adapter, tmp_path, capsys):
    merged = tmp_path / "merged"
    merge_checkpoint(adapter, merged)
    assert changes(merged) == []
    listed = json.loads((merged / MARK).read_text())
    assert {*listed["sha256"]} == {*listed["files"]} == {path.name for path in merged.iterdir()} - {MARK}
    assert main(["verify", str(adapter), str(merged)]) == 0
    assert capsys.readouterr().out.count("as it was written") == 2
    flip_last_bit(merged / "model.safetensors")
    main(["verify", str(adapter), str(merged), "--json"])
    written = json.loads(capsys.readouterr().out)["written"]
    assert written[0] == "as it was written"
    assert written[1].startswith("NOT as it was written: model.safetensors has changed")
    (merged / "config.json").rename(tmp_path / "config.json")
    assert "config.json is missing" in changes(merged)


@pytest.mark.parametrize("text", ["{", "[]", '{"sha256": 3}', '{"form": "merged", "files": [], "sha256": [1]}'])
def test_lists_that_are_none(text, tmp_path):
    (tmp_path / MARK).write_text(text)
    (told,) = changes(tmp_path)
    assert told.startswith(f"{MARK} cannot be read")


def test_lists_without_hashes_say_nothing(tmp_path):
    (tmp_path / MARK).write_text('{"form": "merged", "files": []}')  # of an earlier version
    assert changes(tmp_path) is None
    assert why_not_ours(tmp_path) is None


def test_a_checkpoint_is_nothing_to_be_replaced(tmp_path):
    for form, why in (("merged", None), (CHECKPOINT, "it is a checkpoint of a training run")):
        folder = tmp_path / form
        folder.mkdir()
        (folder / "a").write_text("a")
        (folder / "b").symlink_to("nowhere")
        mark_written(folder, form)
        assert why_not_ours(folder) == why
        assert changes(folder) == []
        shutil.rmtree(folder)
