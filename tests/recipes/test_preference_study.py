"""Pairs from labels, and the study of what follows SFT: runs in their order, measured, in a table and a figure."""

import json
import multiprocessing
import os
from importlib import import_module

import pytest
import torch

import scripts
from theodora import AdapterConfig, inject_adapter
from theodora.adapters.merge import adapter_disabled
from theodora.adapters.models import load_model_and_tokenizer
from theodora.adapters.state import trained_tensors
from theodora.data import Examples, encode_prompt
from theodora.ends import length_to_end
from theodora.train.reference import Reference
from undrawn import leave_losses_blank

LABELS = ("odd", "even")


@pytest.fixture
def data(tmp_path):
    """The files of study_data.py, small."""
    folder = tmp_path / "data"
    folder.mkdir()
    for part, numbers in {"train": range(40), "validation": range(40, 46), "test": range(50, 60)}.items():
        rows = [
            {
                "prompt": [{"role": "user", "content": f"{n}?"}],
                "completion": [{"role": "assistant", "content": LABELS[n % 2 == 0]}],
            }
            for n in numbers
        ]
        (folder / f"medical.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": f"The town had {n} mills, and a river."} for n in range(70)]
    (folder / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs_are_of_the_right_label_and_another(data, monkeypatch, capsys):
    scripts.run(monkeypatch, "recipes/preference_pairs.py", "--data", data)
    plain, pairs = rows(data / "medical.train.jsonl"), rows(data / "medical.pairs.train.jsonl")
    assert [(pair["prompt"], pair["chosen"]) for pair in pairs] == [(row["prompt"], row["completion"]) for row in plain]
    assert all({pair["chosen"][0]["content"], pair["rejected"][0]["content"]} == {*LABELS} for pair in pairs)
    assert "6 pairs, 2 labels" in capsys.readouterr().out


def test_the_study(data, tiny_model_dir, tmp_path, monkeypatch, capsys):
    leave_losses_blank(monkeypatch)
    run = import_module("theodora.train.run")  # of which tests/train has the answers that models are asked for
    monkeypatch.setattr(run, "_count_stops", lambda prepared: None)
    monkeypatch.setattr(run, "_answers", lambda prepared: [])
    scripts.run(monkeypatch, "recipes/preference_pairs.py", "--data", data)
    words = ["--model", tiny_model_dir(), "--data", data, "--output", tmp_path / "study", "--seeds", 1]
    words += ["--plans", "sft-from-base", "dpo-from-sft", "--sft-steps", 3, "--dpo-steps", 2, "--batch-size", 4]
    scripts.run(monkeypatch, "recipes/preference_study.py", *words)
    report = json.loads((tmp_path / "study" / "study.json").read_text())
    base, *runs = report["runs"]
    assert base["objective"] == "base"
    assert {(run["objective"], run["start"], run["method"]) for run in runs} == {
        (*plan, method) for plan in (("sft", "base"), ("dpo", "sft")) for method in ("lora", "dora")
    }
    for run in runs:
        assert run["kl"] > 0
        assert 0 <= run["score"] <= 1
        assert run["test_rows"] == 10
        assert run["steps"] == {"sft": 3, "dpo": 2}[run["objective"]]
    sft, dpo = ([run for run in runs if run["objective"] == name] for name in ("sft", "dpo"))
    assert [run["general_loss_before"] for run in sft] == pytest.approx([base["general_loss"]] * 2, abs=1e-4)
    assert [run["general_loss_before"] for run in dpo] == pytest.approx([run["general_loss"] for run in sft], abs=1e-4)
    table = (tmp_path / "study" / "study.md").read_text()
    assert "| DPO from SFT, DoRA |" in table
    assert (tmp_path / "study" / "study.png").stat().st_size > 1000
    # What is there is not made again.
    (tmp_path / "study" / "dpo-from-sft-lora-0" / "measured.json").unlink()
    before = (tmp_path / "study" / "sft-from-base-lora-0" / "metrics.jsonl").stat().st_mtime_ns
    scripts.run(monkeypatch, "recipes/preference_study.py", *words)
    assert (tmp_path / "study" / "sft-from-base-lora-0" / "metrics.jsonl").stat().st_mtime_ns == before
    assert len(json.loads((tmp_path / "study" / "study.json").read_text())["runs"]) == 5


def test_a_run_that_fails_is_said_and_the_others_go_on(data, tiny_model_dir, tmp_path, monkeypatch, capsys):
    scripts.run(monkeypatch, "recipes/preference_pairs.py", "--data", data)
    words = [
        "--model",
        tiny_model_dir(),
        "--data",
        data,
        "--output",
        tmp_path / "study",
        "--seeds",
        1,
        "--methods",
        "lora",
    ]
    with pytest.raises(SystemExit, match="1 runs failed: dpo-from-sft-lora-0"):  # from an adapter that is not there
        scripts.run(monkeypatch, "recipes/preference_study.py", *words, "--plans", "dpo-from-sft")
    assert [run["objective"] for run in json.loads((tmp_path / "study" / "study.json").read_text())["runs"]] == ["base"]


def test_processes_have_the_gpus_in_turn(monkeypatch):
    study = scripts.load("recipes/preference_study.py")
    taken, had = multiprocessing.get_context("spawn").Value("i", 0), []
    for _ in range(3):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        study.take_a_gpu(taken, 2)
        had.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert had == ["0", "1", "0"]
    study.take_a_gpu(taken, 2)  # somebody has said which
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_runs_wait_for_the_one_that_they_go_on_from(monkeypatch):
    study = scripts.load("recipes/preference_study.py")
    assert study.Run(objective="grpo", start="base", method="lora").after is None
    run = study.Run(objective="grpo", start="sft", method="dora", seed=2)
    assert run.after == study.Run(objective="sft", start="base", method="dora", seed=2).name
    begun, done = [], []

    class Pool:
        """Finishes one run at a time, the newest first."""

        def __init__(self, workers, mp_context, **_):
            self.futures = {}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, call, run, settings):
            assert run.after is None or run.after in done
            begun.append(run.name)
            return run

    def wait(under_way, return_when):
        last = list(under_way)[-1]
        last.__dict__["result"] = lambda: None
        done.append(last.name)
        return type("Done", (), {"done": [last]})

    monkeypatch.setattr(study, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(study, "wait", wait)
    runs = [study.Run(objective=o, start=s, method=m) for o, s in study.PLANS for m in ("lora", "dora")]
    assert [error for _, error in study.carried_out(runs, None, 2)] == [None] * 8
    assert sorted(begun) == sorted(run.name for run in runs)


def test_the_divergence_is_over_the_whole_vocabulary(tiny_model_dir, monkeypatch):
    study = scripts.load("recipes/preference_study.py")
    monkeypatch.setattr(study, "ANSWER", 1)  # so that nothing depends on what is drawn
    model, tokenizer = load_model_and_tokenizer(str(tiny_model_dir()), dtype="fp32")
    inject_adapter(model, AdapterConfig(rank=2))
    start, rows = Reference(model, None), [{"prompt": text, "completion": "x"} for text in ("abc", "a longer one", "b")]
    examples = Examples(dataset=rows, format="prompt-completion", source="")
    assert study.divergence(model, start, tokenizer, examples, 0) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for name, tensor in trained_tensors(model).items():
            if "lora_B" in name:
                tensor.normal_(std=0.5)
    expected = 0.0
    for row in rows:
        ids = torch.tensor([encode_prompt(row, tokenizer, None)])
        with torch.no_grad():
            own = model(ids).logits[0, -1].softmax(-1)
            with adapter_disabled(model):
                other = model(ids).logits[0, -1].softmax(-1)
        expected += float((own * (own / other).log()).sum()) / 3
    assert study.divergence(model, start, tokenizer, examples, 0, rows=2) == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr(study, "ANSWER", 4)
    assert study.divergence(model, start, tokenizer, examples, 0, rows=2) > expected
    assert [5, 2, 7][: length_to_end([5, 2, 7], [2, 3])] == [5, 2]
