"""GGUF files of models and of adapters, loaded back through transformers, whose reader is not ours.

Every family here was also compared with llama.cpp itself (docs/exporting.md).
"""

import sys

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from exports import adapter_folder
from theodora.errors import CheckpointError, ConfigError, UsageError
from theodora.export import VerificationFailed, export_adapter, verify
from theodora.export.gguf_lora import put_gguf_lora_on
from theodora.export.gguf_names import names_of
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def base(tiny_model_dir):
    return tiny_model_dir()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_model(family, tied, tmp_path, tiny_model_dir):
    adapter = adapter_folder(tmp_path / "adapter", tiny_model_dir(family, tied=tied))
    report = export_adapter(adapter, tmp_path / f"{family}.gguf", "gguf", dtype="fp32")
    assert report.verification is not None
    assert report.verification.difference.largest < 1e-4
    assert report.verification.effect.kl_mean > 1e-2
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", f"{family}.gguf"}


def test_gemma_is_written_though_transformers_cannot_read_it(tmp_path, tiny_model_dir):
    folder = tiny_model_dir("gemma", tied=True)
    report = export_adapter(adapter_folder(tmp_path / "a", folder), tmp_path / "g.gguf", "gguf", dtype="fp32")
    assert report.verification is None
    assert any("only the tensors were read back" in note for note in report.notes)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "g.gguf").tensors}
    norm = AutoModelForCausalLM.from_pretrained(folder).model.norm.weight
    torch.testing.assert_close(torch.from_numpy(found["output_norm.weight"].data.copy()), norm.detach() + 1)
    assert "output.weight" not in found


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "q8_0"])
def test_dtypes(dtype, base, tmp_path):
    adapter = adapter_folder(tmp_path / "adapter", base)
    report = export_adapter(adapter, tmp_path / "m.gguf", "gguf", dtype=dtype)
    assert report.verification.passed
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {"fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}[dtype] in types


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma", "phi3", "gpt2"])
def test_a_lora_with_scales_that_llama_cpp_does_not_know(family, tmp_path, tiny_model_dir):
    """rsLoRA, and a rank and an alpha of its own for one layer; the file says alpha = rank and B holds the rest."""
    folder = tiny_model_dir(family)
    name = {"gpt2": "c_attn", "phi3": "qkv_proj"}.get(family, "q_proj")
    adapter = adapter_folder(
        tmp_path / "adapter",
        folder,
        method="lora",
        rslora=True,
        rank=4,
        alpha=6,
        rank_pattern={f"0.*{name}": 3},
        alpha_pattern={f"1.*{name}": 11.0},
    )
    report = export_adapter(adapter, tmp_path / "l.gguf", "gguf-lora")
    assert report.verification.difference.largest < 1e-4
    assert report.verification.effect.kl_mean > 1e-2
    reader = gguf.GGUFReader(tmp_path / "l.gguf")
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.type").contents() == "lora"
    # By llama.cpp's arithmetic: alpha / rank · B·A, its rows in llama.cpp's order.
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    model = AutoModelForCausalLM.from_pretrained(folder)
    from theodora.files.adapter import read_adapter

    names = names_of(model.config)
    for path, own in read_adapter(adapter).modules.items():
        to = names.of(f"{path}.weight")
        a, b = tensors[f"{to}.lora_a"], tensors[f"{to}.lora_b"]
        expected = names.rows(to, own.scale * (own.b @ own.a))
        torch.testing.assert_close(alpha / a.shape[0] * (b @ a), expected, atol=1e-5, rtol=1e-5)


def test_q_and_k_are_woven_as_llama_cpp_wants_them(base):
    """Row 2i of a head is row i of its first half, row 2i + 1 is row i of its second half."""
    names = names_of(AutoModelForCausalLM.from_pretrained(base).config)
    rows = torch.arange(32)  # 4 heads of 8
    woven = names.rows("blk.0.attn_q.weight", rows)
    assert woven[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(names.rows_back("blk.0.attn_q.weight", woven), rows)
    assert torch.equal(names.rows("blk.0.attn_v.weight", rows), rows)


def test_llama_3s_scaling_of_positions_is_written(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 64, "rope_theta": 10000.0}
    folder = tmp_path / "base"
    tiny_model("llama", rope_parameters=scaling).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    report = export_adapter(adapter_folder(tmp_path / "a", folder), tmp_path / "m.gguf", "gguf", dtype="fp32")
    assert report.verification.difference.largest < 1e-4
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    inverse = tiny_model("llama", rope_parameters=scaling).model.rotary_emb.inv_freq
    plain = tiny_model("llama").model.rotary_emb.inv_freq
    torch.testing.assert_close(torch.from_numpy(found["rope_freqs.weight"].data.copy()), plain / inverse)


def exported(tmp_path, family="llama", **config):
    """The report of exporting a random adapter on a random model, and the file."""
    tiny_model(family, **config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    adapter = adapter_folder(tmp_path / "a", tmp_path / "base")
    return export_adapter(adapter, tmp_path / "m.gguf", "gguf", dtype="fp32"), tmp_path / "m.gguf"


def linear(factor=4.0):
    return {"rope_type": "linear", "rope_theta": 50000.0, "factor": factor}


@pytest.mark.parametrize(
    ("family", "config", "read"),
    [
        ("llama", {"rope_parameters": linear()}, "rope_parameters"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"head_dim": 12}, None),
        ("qwen3", {"head_dim": 8}, "head_dim"),
        ("phi3", {"partial_rotary_factor": 0.5}, "rope_parameters"),
        ("gpt2", {}, "n_inner, max_position_embeddings"),
    ],
    ids=str,
)
def test_what_transformers_leaves_out_of_a_header_is_read(family, config, read, tmp_path):
    report, file = exported(tmp_path, family, **config)
    assert report.verification.difference.largest < 1e-4
    assert report.verification.effect.kl_mean > 1e-2
    assert [note.partition("read here: ")[2] for note in report.verification.notes] == ([f"{read}."] if read else [])
    alone = verify(str(tmp_path / "base"), str(file), bound=100.0, kl_bound=100.0)
    assert alone.notes == report.verification.notes  # for which no base is needed


def test_a_header_without_the_size_of_a_head_is_read_as_llama_cpp_does(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.GGUFWriter, "add_key_length", lambda *_: None)
    assert exported(tmp_path, "qwen3", head_dim=8)[0].verification.difference.largest < 1e-4


def test_other_scalings_of_positions(tmp_path):
    fields = gguf.GGUFReader(exported(tmp_path, rope_parameters=linear())[1]).fields
    assert fields["llama.rope.scaling.type"].contents() == "linear"
    assert fields["llama.rope.scaling.factor"].contents() == 4.0
    with pytest.raises(CheckpointError, match=r"by 'dynamic', which is not written to GGUF here\. Export --to hf"):
        exported(tmp_path / "dynamic", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0})
    assert not (tmp_path / "dynamic" / "m.gguf").exists()


def test_a_header_that_says_something_else_than_the_base_is_no_export(tmp_path, monkeypatch):
    """The base's configuration does not stand in for what can be read."""
    add = gguf.GGUFWriter.add_rope_scaling_factor
    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_scaling_factor", lambda self, value: add(self, value / 2))
    with pytest.raises(VerificationFailed, match="differs from"):
        exported(tmp_path, rope_parameters=linear())


def test_the_base_stands_in_for_what_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.GGUFWriter, "add_feed_forward_length", lambda *_: None)
    report, file = exported(tmp_path / "size", "gpt2")
    assert report.verification.difference.largest < 1e-4
    assert "the base's configuration stood in" in report.verification.notes[0]
    with pytest.raises(CheckpointError, match="transformers does not load"):
        verify(str(tmp_path / "size" / "base"), str(file))
    monkeypatch.undo()
    add = gguf.GGUFWriter.add_rope_scaling_type
    yarn = gguf.RopeScalingType.YARN
    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_scaling_type", lambda self, _kind: add(self, yarn))
    report, file = exported(tmp_path / "scaling", rope_parameters=linear())
    says = "transformers leaves out this file's scaling of positions ('yarn')"
    assert report.verification.notes == (
        f"{says}, so the base's stood in: the weights were compared, the scaling was not.",
    )
    alone = verify(str(tmp_path / "scaling" / "base"), str(file), bound=100.0, kl_bound=100.0)
    assert alone.notes == (f"{says}; llama.cpp does not.",)


def test_without_the_package_it_is_named(base, tmp_path, monkeypatch):
    adapter = adapter_folder(tmp_path / "adapter", base)
    module = sys.modules["theodora.export.gguf_files"]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'theodora\[demo\]'"):
        export_adapter(adapter, tmp_path / "m.gguf", "gguf")


def test_a_tensor_that_llama_cpp_does_not_know_is_named(tmp_path, tiny_model_dir):
    adapter = adapter_folder(tmp_path / "a", tiny_model_dir("gemma"))  # whose head is its embeddings, elsewhere
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: no such tensor in llama\.cpp's gemma"):
        export_adapter(adapter, tmp_path / "m.gguf", "gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(("spoil", "says"), [("values", "other values than were written"), ("names", "missing")])
def test_a_file_that_reads_back_otherwise_is_not_kept(spoil, says, tmp_path, tiny_model_dir, monkeypatch):
    adapter = adapter_folder(tmp_path / "adapter", tiny_model_dir("gemma", tied=True))  # its tensors are read back
    module = sys.modules["theodora.export.gguf_model"]
    arrays = module._arrays

    def spoiled(*given):
        for name, array in arrays(*given):
            if "attn_k" not in name:
                yield name, array
            elif spoil == "values":
                yield name, array + 1

    monkeypatch.setattr(module, "_arrays", spoiled)
    with pytest.raises(CheckpointError, match=rf"does not read back right:\n  - blk\.0\.attn_k\.weight: {says}"):
        export_adapter(adapter, tmp_path / "m.gguf", "gguf", dtype="fp32")
    assert not (tmp_path / "m.gguf").exists()


def test_a_lora_of_another_model_is_refused(base, tmp_path, tiny_model_dir):
    adapter = adapter_folder(tmp_path / "a", base, method="lora")
    export_adapter(adapter, tmp_path / "l.gguf", "gguf-lora", check=False)
    with pytest.raises(CheckpointError, match="is a lora for llama"):
        put_gguf_lora_on(tiny_model("qwen2"), tmp_path / "l.gguf")
    model = adapter_folder(tmp_path / "b", base, method="lora")
    export_adapter(model, tmp_path / "m.gguf", "gguf", dtype="fp32", check=False)
    with pytest.raises(CheckpointError, match=r"file without adapter\.type for llama"):
        put_gguf_lora_on(tiny_model(), tmp_path / "m.gguf")
    small = tiny_model(num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"blk\.1\.\S+ has no place in this llama model"):
        put_gguf_lora_on(small, tmp_path / "l.gguf")


def test_what_has_no_place_is_refused(base, tmp_path, tiny_model_dir):
    dora = adapter_folder(tmp_path / "dora", base)
    with pytest.raises(UsageError, match="--lora-rank"):
        export_adapter(dora, tmp_path / "l.gguf", "gguf-lora")
    with pytest.raises(ConfigError, match="q8_0"):
        export_adapter(dora, tmp_path / "m.gguf", "gguf", dtype="q2_k")
    with pytest.raises(UsageError, match="convert_hf_to_gguf"):
        export_adapter(dora, tmp_path / "m.gguf", "gguf", llama_cpp=tmp_path)
    unknown = adapter_folder(tmp_path / "neox", tiny_model_dir("gpt_neox"))
    with pytest.raises(CheckpointError, match="known are llama"):
        export_adapter(unknown, tmp_path / "m.gguf", "gguf")
    tied = adapter_folder(tmp_path / "tied", tiny_model_dir(tied=True), method="lora", targets=("lm_head", "q_proj"))
    with pytest.raises(CheckpointError, match="shares its weight"):
        export_adapter(tied, tmp_path / "l.gguf", "gguf-lora")
    (tmp_path / "notes.gguf").write_text("mine")
    with pytest.raises(UsageError, match="no GGUF file"):
        export_adapter(dora, tmp_path / "notes.gguf", "gguf", overwrite=True)
    assert not (tmp_path / "m.gguf").exists()
    assert not (tmp_path / "l.gguf").exists()


def test_a_damaged_file_is_said(base, tmp_path):
    adapter = adapter_folder(tmp_path / "adapter", base)
    export_adapter(adapter, tmp_path / "m.gguf", "gguf", dtype="fp32", check=False)
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"damaged|does not load"):
        verify(str(adapter), str(tmp_path / "m.gguf"))


def test_llama_cpps_own_converter(base, tmp_path):
    """A stand-in for the script: what is called, with what, and that its failure is told."""
    checkout = tmp_path / "llama.cpp"
    checkout.mkdir()
    script = checkout / "convert_hf_to_gguf.py"
    adapter = adapter_folder(tmp_path / "adapter", base)
    export_adapter(adapter, checkout / "ready.gguf", "gguf", dtype="fp32", check=False)
    script.write_text(
        "import shutil, sys\nfrom pathlib import Path\n"
        "assert (Path(sys.argv[1]) / 'config.json').is_file()\n"
        "assert sys.argv[2] == '--outfile' and sys.argv[4:] == ['--outtype', 'f32']\n"
        "shutil.copyfile(Path(__file__).with_name('ready.gguf'), sys.argv[3])\n"
    )
    assert export_adapter(adapter, tmp_path / "m.gguf", "gguf", dtype="fp32", llama_cpp=checkout).verification.passed
    script.write_text("raise SystemExit('it does not know this model')")
    with pytest.raises(CheckpointError, match="does not know this model"):
        export_adapter(adapter, tmp_path / "n.gguf", "gguf", llama_cpp=checkout)
