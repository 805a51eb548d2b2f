"""`inspect_run` on runs of every kind: adapters, fully tuned models, many checkpoints and one."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from theodora.adapters import inject_adapter, save_adapter
from theodora.analysis.correlation import correlate, interval
from theodora.analysis.run import inspect_run, largest_movers
from theodora.analysis.run_figure import draw_run_figures
from theodora.config import AdapterConfig
from theodora.errors import CheckpointError, ConfigError

STEPS = (2, 4, 10)


@pytest.fixture
def make(tmp_path, tiny_model, tiny_model_dir):
    """A run's folder: random walks away from the base."""

    def make(method: str, family: str = "llama", *, steps: tuple[int, ...] = STEPS, place: str = ".", **config) -> Path:
        model = tiny_model(family)
        model.config._name_or_path = str(tiny_model_dir(family))
        if method != "full":
            inject_adapter(model, AdapterConfig(method=method, rank=4, **config))
        run = tmp_path / f"{method}-{family}"
        for step in steps:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.02 * torch.randn_like(parameter))
            folder = run / place / f"checkpoint-{step}"
            model.save_pretrained(folder) if method == "full" else save_adapter(model, folder)
        if method != "full":
            save_adapter(model, run)
        return run

    return make


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox"])
@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_every_checkpoint_against_the_base(make, tiny_model_dir, method, family):
    base = tiny_model_dir(family)
    report = inspect_run(make(method, family), base)
    assert report.method == method
    assert [c.step for c in report.checkpoints] == list(STEPS)  # not 10, 2, 4
    assert report.warnings == ()
    assert all("the same as checkpoint-10" in note for note in report.notes)
    for correlation in report.correlations:
        assert correlation.points == 6
        assert correlation.pearson is not None
    first, last = report.checkpoints[0].modules, report.checkpoints[-1].modules
    assert [m.path for m in first] == [m.path for m in last]
    assert sum(m.direction for m in first) < sum(m.direction for m in last)
    for module in last:
        assert module.effective_rank is not None
        assert 1 < module.effective_rank <= (4.001 if method == "lora" else 32)
    if method == "full" and family == "llama":
        assert {"model.embed_tokens", "lm_head"} < {m.path for m in last}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_fully_tuned_module(make, tiny_model_dir, family):
    base, run = tiny_model_dir(family), make("full", family, steps=(3,))
    name = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}[family]
    module = next(m for m in inspect_run(run, base).checkpoints[0].modules if m.path == name)
    files = [load_file(folder / "model.safetensors") for folder in (base, run / "checkpoint-3")]
    w, tuned = (
        next(t.double() for key, t in file.items() if name.endswith(key.removesuffix(".weight"))) for file in files
    )
    if family == "gpt2":  # Conv1D is stored (in, out)
        w, tuned = w.T, tuned.T
    assert module.shape == (32, 48)
    assert module.magnitude == pytest.approx(float((tuned.norm(dim=1) - w.norm(dim=1)).abs().mean()))
    assert module.direction == pytest.approx(float((1 - torch.cosine_similarity(w, tuned)).mean()))


def test_one_merged_adapter_is_the_adapter(make, tiny_model_dir, tmp_path):
    from theodora.merging import merge_checkpoint

    run = make("dora", steps=(5,))
    merge_checkpoint(run, tmp_path / "merged")
    adapter = inspect_run(run).checkpoints[-1].modules
    merged = {m.path: m for m in inspect_run(tmp_path / "merged", tiny_model_dir()).checkpoints[-1].modules}
    for module in adapter:
        assert module.magnitude == pytest.approx(merged[module.path].magnitude, rel=1e-4)
        assert module.direction == pytest.approx(merged[module.path].direction, rel=1e-4)


def test_our_own_trainer_keeps_checkpoints_in_a_folder(make):
    assert [c.label for c in inspect_run(make("dora", place="checkpoints"), rank=False).checkpoints] == [
        *("checkpoint-2", "checkpoint-4", "checkpoint-10")
    ]


def test_modules_trained_in_full_beside_an_adapter(make):
    report = inspect_run(make("lora", modules_to_save=["lm_head", "embed_tokens"]))
    sizes = {m.path: m.size for m in report.checkpoints[-1].modules}
    assert sizes["lm_head"] > 0
    assert sizes["model.embed_tokens"] > 0


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_from_the_weight(make, init):
    report = inspect_run(make("dora", init=init))
    assert report.warnings == ()
    assert all(0 < m.size < 0.5 for m in report.checkpoints[-1].modules)


def test_a_base_must_be_named_and_fit(make, tmp_path, tiny_model, tiny_model_dir):
    run = make("full")
    with pytest.raises(CheckpointError, match="--base-model"):
        inspect_run(run)
    with pytest.raises(CheckpointError, match="not built like the base") as error:
        inspect_run(run, tiny_model_dir("gpt_neox"))
    assert len(str(error.value).splitlines()) < 30
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    assert "another model" in inspect_run(run, tmp_path / "other", rank=False).warnings[0]
    with pytest.raises(CheckpointError, match="is not here"):
        inspect_run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="nothing to compare"):
        inspect_run(tmp_path / "empty")


def test_what_is_odd_is_said(make, tiny_model, tiny_model_dir):
    run = make("full")
    (run / "checkpoint-7").mkdir()
    tiny_model().save_pretrained(run / "checkpoint-1")
    broken = tiny_model()
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    broken.save_pretrained(run / "checkpoint-12")
    tiny_model(dtype=torch.bfloat16).save_pretrained(run / "checkpoint-13")
    report = inspect_run(run, tiny_model_dir())
    assert any("checkpoint-7 holds neither" in note for note in report.notes)
    assert any("BF16" in note and "rounding" in note for note in report.notes)
    assert any("checkpoint-1: nothing changed" in warning for warning in report.warnings)
    assert any("checkpoint-12: 1 modules hold NaN" in warning for warning in report.warnings)
    json.dumps(report.to_dict(), allow_nan=False)


def test_new_tokens_are_left_out(make, tiny_model, tiny_model_dir, tmp_path):
    tiny_model(vocab_size=288).save_pretrained(tmp_path / "larger")
    report = inspect_run(tmp_path / "larger", tiny_model_dir(), rank=False)
    assert any("new tokens?" in note for note in report.notes)
    assert {m.kind for m in report.checkpoints[0].modules}.isdisjoint({"embed_tokens", "lm_head"})


def test_tied_weights_are_counted_once(tiny_model, tmp_path):
    for name, seed in (("base", 0), ("tuned", 1)):
        tiny_model(tied=True, seed=seed).save_pretrained(tmp_path / name)
    modules = inspect_run(tmp_path / "tuned", tmp_path / "base", rank=False).checkpoints[0].modules
    assert [m.path for m in modules if m.layer is None] == ["model.embed_tokens"]


def test_movers(make):
    checkpoint = inspect_run(make("lora"), rank=False).checkpoints[-1]
    movers = largest_movers(checkpoint, 3)
    assert [m.size for m in movers] == sorted((m.size for m in checkpoint.modules), reverse=True)[:3]


def test_figures_need_layers(make, tmp_path):
    report = inspect_run(make("lora", steps=(3,), targets=("lm_head",)))
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw_run_figures([report], tmp_path)


def test_correlation():
    layers = [[(0.1, 1.0), (0.2, 2.0), (0.3, 2.5)], [(0.2, 3.0), (0.4, 2.0), (math.nan, 1.0), (0.5, 1.0)]]
    found = correlate("q_proj", layers)
    pooled = [pair for pair in (*layers[0], *layers[1]) if pair[0] == pair[0]]
    assert found.points == 6
    assert found.pearson == pytest.approx(statistics.correlation(*zip(*pooled, strict=True)))
    assert [round(r or 0, 2) for r in found.by_checkpoint] == [0.98, -0.98]
    assert correlate("q", [[(1.0, 1.0), (2.0, 8.0), (3.0, 27.0), (4.0, 900.0)]]).spearman == pytest.approx(1)
    # 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    assert correlate("q", [[(1.0, 1.0), (2.0, 2.0), (2.0, 3.0), (3.0, 4.0)]]).spearman == pytest.approx(
        0.9487, abs=1e-4
    )
    for nothing in ([], [[]], [[(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]], [[(1.0, 2.0), (2.0, 3.0)]]):
        found = correlate("q", nothing)
        assert found.pearson is None
        assert found.spearman is None
    assert interval(0.5, 28) == pytest.approx((0.1559, 0.7370), abs=2e-3)
