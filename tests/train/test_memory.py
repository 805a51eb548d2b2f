"""The most memory that a part of a process's life took."""

import torch

from theodora.train import memory
from theodora.train.progress import peak_memory

CPU = torch.device("cpu")


def test_what_is_held_counts():
    memory.start_counting(CPU)
    held = torch.ones(16_000_000)
    assert memory.peak_of(CPU) >= held.nbytes
    assert peak_memory() >= held.nbytes


def test_a_system_that_counts_nothing_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no" / "clear_refs")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "no" / "status")
    memory.start_counting(CPU)
    assert memory.peak_of(CPU) == 0
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("Name:\tpython\n")
    assert memory.peak_of(CPU) == 0
