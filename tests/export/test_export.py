"""An adapter in other programs' forms."""

import json
import shutil
import sys
import time

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dying
from dying import died
from exports import adapter_folder
from theodora import load_adapter, save_adapter
from theodora.cli.main import main
from theodora.errors import CheckpointError, ConfigError, TheodoraError, UsageError
from theodora.export import VerificationFailed, export_adapter, verify
from theodora.export.served import load_served, read_served
from theodora.files.adapter import read_adapter
from theodora.functional import dora_norm
from tiny import VOCAB_SIZE, tiny_model

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(3))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture
def base(tiny_model_dir):
    return tiny_model_dir()


@pytest.fixture
def adapter(tmp_path, base):
    return adapter_folder(tmp_path / "adapter", base)


@pytest.fixture
def expected(base, adapter):
    return logits(load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter))


def test_a_merged_folder(adapter, expected, tmp_path):
    report = export_adapter(adapter, tmp_path / "out", "hf")
    assert report.verification is not None
    assert report.verification.passed
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, atol=1e-4, rtol=0
    )
    assert (tmp_path / "out" / "README.md").read_text().startswith("---")
    assert "# out" in (tmp_path / "out" / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "out"}


def test_a_peft_folder(adapter, base, expected, tmp_path):
    export_adapter(adapter, tmp_path / "out", "peft")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    torch.testing.assert_close(logits(theirs), expected, atol=1e-5, rtol=0)


def test_an_export_that_differs_is_not_kept(adapter, tmp_path):
    with pytest.raises(VerificationFailed) as failure:
        export_adapter(adapter, tmp_path / "out", "hf", dtype="bf16", bound=1e-6)
    assert not failure.value.verification.passed
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    assert export_adapter(adapter, tmp_path / "out", "hf", dtype="bf16").bytes > 0


def test_what_stands_there_is_safe(adapter, tmp_path):
    with pytest.raises(UsageError, match="contains, the adapter"):
        export_adapter(adapter, adapter, "hf", overwrite=True)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="already exists"):
        export_adapter(adapter, precious, "hf")
    with pytest.raises(UsageError, match="no earlier export"):
        export_adapter(adapter, precious, "hf", overwrite=True)
    assert (precious / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("form", ["hf", "peft", "served"])
def test_an_earlier_export_may_be_replaced(form, adapter, tmp_path):
    for other in (form, "peft"):
        export_adapter(adapter, tmp_path / "out", other, overwrite=True, check=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "theodora_files.json",
    ]


def test_neither_the_base_nor_the_adapter_is_overwritten(adapter, base, tmp_path):
    for form in ("hf", "peft", "mlx", "served"):
        for whole in (base, adapter):
            before = {path: path.read_bytes() for path in whole.iterdir()}
            (tmp_path / "link").symlink_to(whole)
            for output in (whole, whole.parent, tmp_path / "link"):
                with pytest.raises(UsageError, match=r"is, or contains, the (base model|adapter)"):
                    export_adapter(adapter, output, form, base_model=str(base), overwrite=True, check=False)
            (tmp_path / "link").unlink()
            assert {path: path.read_bytes() for path in whole.iterdir()} == before


def test_what_only_looks_like_an_export_is_no_export(adapter, tmp_path, tiny_model_dir):
    """Another model, a training run, an adapter: they have an export's names."""
    model = tiny_model_dir("llama", seed=7)
    run = adapter_folder(tmp_path / "run", model)
    other = adapter_folder(tmp_path / "other", model)
    (run / "checkpoints").mkdir()
    (run / "metrics.jsonl").write_text("{}")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text("{}")
    (tmp_path / "project" / "theodora_files.json").write_text("[]")
    for folder in (model, run, other, tmp_path / "project"):
        before = sorted(folder.rglob("*"))
        with pytest.raises(
            UsageError, match=r"no earlier export \(it has no theodora_files\.json that lists its files"
        ):
            export_adapter(adapter, folder, "peft", overwrite=True, check=False)
        assert sorted(folder.rglob("*")) == before


def test_an_export_that_became_something_else_is_kept(adapter, base, tmp_path):
    def again(name):
        return export_adapter(adapter, tmp_path / name, "peft", overwrite=True, check=False)

    for name in ("added", "linked", "changed"):
        again(name)
    (tmp_path / "added" / "notes").mkdir()
    (tmp_path / "added" / "notes" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match=r"it also holds 'notes/thesis\.txt'"):
        again("added")
    (tmp_path / "linked" / "base").symlink_to(base)
    with pytest.raises(UsageError, match="it also holds 'base'"):
        again("linked")
    time.sleep(0.05)
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "changed")
    save_adapter(model, tmp_path / "changed")
    with pytest.raises(UsageError, match=r"'adapter_config\.json' was written to since"):
        again("changed")
    assert (tmp_path / "added" / "notes" / "thesis.txt").read_text() == "x"


def test_a_place_that_is_none_is_refused(adapter, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    export_adapter(adapter, tmp_path / "peft", "peft", check=False)
    export_adapter(adapter, tmp_path / "m.gguf", "gguf", check=False)
    for name, form, says in (
        ("file", "peft", "file is a file, and the form peft is a folder"),
        ("m.gguf", "hf", r"m\.gguf is a file, and the form hf is a folder"),
        ("file/in/out", "gguf", r"cannot be written: \S+file is a file; expected a folder"),
        ("folder", "gguf", r"folder is a folder, and the form gguf is one file: name it, as in \S+folder/m\.gguf"),
        ("peft", "gguf-lora", "peft is a folder, and the form gguf-lora is one file"),
        ("link", "peft", r"link is a link to \S+nowhere, where there is nothing\. Remove the link"),
    ):
        with pytest.raises(UsageError, match=says):
            export_adapter(adapter, tmp_path / name, form, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "x"


def test_an_export_can_be_read_by_whom_the_umask_lets(adapter, tmp_path):
    for form in ("hf", "served"):
        export_adapter(adapter, tmp_path / form, form, check=False)
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / form).iterdir()}
        assert len(set(modes.values())) == 1, modes


def test_the_command(adapter, tmp_path, capsys):
    command = ["export", str(adapter), "--output", str(tmp_path / "out"), "--to"]
    assert main([*command, "hf", "--dtype", "bf16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verification"]["passed"]
    assert main([*command, "hf"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "hf", "--overwrite"]) == 0
    assert "agree" in capsys.readouterr().out
    assert main([*command, "hf", "--overwrite", "--dtype", "bf16", "--bound", "1e-7"]) == 1
    assert "not kept" in capsys.readouterr().err
    assert main([*command, "onnx"]) == 2


def test_an_mlx_folder_and_back(adapter, base, expected, tmp_path):
    report = export_adapter(adapter, tmp_path / "mlx", "mlx")
    assert report.verification.passed
    assert (tmp_path / "mlx" / "adapters.safetensors").is_file()
    export_adapter(tmp_path / "mlx", tmp_path / "peft", "peft", base_model=str(base))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft")
    torch.testing.assert_close(logits(theirs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_the_served_form_is_never_taken_for_an_adapter(method, base, tmp_path):
    adapter = adapter_folder(tmp_path / "a", base, method=method, rslora=True, rank_pattern={"q_proj": 2})
    report = export_adapter(adapter, tmp_path / "served", "served")
    assert report.verification.passed
    assert report.verification.kinds == ("adapter", "served")
    with pytest.raises(CheckpointError, match="served_adapter"):
        load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "served")
    with pytest.raises(ValueError, match="adapter_config"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "served")
    fields, tensors = read_served(tmp_path / "served")
    assert fields["method"] == method
    scales = [key for key in tensors if key.endswith("dora_scale")]
    assert bool(scales) == (method == "dora")
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter)
    for key in scales:
        layer = model.get_submodule(key.removesuffix(".dora_scale"))
        own = layer.adapters["default"]
        norm = dora_norm(layer.base_weight.dense().double(), *(t.double() for t in own.factors()), own.scale)
        torch.testing.assert_close(tensors[key].double(), own.magnitude.double() / norm, atol=1e-6, rtol=1e-6)


def test_a_damaged_served_form_is_said(adapter, tmp_path):
    export_adapter(adapter, tmp_path / "served", "served")
    config = tmp_path / "served" / "served_adapter.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"method": "lora"}))
    with pytest.raises(CheckpointError, match="disagree"):
        verify(str(adapter), str(tmp_path / "served"))
    config.write_text(json.dumps(fields | {"form": "another"}))
    with pytest.raises(CheckpointError, match=r"theodora\.served\.v1"):
        verify(str(adapter), str(tmp_path / "served"))


def test_a_plain_lora_of_a_dora(adapter, base, tmp_path):
    """At full rank it is the adapter; at a low one the loss is told before anything is written."""
    told = []
    export_adapter(adapter, tmp_path / "full", "peft", lora_rank=48, approximated=told.append)
    assert told[0].fit.worst < 1e-5
    assert told[0].verification.difference.kl_mean < 1e-9
    assert read_adapter(tmp_path / "full").config.method == "lora"
    with pytest.raises(VerificationFailed, match="Nothing was written"):
        export_adapter(adapter, tmp_path / "one", "peft", lora_rank=1, max_loss=0.05, approximated=told.append)
    assert not (tmp_path / "one").exists()
    assert told[1].fit.worst > 0.1
    report = export_adapter(adapter, tmp_path / "l.gguf", "gguf-lora", lora_rank=16, max_loss=10)
    assert report.verification.passed


def test_the_loss_is_printed_layer_by_layer(adapter, tmp_path, capsys):
    command = ["export", str(adapter), "--to", "peft", "--lora-rank", "8", "--max-loss", "9"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "error by layer" in printed
    assert "q_proj" in printed
    assert main(["export", str(adapter), "--to", "hf", "--lora-rank", "8", "--output", str(tmp_path / "m")]) == 2
    assert "needs no --lora-rank" in capsys.readouterr().err


def test_what_the_served_form_cannot_hold_is_refused(base, tmp_path):
    whole = adapter_folder(tmp_path / "whole", base, targets=("q_proj",), modules_to_save=("lm_head",))
    with pytest.raises(UsageError, match=r"holds linear layers only; merge instead:\n  - lm_head\.weight: trained in"):
        export_adapter(whole, tmp_path / "served", "served")
    rows = adapter_folder(tmp_path / "rows", base, targets=("embed_tokens", "q_proj"))
    with pytest.raises(UsageError, match=r"model\.embed_tokens: an embedding"):
        export_adapter(rows, tmp_path / "served", "served")
    assert not (tmp_path / "served").exists()


def test_a_served_form_on_another_model_is_refused(adapter, tmp_path, tiny_model):
    export_adapter(adapter, tmp_path / "served", "served", check=False)
    with pytest.raises(CheckpointError, match="no such module in this model"):
        load_served(tiny_model("gpt2"), tmp_path / "served")
    with pytest.raises(CheckpointError, match=r"down_proj: made for \(32, 48\), here it is \(32, 64\)"):
        load_served(tiny_model(intermediate_size=64), tmp_path / "served")
    (tmp_path / "served" / "served_adapter.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no whole adapter in served form"):
        load_served(tiny_model(), tmp_path / "served")


@pytest.mark.parametrize(
    ("form", "options", "says"),
    [
        ("peft", {"dtype": "fp16"}, "keeps the adapter's own dtype"),
        ("hf", {"dtype": "q8_0"}, r"the form hf has one of bf16, fp16, fp32 \(q8_0 is of the form gguf\)"),
        ("hf", {"llama_cpp": "llama.cpp"}, "--llama-cpp is for the form gguf"),
        ("onnx", {}, "form is 'onnx'; expected one of hf, "),
    ],
)
def test_options_of_another_form(form, options, says, adapter, tmp_path):
    with pytest.raises((ConfigError, UsageError), match=says):
        export_adapter(adapter, tmp_path / "out", form, **options)


def test_the_base_that_was_given_is_named(adapter, base, tmp_path, monkeypatch):
    """From the root, so that it is found from another directory; and without the commit of the one before."""
    fields = json.loads((adapter / "adapter_config.json").read_text())
    fields |= {"base_model_name_or_path": "nobody/nothing", "revision": "0123abc"}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    monkeypatch.chdir(base.parent)
    for form, file, key in (
        ("peft", "adapter_config.json", "base_model_name_or_path"),
        ("mlx", "adapter_config.json", "model"),
        ("served", "served_adapter.json", "base_model"),
    ):
        export_adapter(adapter, tmp_path / form, form, base_model=base.name)
        written = json.loads((tmp_path / form / file).read_text())
        assert written[key] == str(base)
        assert written.get("revision") is None
    export_adapter(tmp_path / "mlx", tmp_path / "back", "peft", base_model=base.name)
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    export_adapter(adapter, tmp_path / "hub", "peft", base_model="someone/model", check=False)
    assert read_adapter(tmp_path / "hub").base_model == "someone/model"


def nothing_long(monkeypatch):
    """Fail the test if a merge or an SVD begins."""
    for name in ("merge_checkpoint", "folder_to_lora"):
        monkeypatch.setattr(f"theodora.export.exporting.{name}", lambda *_, **__: pytest.fail("long work began"))


@pytest.mark.parametrize(
    ("form", "config", "says"),
    [
        ("served", {"targets": ("q_proj",), "modules_to_save": ("lm_head",)}, r"lm_head\.weight: trained in full"),
        ("served", {"targets": ("embed_tokens", "q_proj")}, "an embedding"),
        ("gguf-lora", {"targets": ("q_proj",), "modules_to_save": ("lm_head",)}, r"lm_head\.weight: trained in full"),
        ("gguf-lora", {"targets": ("embed_tokens", "q_proj"), "method": "lora"}, "an embedding"),
    ],
)
def test_what_a_plain_lora_cannot_mend_is_refused_before_it_is_made(form, config, says, base, tmp_path, monkeypatch):
    nothing_long(monkeypatch)
    adapter = adapter_folder(tmp_path / "a", base, **config)
    with pytest.raises((UsageError, CheckpointError), match=says):
        export_adapter(adapter, tmp_path / "out", form, lora_rank=2)


def test_what_a_gguf_file_cannot_hold_is_refused_before_the_merge(tmp_path, tiny_model_dir, monkeypatch):
    nothing_long(monkeypatch)

    base = tiny_model_dir()
    adapter = adapter_folder(tmp_path / "a", base)

    def refused(says, folder, **options):
        with pytest.raises((UsageError, CheckpointError), match=says) as caught:
            export_adapter(adapter, tmp_path / "m.gguf", "gguf", base_model=str(folder), **options)
        assert ".m.gguf" not in str(caught.value)
        assert {path.name for path in tmp_path.glob(".m*")} == set()

    refused("is 'q4_0'; expected one of fp32", base, dtype="q4_0")
    refused("holds no convert_hf_to_gguf", base, llama_cpp=tmp_path / "nowhere")
    refused("GGUF files of gpt_neox models are not written", tiny_model_dir("gpt_neox"))
    scaled = tmp_path / "scaled"
    tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 4.0}).save_pretrained(scaled)
    refused("by 'dynamic', which is not written", scaled)
    tokenizer = base / "tokenizer.json"
    fields = json.loads(tokenizer.read_text())
    fields["pre_tokenizer"] = {"type": "Whitespace"}
    fields["model"]["merges"] = [["a", "b"]]
    own = tmp_path / "own"
    shutil.copytree(base, own)
    (own / "tokenizer.json").write_text(json.dumps(fields))
    refused(rf"{own}/tokenizer\.json cuts text in a way \(Whitespace\) unknown here", own)
    (tmp_path / "a" / "tokenizer.json").write_text("{")
    (tmp_path / "a" / "tokenizer_config.json").write_text("{}")
    refused(rf"{tmp_path}/a/tokenizer\.json cannot be read", base)
    module = sys.modules["theodora.export.gguf_files"]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    refused(r"pip install 'theodora\[demo\]'", base)


def test_errors_do_not_speak_of_hidden_places(adapter, tmp_path, monkeypatch):
    module = sys.modules["theodora.export.exporting"]

    def fail(place, *_given, **_options):
        raise CheckpointError(f"{place} is broken")

    monkeypatch.setattr(module, "write_gguf", fail)
    with pytest.raises(CheckpointError, match=r"^the model merged for \S+/m\.gguf is broken$"):
        export_adapter(adapter, tmp_path / "m.gguf", "gguf")
    monkeypatch.setattr(module, "verify", lambda _a, b, **_: fail(b))
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/out is broken$"):
        export_adapter(adapter, tmp_path / "out", "peft")
    monkeypatch.setattr(module, "merge_checkpoint", lambda _a, output, **_: fail(output))
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/out is broken$"):
        export_adapter(adapter, tmp_path / "out", "hf")


def test_what_a_killed_export_leaves_goes_with_the_next(adapter, tmp_path):
    """The model merged for a GGUF file is as large as the base in float32."""
    output = tmp_path / "m.gguf"
    assert died(dying.export, adapter, output)
    left = [path.name for path in tmp_path.glob(".m.gguf.*")]
    assert len(left) == 2
    export_adapter(adapter, output, "gguf", check=False)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "m.gguf"}


@pytest.mark.parametrize("form", ["served", "gguf-lora"])
@pytest.mark.parametrize("rows", [VOCAB_SIZE, VOCAB_SIZE + 8], ids=["other values", "new tokens"])
def test_a_base_weight_that_the_adapter_brings_is_not_left_out(form, rows, base, tmp_path):
    """The probe text has no new tokens: the comparison would pass."""
    adapter = adapter_folder(tmp_path / "adapter", base, method="lora")
    tensors = load_file(adapter / "adapter_model.safetensors")
    own = load_file(base / "model.safetensors")["lm_head.weight"]
    tensors["base_model.model.lm_head.weight"] = own
    save_file(tensors, adapter / "adapter_model.safetensors")
    export_adapter(adapter, tmp_path / "same", form)
    tensors["base_model.model.lm_head.weight"] = torch.ones(rows, 32)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(TheodoraError, match=r"lm_head\.weight: a base weight that the adapter changes"):
        export_adapter(adapter, tmp_path / "other", form)
    assert not (tmp_path / "other").exists()
