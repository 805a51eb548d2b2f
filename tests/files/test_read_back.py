"""Whatever a writer reports, a file counts as written when it reads back bit for bit."""

import ast
import os
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import theodora
import tiny
from theodora.adapters import inject_adapter, merge_adapter, save_adapter
from theodora.config import AdapterConfig
from theodora.errors import CheckpointError
from theodora.files import read_back

Damage = Callable[[Path], None]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Damage] = {
    "a flipped bit": _flip,
    "the end lost": lambda path: os.truncate(path, path.stat().st_size - 1),
    "half lost": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "more": lambda path: (path.write_bytes(path.read_bytes() + b"\0"), None)[1],
}
TENSORS = {
    "a": torch.randn(5, 7),
    "b": torch.randn(3).bfloat16(),
    "c": torch.tensor(2.0, dtype=torch.float64),
    "d": torch.zeros(0, 4),
    "e": torch.arange(6),
    "f": torch.randn(4).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_a_safetensors_file_that_is_not_what_was_written_is_refused(damage, tmp_path, monkeypatch):
    write = read_back.save_file
    read_back.save_tensors(TENSORS, tmp_path / "good", {"format": "pt"})

    def save_file(tensors, path, metadata):
        write(tensors, path, metadata)
        damage(Path(path))

    monkeypatch.setattr(read_back, "save_file", save_file)
    with pytest.raises(CheckpointError, match=r"bad does not read back as it was written"):
        read_back.save_tensors(TENSORS, tmp_path / "bad", {"format": "pt"})


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_so_are_text_and_copies(damage, tmp_path, monkeypatch):
    (tmp_path / "source").write_text("so and so\n")
    monkeypatch.setattr(read_back, "flush", damage)  # the last that happens before a file is read again
    with pytest.raises(CheckpointError, match="file does not read back"):
        read_back.write_text(tmp_path / "file", "so and so\n")
    with pytest.raises(CheckpointError, match="copy does not read back"):
        read_back.copy_file(tmp_path / "source", tmp_path / "copy")


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(read_back.shutil, "disk_usage", lambda path: usage(1, 1, 0))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="No space left on the disk: file"):
        read_back.check_bytes(tmp_path / "file", b"something")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
def test_what_is_not_finite_is_not_written(bad, dtype, tmp_path):
    tensor = torch.ones(3)
    tensor[1] = bad
    with pytest.raises(CheckpointError, match=r"would hold NaN or infinite values.*\n  - odd"):
        read_back.save_tensors({"odd": tensor.to(dtype), "even": torch.ones(2)}, tmp_path / "file")
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("damage", ["half lost", "empty"])
def test_a_tokenizer_is_read_back(name, damage, tmp_path, tiny_tokenizer):
    read_back.save_tokenizer(tiny_tokenizer, tmp_path)
    DAMAGE[damage](tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name} does not read back"):
        read_back.check_tokenizer(tiny_tokenizer, tmp_path)


def test_lines_are_counted(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    read_back.check_lines(tmp_path / "rows.jsonl", 2)
    for text in ('{"a": 1}\n', '{"a": 1}\n{"a": ', ""):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(CheckpointError, match="does not read back"):
            read_back.check_lines(tmp_path / "rows.jsonl", 2)


@pytest.mark.parametrize("exists", [False, True])
def test_an_adapter_is_saved_whole_or_stays_as_it_was(exists, tmp_path, monkeypatch):
    model = inject_adapter(tiny.tiny_model(), AdapterConfig(rank=2))
    if exists:
        save_adapter(model, tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").glob("*")}
    write = read_back.save_file
    monkeypatch.setattr(read_back, "save_file", lambda t, path, metadata: write(t, path, metadata) or _flip(Path(path)))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors does not read back"):
        save_adapter(model, tmp_path / "a")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").glob("*")} == before


def test_a_merged_model_that_transformers_saves_is_looked_at_too(tmp_path, monkeypatch):
    model = inject_adapter(tiny.tiny_model(), AdapterConfig(rank=2))
    merge_adapter(model)
    model.save_pretrained(tmp_path / "good")
    own = type(model).save_pretrained

    def save(self, folder, **options):
        own(self, folder, **options)
        _flip(Path(folder) / "model.safetensors")

    monkeypatch.setattr(type(model), "save_pretrained", save)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not read back"):
        model.save_pretrained(tmp_path / "bad")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(CheckpointError, match=r"merged model holds NaN.*\n  - model.norm.weight"):
        model.save_pretrained(tmp_path / "nan")


def test_nobody_writes_a_models_files_past_it():
    """`save_file`, `copyfile` and tokenizers' own writers are called here alone (but where formats are compared)."""
    source = Path(theodora.__file__).parent
    found = []
    for path in sorted(source.rglob("*.py")):
        part = path.relative_to(source).parts[0]
        if part in ("conformance", "bench") or path.name == "read_back.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.func if isinstance(node, ast.Call) else None
            called = getattr(name, "attr", getattr(name, "id", None))
            if called in ("save_file", "copyfile", "copy2", "copytree", "tofile") or (
                called == "save_pretrained" and "tokenizer" in ast.unparse(node)
            ):
                found.append(f"{path.relative_to(source)}:{node.lineno} {called}")
    assert found == []
