"""What a run, a merge and an export report is what happened, and what they wrote is what they meant to write."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, TrainerState

from theodora.cli import main as cli
from theodora.export import gguf_written
from theodora.files import read_back
from theodora.files.ours import changes
from theodora.train.checkpoints import newest_checkpoint


@pytest.fixture
def command(tiny_model_dir, rows, tmp_path, capsys):
    """`theodora train` on the tiny model: its exit code and what it says."""

    def run(*more: str, output: str = "run") -> tuple[int, str]:
        where = ["--model", str(tiny_model_dir()), "--data", str(rows), "--output", str(tmp_path / output)]
        size = ["--rank", "2", "--per-device-train-batch-size", "4", "--held-out", "0", "--warmup-steps", "0"]
        code = cli.main(["train", *where, *size, "--lr-scheduler-type", "constant", *more])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def _rates(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["learning_rate"] for line in lines if "learning_rate" in line]


def test_a_resumed_run_uses_the_learning_rate_that_it_records(command, tmp_path):
    assert command("--max-steps", "2", "--save-steps", "1")[0] == 0
    code, said = command("--max-steps", "3", "--save-steps", "1", "--resume", "--learning-rate", "0.05")
    assert code == 0
    assert "lr 5.0e-02" in said
    assert _rates(tmp_path / "run")[-1] == 0.05
    assert "# until step 2: learning_rate 0.0005" in (tmp_path / "run" / "config.yaml").read_text()


def test_an_option_that_a_resumed_run_cannot_use_is_refused(command, tmp_path):
    assert command("--max-steps", "1")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, said = command("--max-steps", "2", "--resume", "--seed", "7", "--init", "gaussian")
    assert code != 0
    assert "seed was 0 and is 7" in said
    assert "init was default and is gaussian" in said
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


RUINOUS = ("--learning-rate", "1e30", "--max-grad-norm", "0", "--method", "lora")


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_step_that_ruins_the_weights_is_not_saved_over_good_ones(command, tmp_path, policy):
    good = ("--max-steps", "2", "--save-steps", "1", "--method", "lora")
    assert command(*good)[0] == 0
    code, said = command("--max-steps", "4", "--save-steps", "1", *RUINOUS, "--resume", "auto", "--on-nan", policy)
    assert code != 0
    assert "after step 3, and nothing of that was saved" in said
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.name == "checkpoint-2"
    assert command("--max-steps", "4", "--save-steps", "1", "--method", "lora", "--resume", "auto")[0] == 0
    assert all(bool(t.isfinite().all()) for t in load_file(tmp_path / "run" / "adapter_model.safetensors").values())


@pytest.mark.parametrize("saves", [("--save-steps", "100"), ("--save-strategy", "no")])
def test_a_run_whose_last_step_ruins_the_weights_fails(command, tmp_path, saves):
    code, said = command("--max-steps", "1", *RUINOUS, *saves)
    assert code != 0
    assert "after step 1, and nothing of that was saved" in said
    assert "all finite" not in said
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_base_that_is_not_finite_is_named_and_not_the_learning_rate(ruined_base, rows, tmp_path, capsys):
    for held_out in ("0", "4"):
        where = ["--model", str(ruined_base("model.norm.weight")), "--data", str(rows), "--output", str(tmp_path / "r")]
        assert cli.main(["train", *where, "--max-steps", "1", "--held-out", held_out, "--overwrite"]) != 0
        said = capsys.readouterr()
        assert "model.norm.weight" in said.out + said.err
        assert "base model itself holds NaN" in said.out + said.err


@pytest.fixture
def ruined_base(tiny_model_dir, tmp_path):
    """The tiny model's folder with one bad value in the tensor named."""

    def make(name: str, value: float = float("nan")) -> Path:
        folder = tmp_path / f"base-{name}-{value}"
        folder.mkdir(exist_ok=True)
        for file in Path(tiny_model_dir()).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[0] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def _merge(adapter: Path, base: Path, output: Path) -> int:
    return cli.main(["merge", str(adapter), "--base-model", str(base), "--output", str(output)])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.norm.weight", float("nan")),
        ("lm_head.weight", float("inf")),
        ("model.layers.0.mlp.up_proj.weight", -float("inf")),
    ],
)
def test_a_merge_onto_a_base_that_is_not_finite_names_the_bases_tensor(
    ruined_base, adapter, name, value, tmp_path, capsys
):
    assert _merge(adapter(), ruined_base(name, value), tmp_path / "merged") != 0
    said = capsys.readouterr().err
    assert f"{name}: the base model's own weight holds NaN or infinite values" in said
    assert not (tmp_path / "merged").exists()


@pytest.fixture
def loud(adapter, tmp_path) -> Path:
    """An adapter of finite values whose merged weights are beyond float16."""
    folder = tmp_path / "loud"
    folder.mkdir()
    for file in adapter("lora8").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    louder = {key: tensor * 1e6 if "lora_B" in key else tensor for key, tensor in tensors.items()}
    save_file(louder, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("form", ["gguf", "hf"])
def test_an_export_beyond_its_dtype_is_refused(form, loud, tiny_model_dir, tmp_path, capsys):
    base = ["--base-model", str(tiny_model_dir())]
    for check in ([], ["--no-verify"]):
        to = ["--to", form, "--output", str(tmp_path / "out.gguf"), "--dtype", "fp16"]
        assert cli.main(["export", str(loud), *to, *base, *check]) != 0
        said = capsys.readouterr().err
        assert "beyond the range of" in said
        assert "bf16 or fp32" in said
        assert not (tmp_path / "out.gguf").exists()
    to = ["--to", form, "--output", str(tmp_path / "out.gguf"), "--dtype", "bf16", "--no-verify"]
    assert cli.main(["export", str(loud), *to, *base]) == 0


# A writer's success is not believed.


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    place = len(data) * 2 // 3
    if zipfile.is_zipfile(path):  # torch's: in what it holds, not in what fills it up between
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda part: part.file_size)
            place = data.index(archive.read(largest))
    data[place] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE = pytest.mark.parametrize("damage", [_flip, _cut, _empty])


def _spoil(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, spoil: Any) -> None:
    """Let a writer succeed, and what it wrote be spoilt; `spoil` gets the writer's own arguments."""
    write = getattr(where, name)

    def written(*args: Any, **kwargs: Any) -> Any:
        result = write(*args, **kwargs)
        spoil(*args, **kwargs)
        return result

    monkeypatch.setattr(where, name, written)


EXPORTS = ["peft", "mlx", "served", "hf", "gguf", "gguf-lora"]


@pytest.mark.parametrize(
    ("form", "damage"), [*((form, _flip) for form in EXPORTS), *((form, _empty) for form in EXPORTS), ("gguf", _cut)]
)
def test_an_export_that_is_not_what_was_written_is_refused(
    form, damage, adapter, tiny_model_dir, tmp_path, monkeypatch, capsys
):
    _spoil(monkeypatch, read_back, "save_file", lambda tensors, path, *_others: damage(Path(path)))
    _spoil(monkeypatch, shutil, "copyfile", lambda source, target, **_others: damage(Path(target)))
    _spoil(monkeypatch, gguf_written, "flush", damage)  # a GGUF file, when it is closed
    to = ["--to", form, "--output", str(tmp_path / "out.gguf"), "--base-model", str(tiny_model_dir()), "--no-verify"]
    assert cli.main(["export", str(adapter("lora8")), *to]) != 0
    assert "does not read back as it was written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == []


@DAMAGE
def test_a_merge_that_is_not_what_was_written_is_refused(
    damage, adapter, tiny_model_dir, tmp_path, monkeypatch, capsys
):
    _spoil(monkeypatch, read_back, "save_file", lambda tensors, path, *_others: damage(Path(path)))
    assert _merge(adapter(), Path(tiny_model_dir()), tmp_path / "merged") != 0
    assert "model.safetensors does not read back" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "damage"),
    [
        ("adapter", _flip),
        ("optimizer.pt", _flip),
        ("scheduler.pt", _cut),
        ("tokenizer.json", _flip),
        ("trainer_state.json", _empty),
    ],
)
def test_a_checkpoint_that_is_not_what_was_written_is_refused(what, damage, command, tmp_path, monkeypatch):
    good = ("--max-steps", "1", "--save-steps", "1")
    assert command(*good)[0] == 0

    def after(*args: Any, **kwargs: Any) -> None:
        for path in [Path(a) for a in args if isinstance(a, str | Path)]:
            if path.name == what:
                damage(path)
            elif (path / what).is_file():
                damage(path / what)

    if what == "adapter":
        _spoil(monkeypatch, read_back, "save_file", lambda tensors, path, *_others: damage(Path(path)))
    elif what == "tokenizer.json":
        _spoil(monkeypatch, PreTrainedTokenizerFast, "save_pretrained", after)
    elif what == "trainer_state.json":
        _spoil(monkeypatch, TrainerState, "save_to_json", after)
    else:
        _spoil(monkeypatch, torch, "save", after)
    code, said = command("--max-steps", "2", "--save-steps", "1", "--resume")
    assert code != 0
    assert "does not read back as it was written" in said
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.name == "checkpoint-1"
    assert changes(newest) == []
