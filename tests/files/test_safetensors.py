"""Safetensors headers: what the library accepts is accepted, and gives the same tensors."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file

from theodora.errors import CheckpointError
from theodora.files import safetensors
from theodora.files.folder import OpenFile
from theodora.files.safetensors import parse_header, read_header, read_safetensors, read_tensor

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_all_kinds_of_numbers(tmp_path, monkeypatch, device):
    monkeypatch.setattr(safetensors, "_PIECE", 7)  # bytes, so that a file has several
    tensors = {
        str(dtype): (
            torch.randint(0, 2, (3, 2)).to(dtype) if dtype != torch.float8_e8m0fnu else torch.ones(2).to(dtype)
        )
        for dtype in safetensors._DTYPES.values()
    }
    save_file(tensors, tmp_path / "file", {"a": "ü"})
    with OpenFile.at(tmp_path / "file") as file:
        found, metadata = read_safetensors(file, device)
        header = read_header(file)
        one = {name: read_tensor(file, header, described) for name, described in header.tensors.items()}
    assert metadata == {"a": "ü"}
    for read in (found, one):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    ("tensors", "size"),
    [
        ({"a": F32 | {"shape": [1] * 64}}, 4),
        ({"a": F32 | {"shape": []}}, 4),
        ({"a": F32 | {"shape": [0], "data_offsets": [0, 0]}}, 0),
        ({"a": F32 | {"shape": [0, 2**40], "data_offsets": [0, 0]}, "b": F32}, 4),
        ({"b": F32 | {"data_offsets": [4, 8]}, "a": F32, "c": F32 | {"shape": [0], "data_offsets": [4, 4]}}, 8),
        ({"a": F32 | {"more": 1}, "__metadata__": {}}, 4),
        ({}, 0),
        ({"a": F32 | {"shape": [2]}}, 4),
        ({"a": F32 | {"shape": [2**62, 4]}}, 4),
        ({"a": F32 | {"shape": [-1]}}, 4),
        ({"a": F32}, 5),
        ({"a": F32, "b": F32}, 4),
        ({"a": F32, "b": F32 | {"data_offsets": [5, 9]}}, 9),
        ({"a": F32, "__metadata__": {"a": 1}}, 4),
        ({"a": F32, "__metadata__": 1}, 4),
        ({"a": F32 | {"dtype": "f32"}}, 4),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4),
    ],
)
def test_no_other_files_than_the_library_reads(tensors, size):
    text = json.dumps(tensors).encode()
    try:
        load(len(text).to_bytes(8, "little") + text + bytes(size))
        accepted = True
    except (SafetensorError, RuntimeError):
        accepted = False
    try:
        found, _ = parse_header(text, size)
    except ValueError:
        assert not accepted
    else:
        assert accepted
        assert found.keys() == tensors.keys() - {"__metadata__"}


def test_a_file_that_memory_does_not_hold(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(save({"a": torch.zeros(1000)}))
    monkeypatch.setattr(safetensors, "available_memory", lambda: 1000)
    with OpenFile.at(tmp_path / "file") as file, pytest.raises(CheckpointError, match="this machine has 1,000 bytes"):
        read_safetensors(file)
    monkeypatch.undo()
    assert safetensors.available_memory() > 1 << 20


def test_a_header_longer_than_it_may_be(tmp_path):
    (tmp_path / "file").write_bytes(save({"a": torch.zeros(1)}))
    with OpenFile.at(tmp_path / "file") as file, pytest.raises(ValueError, match="expected at most 20"):
        read_header(file, longest=20)
