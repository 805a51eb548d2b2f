"""Safetensors files by way of a copy of the whole file, as a GPU gets them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from theodora.errors import CheckpointError
from theodora.files.adapter import adapter_of, read_adapter
from theodora.files.distrust import read_tensors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_a_file_in_one_piece_is_the_file(tmp_path):
    tensors = {
        "wide": torch.randn(3, 4, dtype=torch.float64),
        "plain": torch.randn(5),
        "half": torch.randn(2, 3).bfloat16(),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "file.safetensors", {"theodora": '{"starts": true}'})
    found, metadata = read_tensors(tmp_path / "file.safetensors", DEVICE)
    assert metadata == {"starts": True}
    assert {t.device.type for t in found.values()} == {DEVICE.type}
    torch.testing.assert_close({key: t.cpu() for key, t in found.items()}, tensors, rtol=0, atol=0)


def test_numbers_that_do_not_lie_where_torch_wants_them(tmp_path):
    header = {
        "odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "after": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = bytes([7]) + torch.tensor([1.5, -2.0]).numpy().tobytes()
    (tmp_path / "file.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    found, _ = read_tensors(tmp_path / "file.safetensors", DEVICE)
    assert found["after"].tolist() == [1.5, -2.0]
    assert found["odd"].tolist() == [7]


@pytest.mark.parametrize("length", [0, 5, 9, 40])
def test_a_damaged_file_is_an_error(tmp_path, length):
    save_file({"a": torch.randn(4)}, tmp_path / "file.safetensors")
    whole = (tmp_path / "file.safetensors").read_bytes()
    (tmp_path / "file.safetensors").write_bytes(whole[:length])
    with pytest.raises(CheckpointError, match="damaged"):
        read_tensors(tmp_path / "file.safetensors", DEVICE)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="asks a GPU")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found_on_a_gpu(tmp_path, bad):
    from theodora import AdapterConfig

    key = "base_model.model.layer.lora_{}.weight"
    tensors = {key.format("A"): torch.randn(2, 4), key.format("B"): torch.randn(3, 2)}
    adapter_of({k: t.to(DEVICE) for k, t in tensors.items()}, AdapterConfig(method="lora", rank=2), tmp_path / "x")
    tensors[key.format("B")][1, 1] = bad
    with pytest.raises(CheckpointError, match=r"lora_B\.weight: holds NaN or infinite"):
        adapter_of({k: t.to(DEVICE) for k, t in tensors.items()}, AdapterConfig(method="lora", rank=2), tmp_path / "x")


def test_an_adapter_is_the_same_by_either_way(tmp_path):
    from torch import nn

    from theodora import AdapterConfig, inject_adapter, save_adapter

    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    inject_adapter(model, AdapterConfig(rank=2, targets=("0", "1")))
    save_adapter(model, tmp_path / "adapter")
    mapped, moved = read_adapter(tmp_path / "adapter"), read_adapter(tmp_path / "adapter", DEVICE)
    for path, tensors in mapped.modules.items():
        torch.testing.assert_close(moved.modules[path].a.cpu(), tensors.a)
        torch.testing.assert_close(moved.modules[path].b.cpu(), tensors.b)
        torch.testing.assert_close(moved.modules[path].magnitude.cpu(), tensors.magnitude)
