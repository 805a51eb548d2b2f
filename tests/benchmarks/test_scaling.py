"""The benchmark of several processes: one process of it runs a step, and what it counts and tells is right."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import scripts


@pytest.fixture
def scaling(monkeypatch):
    """Its names."""
    monkeypatch.syspath_prepend(scripts.ROOT / "benchmarks")
    import scaling

    yield scaling
    for name in ("scaling", "train_step"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("way", ["dora-ddp", "peft-lora-ddp"])
def test_a_process_measures_a_step(scaling, monkeypatch, tmp_path, way):
    words = (
        "--device cpu --backend gloo --layers 1 --hidden 32 --length 16 --batch 2 --vocabulary 64 --rank 2 --steps 2"
    )
    monkeypatch.setattr(sys, "argv", ["scaling.py", *words.split(), "--work", way, str(tmp_path / "result.json")])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    scaling.work(scaling.parse_args())
    assert not dist.is_initialized()
    figures = json.loads((tmp_path / "result.json").read_text())
    assert figures["tokens_per_second"] == 32 / figures["seconds"]
    assert figures["bytes_sent"] == 0  # nobody else is there
    assert 0 < figures["loss"] < 10
    assert figures["peak"] > 0


def test_what_is_sent_is_counted_where_it_is_asked_for(scaling, monkeypatch):
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        monkeypatch.setattr(dist, name, lambda *_, **__: None)
    small, large = torch.zeros(10), torch.zeros(40)
    sent = scaling.Sent(4)
    for call, expected in (
        (lambda: dist.all_reduce(large), 2 * 3 / 4 * 160),
        (lambda: dist.all_gather_into_tensor(large, small), 3 / 4 * 160),
        (lambda: dist.all_gather_into_tensor(output_tensor=large, input_tensor=small), 3 / 4 * 160),
        (lambda: dist.reduce_scatter_tensor(output=small, input=large), 3 / 4 * 160),
    ):
        sent.bytes = 0
        with sent.counted():
            call()
        assert sent.bytes == expected
    assert dist.all_reduce(large) is None
    assert sent.bytes == 3 / 4 * 160  # no longer counted


def test_a_way_that_fails_has_a_row(scaling, monkeypatch, tmp_path, capsys):
    def run(command, **_):
        if "peft-dora-ddp" in command:
            return SimpleNamespace(
                returncode=1, stderr="[rank1]: Traceback\n[rank1]: ValueError: too large\nChildFailedError: x"
            )
        if "torch.distributed.run" not in command:  # what describes the machine
            return SimpleNamespace(returncode=1, stdout="", stderr="")
        count = next(int(word.partition("=")[2]) for word in command if word.startswith("--nproc-per-node"))
        figures = {"seconds": 0.5, "tokens_per_second": 90.0 * count, "loss": 4.0, "peak": 2**30, "bytes_sent": 2e6}
        scaling.Path(command[-1]).write_text(json.dumps(figures))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(scaling.subprocess, "run", run)
    output = tmp_path / "scaling.json"
    words = ["--device", "cpu", "--processes", "1", "2", "--ways", "dora-ddp", "peft-dora-ddp", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *words])
    scaling.main()
    rows = json.loads(output.read_text())["rows"]
    assert [row.get("speedup") for row in rows] == [1.0, 2.0, None, None]
    assert [row.get("failure") for row in rows] == [None, None, "ValueError: too large", "ValueError: too large"]
    assert "Theodora DoRA, DDP" in capsys.readouterr().out
