"""Adapters of quantised bases merged three ways, held against the formula in float64 and the logits of the training."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

import tiny
from quantised import ERRORS, FORMATS, logits_of, save_adapted, save_plain, save_quantised
from theodora.adapters.models import load_model_and_tokenizer
from theodora.adapters.state import adapter_layers
from theodora.errors import CheckpointError, ConfigError, UsageError
from theodora.export import export_adapter, verify
from theodora.files.adapter import read_adapter
from theodora.files.base_model import BaseCheckpoint
from theodora.functional import merged_weight
from theodora.merging import merge_checkpoint
from theodora.merging import onto as ways
from theodora.merging.logits import merged_values, stored_values, streamed_logits
from theodora.merging.onto import find_start, original_of, quantisation_config
from theodora.merging.plan import plan_merge

CASES = [*(("llama", form, "dora") for form in FORMATS), ("gpt2", "nf4", "dora"), ("gpt2", "int8", "lora")]
CASES += [("llama", "nf4", "lora"), ("llama", "torchao int8", "lora")]


@pytest.fixture
def make(tmp_path):
    """A plain model, the same quantised, and an adapter that was trained on the latter."""

    def make(family: str = "llama", form: str = "nf4", *, size: float = 0.15, **config: Any) -> SimpleNamespace:
        plain = save_plain(tmp_path / "plain", family)
        base = save_quantised(plain, tmp_path / "quantised", form)
        logits = save_adapted(base, tmp_path / "adapter", size=size, **config)
        return SimpleNamespace(
            plain=plain, base=base, adapter=tmp_path / "adapter", output=tmp_path / "merged", logits=logits
        )

    return make


@pytest.fixture
def on_load(tmp_path):
    """A plain model, and an adapter that was trained on it quantised as it was loaded."""

    def on_load(quantize: str, *, size: float = 0.15, **config: Any) -> SimpleNamespace:
        plain = save_plain(tmp_path / "plain")
        logits = save_adapted(plain, tmp_path / "adapter", quantize=quantize, size=size, **config)
        return SimpleNamespace(plain=plain, adapter=tmp_path / "adapter", output=tmp_path / "merged", logits=logits)

    return on_load


def formula(folder: BaseCheckpoint, adapter: Path) -> dict[str, torch.Tensor]:
    """W' of each adapted module in float64, in the layout of the files, written once more."""
    result = {}
    for path, tensors in read_adapter(adapter).modules.items():
        key = folder.keys[f"{path}.weight"]
        turned = folder.is_transposed(f"{path}.weight")
        w = folder.read(key).double()
        m = None if tensors.magnitude is None else tensors.magnitude.double()
        merged = merged_weight(w.T if turned else w, tensors.a.double(), tensors.b.double(), tensors.scale, m)
        result[key] = merged.T if turned else merged
    return result


def relative(written: torch.Tensor, exact: torch.Tensor) -> float:
    return float((written.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("family", "form", "method"), CASES)
def test_onto_the_dequantised_weights_is_what_was_trained(make, family, form, method):
    case = make(family, form, method=method, rank_pattern={"c_fc" if family == "gpt2" else "down_proj": 6})
    report = merge_checkpoint(case.adapter, case.output, onto="dequantised")
    assert "quantization_config" not in json.loads((case.output / "config.json").read_text())
    written = BaseCheckpoint(case.output)
    for key, exact in formula(BaseCheckpoint(case.base, dequantise=True), case.adapter).items():
        assert written.tensors[key].dtype == "F32"
        assert relative(written.read(key), exact) < 1e-7, key
    # bitsandbytes' int8 rounds the inputs of its products, too, which no merged weight does.
    size, allowed = case.logits.abs().max(), 0.1 if form == "int8" else 1e-5
    assert (logits_of(case.output) - case.logits).abs().max() < allowed * size
    assert report.layers[0].error < 1e-6
    assert report.logits is not None
    assert report.logits.kl_mean < 1e-9
    assert not report.notes
    assert verify(str(case.adapter), str(case.output)).passed


def test_a_small_effect_on_int8_is_told_from_the_rounding_of_inputs(make):
    case = make(form="int8", method="dora", size=0.005)
    merge_checkpoint(case.adapter, case.output, onto="dequantised")
    found = verify(str(case.adapter), str(case.output))
    assert found.passed
    # What LLM.int8 makes of x is as large as half the effect; without it the two are the same.
    assert found.difference.kl_mean > 0.2 * found.effect.kl_mean
    assert found.unrounded[0].kl_mean < 0.01 * found.unrounded[1].kl_mean
    assert verify(str(case.adapter), str(case.base)).lost


@pytest.mark.parametrize(("family", "form", "method"), CASES)
def test_back_into_the_quantised_format(make, family, form, method):
    case = make(family, form, method=method)
    report = merge_checkpoint(case.adapter, case.output, onto="quantised")
    base, written = BaseCheckpoint(case.base, dequantise=True), BaseCheckpoint(case.output, dequantise=True)
    assert base.quantised is not None
    assert written.quantised is not None
    assert set(written.stored) == set(base.stored)
    assert written.quantised.config == base.quantised.config
    exact = formula(base, case.adapter)
    errors = {key: relative(written.read(key), value) for key, value in exact.items()}
    # As large as rounding to the format is, and no larger: a magnitude left out makes a third.
    assert 0 < max(errors.values()) < ERRORS[form]
    by_path = {base.quantised.parameters[key].removesuffix(".weight"): error for key, error in errors.items()}
    assert {layer.path: layer.error for layer in report.layers} == pytest.approx(by_path)
    assert [layer.error for layer in report.layers] == sorted((layer.error for layer in report.layers), reverse=True)
    for key in base.stored.keys() - {base.quantised.part_key(k, p) for k in exact for p in base.quantised.parts[k]}:
        assert torch.equal(base.read_stored(key), written.read_stored(key)), key
    assert report.logits is not None
    assert 0 < report.logits.loss < 0.5
    # transformers loads it, with the weights that were measured.
    effective = streamed_logits(written, stored_values(written), torch.arange(3, 15)[None])
    loaded = _loaded(case.output)(torch.arange(3, 15)[None]).logits
    size = effective.abs().max()
    assert (loaded - effective).abs().max() < (0.1 if form == "int8" else 1e-5) * size


def _loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("form", ["nf4", "torchao int8"])
def test_onto_the_original_weights(make, form, method):
    case = make(form=form, method=method)
    report = merge_checkpoint(case.adapter, case.output)
    assert report.onto == "original"
    written, plain = BaseCheckpoint(case.output), BaseCheckpoint(case.plain)
    for key, exact in formula(plain, case.adapter).items():
        assert relative(written.read(key), exact) < 1e-7
    trained = formula(BaseCheckpoint(case.base, dequantise=True), case.adapter)
    errors = {key.removesuffix(".weight"): relative(written.read(key), exact) for key, exact in trained.items()}
    assert {layer.path: layer.error for layer in report.layers} == pytest.approx(errors)
    assert 0 < max(errors.values()) < ERRORS[form]
    # DoRA's rows have the norms that were trained whatever they are merged onto; LoRA's have those of the base.
    norms = [layer.norms for layer in report.layers]
    assert max(norms) < 1e-6 if method == "dora" else min(norms) > 1e-5
    assert any("trained on weights in" in note for note in report.notes)
    assert any(str(case.plain) in note for note in report.notes)
    assert verify(str(case.adapter), str(case.output)).passed


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_a_base_that_was_quantised_as_it_was_loaded(on_load, kind):
    case = on_load(kind)
    folder = BaseCheckpoint(case.plain, quantised_as=quantisation_config(kind, torch.float32))
    exact = formula(folder, case.adapter)
    merge_checkpoint(case.adapter, case.output, onto="dequantised")
    written = BaseCheckpoint(case.output)
    assert max(relative(written.read(key), value) for key, value in exact.items()) < 1e-7
    if kind == "nf4":
        assert (logits_of(case.output) - case.logits).abs().max() < 1e-5 * case.logits.abs().max()
    assert verify(str(case.adapter), str(case.output)).passed
    report = merge_checkpoint(case.adapter, case.output.with_name("original"))
    assert report.quantisation is not None
    assert 1e-3 < report.layers[0].error < 0.1
    assert verify(str(case.adapter), str(case.output.with_name("original"))).passed


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_a_base_whose_weights_were_rounded_before_they_were_quantised(on_load, kind):
    case = on_load(kind, dtype="bfloat16")
    assert read_adapter(case.adapter).trained_on.dtype == "bfloat16"
    model, _ = load_model_and_tokenizer(case.adapter, device="cpu")
    merge_checkpoint(case.adapter, case.output, onto="dequantised")
    written = BaseCheckpoint(case.output)
    for path, layer in adapter_layers(model).items():
        factors = layer.adapters["default"]
        exact = merged_weight(
            layer.base_weight.dense().double(),
            *(f.double() for f in factors.factors()),
            factors.scale,
            factors.magnitude,
        )
        # LLM.int8() rounds each number to the dtype of x once more, which a merge leaves out.
        assert relative(written.read(f"{path}.weight"), exact) < (3e-3 if kind == "int8" else 1e-6)
    assert verify(str(case.adapter), str(case.output)).passed
    merge_checkpoint(case.adapter, case.output.with_name("original"))
    assert verify(str(case.adapter), str(case.output.with_name("original"))).passed


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_such_a_base_is_written_quantised_as_transformers_would_have(on_load, kind, tmp_path):
    case = on_load(kind)
    save_quantised(case.plain, tmp_path / "quantised", kind)
    report = merge_checkpoint(case.adapter, case.output, onto="quantised", max_shard_size="40KB")
    assert report.files > 2
    written, made = (
        BaseCheckpoint(case.output, dequantise=True),
        BaseCheckpoint(tmp_path / "quantised", dequantise=True),
    )
    assert {key: (t.shape, t.dtype) for key, t in written.stored.items() if "quant_state" not in key} == {
        key: (t.shape, t.dtype) for key, t in made.stored.items() if "quant_state" not in key
    }
    assert logits_of(case.output).isfinite().all()


def test_shards_of_torchao_describe_their_tensors(make):
    case = make(form="torchao int8")
    report = merge_checkpoint(case.adapter, case.output, onto="quantised", max_shard_size="40KB")
    assert report.files > 2
    files = sorted(case.output.glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{report.files:05d}.safetensors"
    with safe_open(files[-1], framework="pt") as last, safe_open(case.base / "model.safetensors", "pt") as base:
        said, before = last.metadata(), base.metadata()
    assert set(json.loads(said["tensor_names"])) == set(json.loads(before["tensor_names"]))
    index = json.loads((case.output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(BaseCheckpoint(case.output, dequantise=True).stored)
    one = case.output.with_name("one")
    merge_checkpoint(case.adapter, one, onto="quantised")
    assert torch.equal(logits_of(one), logits_of(case.output))


def test_what_is_trained_in_full_is_in_the_merged_model(make):
    case = make(modules_to_save=["lm_head"])
    for onto in ("dequantised", "quantised"):
        output = case.output.with_name(f"onto-{onto}")
        merge_checkpoint(case.adapter, output, onto=onto)
        head = read_adapter(case.adapter).full["lm_head.weight"]
        assert torch.equal(BaseCheckpoint(output, dequantise=True).read("lm_head.weight"), head)
    merged = logits_of(case.output.with_name("onto-dequantised"))
    assert (merged - case.logits).abs().max() < 1e-5 * case.logits.abs().max()


def test_a_small_change_is_rounded_away_by_four_bits_and_refused(make):
    case = make(size=0.01)
    with pytest.raises(CheckpointError, match=r"as far from base and adapter.*--max-loss") as caught:
        merge_checkpoint(case.adapter, case.output, onto="quantised")
    assert not case.output.exists()
    assert "--onto dequantised" in str(caught.value)
    report = merge_checkpoint(case.adapter, case.output, onto="quantised", max_loss=2)
    assert report.logits is not None
    assert 0.5 < report.logits.loss < 2
    assert max(layer.lost for layer in report.layers) == pytest.approx(1, abs=0.1)
    unmeasured = merge_checkpoint(case.adapter, case.output, onto="quantised", check_logits=False, overwrite=True)
    assert unmeasured.logits is None


def test_a_layer_beyond_the_bound_is_refused_with_the_worst(make, tmp_path):
    case = make(form="int8")
    with pytest.raises(CheckpointError, match=r"14 of 14 merged weights.*0\.001 away.*--max-error") as caught:
        merge_checkpoint(case.adapter, case.output, onto="quantised", max_error=0.001)
    assert str(caught.value).count("(the adapter changes it by") == 8
    assert not list(tmp_path.glob("*merged*"))
    merge_checkpoint(case.adapter, case.output, onto="quantised", max_error=0.01)


def test_a_magnitude_that_is_left_out_is_beyond_every_bound(make, monkeypatch):
    from theodora.merging import requantised

    case = make(form="int8")
    pack = requantised.QuantisedStore.pack
    monkeypatch.setattr(
        requantised.QuantisedStore, "pack", lambda self, key, w, like=None: pack(self, key, 1.33 * w, like)
    )
    with pytest.raises(CheckpointError, match=r"more than 0\.05 away"):
        merge_checkpoint(case.adapter, case.output, onto="quantised")


def test_the_original_is_found_by_its_name(make, tmp_path):
    case = make()
    assert original_of(case.base) == str(case.plain)
    for front in ("base_model:\n- {}", 'base_model: "{}"', "base_model:\n  - {}\nlicense: mit"):
        (case.base / "README.md").write_text("---\n" + front.format("some/model") + "\n---\nbase_model: no/one\n")
        assert original_of(case.base) == "some/model"
    (case.base / "README.md").unlink()
    assert original_of(case.base) is None
    config = json.loads((case.base / "config.json").read_text()) | {"_name_or_path": str(case.plain)}
    (case.base / "config.json").write_text(json.dumps(config))
    assert original_of(case.base) == str(case.plain)
    merge_checkpoint(case.adapter, case.output)


WAYS = r"three ways: --onto original with --base-model.*--onto dequantised.*--onto quantised"


def test_without_the_original_at_hand_the_three_ways_are_named(make):
    case = make()
    shutil.rmtree(case.plain)
    with pytest.raises(CheckpointError, match=rf"made from .*plain.*not at hand.*{WAYS}"):
        merge_checkpoint(case.adapter, case.output)
    (case.base / "README.md").unlink()
    with pytest.raises(CheckpointError, match=f"does not say which model it was made from.*{WAYS}"):
        merge_checkpoint(case.adapter, case.output)
    with pytest.raises(CheckpointError, match=f"is quantised .bitsandbytes nf4., not the original.*{WAYS}"):
        merge_checkpoint(case.adapter, case.output, base_model=case.base)
    merge_checkpoint(case.adapter, case.output, onto="dequantized")


def test_an_original_that_is_quantised_itself(make):
    case = make()
    (case.base / "README.md").write_text(f"---\nbase_model: {case.base}\n---\n")
    with pytest.raises(CheckpointError, match="which is quantised, too"):
        merge_checkpoint(case.adapter, case.output)


def test_the_original_can_be_given(make, tmp_path):
    case = make()
    moved = shutil.move(case.plain, tmp_path / "moved")
    report = merge_checkpoint(case.adapter, case.output, base_model=moved)
    assert report.quantisation == "bitsandbytes nf4"
    assert report.layers[0].error > 0.01
    shutil.rmtree(case.base)
    report = merge_checkpoint(case.adapter, case.output, base_model=moved, overwrite=True)
    assert report.layers == ()


def test_where_the_weights_of_the_training_are_not_to_be_had_that_is_said(on_load, monkeypatch):
    case = on_load("nf4")
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    report = merge_checkpoint(case.adapter, case.output)
    assert report.layers == ()
    assert any("was not measured" in note and "pip install 'theodora[quant]'" in note for note in report.notes)
    with pytest.raises(CheckpointError, match=r"pip install 'theodora\[quant\]'"):
        merge_checkpoint(case.adapter, case.output.with_name("again"), onto="dequantised")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"onto": "both"}, "onto is 'both'; expected one of original, dequantised, quantised"),
        ({"onto": "dequantised", "quantize": "nf5"}, "quantize is 'nf5'"),
        ({"onto": "dequantised"}, r"is not quantised.*--quantize"),
        ({"onto": "quantised", "quantize": "fp8"}, "no folder stores"),
        ({"onto": "quantised", "quantize": "nf4", "dtype": "bf16"}, "dtype is given"),
        ({"onto": "quantised", "quantize": "nf4", "max_shard_size": "much"}, "5GB"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, message):
    plain = save_plain(tmp_path / "plain")
    save_adapted(plain, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=message):
        merge_checkpoint(tmp_path / "adapter", tmp_path / "merged", **options)
    assert not (tmp_path / "merged").exists()


def test_quantize_on_a_folder_that_is_quantised(make):
    case = make()
    with pytest.raises(ConfigError, match="quantised already"):
        merge_checkpoint(case.adapter, case.output, onto="dequantised", quantize="nf4")


def test_an_adapter_that_does_not_say_how_its_base_was_quantised(tmp_path, on_load):
    case = on_load("nf4")
    with_words = merge_checkpoint(case.adapter, case.output, onto="dequantised")
    file = case.adapter / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file(load_file(file), file, {"format": "pt"})
    with pytest.raises(ConfigError, match="--quantize"):
        merge_checkpoint(case.adapter, tmp_path / "again", onto="dequantised")
    again = merge_checkpoint(case.adapter, tmp_path / "again", onto="dequantised", quantize="nf4")
    assert again.quantisation == with_words.quantisation
    assert torch.equal(logits_of(tmp_path / "again"), logits_of(case.output))


def test_the_output_is_not_the_base_and_nothing_is_replaced(make):
    case = make()
    for output in (case.base, case.adapter, case.base.parent):
        for onto in ("original", "quantised"):
            with pytest.raises(UsageError, match="is, or contains, the"):
                merge_checkpoint(case.adapter, output, onto=onto, overwrite=True)
    case.output.mkdir()
    (case.output / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="already exists"):
        merge_checkpoint(case.adapter, case.output, onto="quantised")
    assert (case.output / "mine.txt").read_text() == "mine"


def test_nothing_is_left_of_a_merge_that_fails_on_the_way(make, monkeypatch, tmp_path):
    from theodora.merging import requantised

    case = make()
    before = {path.name for path in tmp_path.iterdir()}
    calls = []

    def fails(self, key, w, like=None):
        calls.append(key)
        if len(calls) == 3:
            raise CheckpointError("no kernel")
        return original(self, key, w, like)

    original = requantised.QuantisedStore.pack
    monkeypatch.setattr(requantised.QuantisedStore, "pack", fails)
    with pytest.raises(CheckpointError, match="no kernel"):
        merge_checkpoint(case.adapter, case.output, onto="quantised")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_exports_hold_the_original_weights(make, tmp_path):
    case = make()
    report = export_adapter(case.adapter, tmp_path / "exported", "hf")
    assert report.verification is not None
    assert report.verification.passed
    assert verify(str(case.adapter), str(tmp_path / "exported")).passed
    assert export_adapter(case.adapter, tmp_path / "peft", "peft").verification is not None
    fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(case.base)


def test_quantize_means_what_loading_by_it_means():
    from theodora.adapters import quantized

    for kind in ("nf4", "int8"):
        made = quantized._config_for(kind, torch.bfloat16, torch.bfloat16, torch.device("cpu"), None).to_dict()
        ours = quantisation_config(kind, torch.bfloat16)
        assert {name: str(getattr(made[name], "value", made[name])) for name in ours} == {
            name: str(value) for name, value in ours.items()
        }
    from torchao.quantization import Int4WeightOnlyConfig
    from transformers import TorchAoConfig

    int4 = TorchAoConfig(Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")).to_dict()
    assert quantisation_config("int4", torch.bfloat16)["quant_type"] == int4["quant_type"]
    assert ways.find_start is find_start


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_streamed_logits_are_the_models(tmp_path, family, tied):
    model = tiny.tiny_model(family, tied=tied)
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(3, 259, (3, 9), generator=torch.Generator().manual_seed(0))
    base = BaseCheckpoint(tmp_path / "model")
    with torch.no_grad():
        expected = model(ids).logits
    streamed = streamed_logits(base, stored_values(base), ids)
    assert (streamed - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_streamed_logits_of_the_formula(make):
    case = make(form="torchao float8")
    base = BaseCheckpoint(case.base, dequantise=True)
    plan = plan_merge(base, read_adapter(case.adapter), None)
    from quantised import tokens

    streamed = streamed_logits(base, merged_values(base, plan), tokens())
    assert (streamed - case.logits).abs().max() < 1e-5 * case.logits.abs().max()


def test_memory_holds_one_module_at_a_time(tmp_path):
    base = BaseCheckpoint(save_plain(tmp_path / "model"))
    held: list[int] = []
    plain = stored_values(base)
    model: Any = None

    def watched(name: str) -> torch.Tensor:
        held.append(sum(p.numel() for p in model.parameters() if not p.is_meta))
        return plain(name)

    twin = base.twin

    def remembered(dtype=None):
        nonlocal model
        model = twin(dtype)
        return model

    base.twin = remembered
    streamed_logits(base, watched, torch.arange(3, 9)[None])
    assert max(held) <= 64 * 128
    assert all(parameter.is_meta for parameter in model.parameters())
