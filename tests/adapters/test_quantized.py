"""Bases that are quantised as they are loaded, and folders that hold quantised ones."""

import json
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from theodora import AdapterConfig, CheckpointError, ConfigError, inject_adapter, load_adapter, save_adapter
from theodora.adapters import quantized
from theodora.adapters.models import base_note, best_device, load_model, load_model_and_tokenizer
from theodora.adapters.quantize import module_fingerprint
from theodora.adapters.quantized import count_parameters, left_plain, name_of, quantization_of, weight_bytes
from theodora.adapters.state import trained_tensors
from theodora.adapters.trainers import as_adapted
from theodora.files.adapter import read_adapter, read_trained_on
from theodora.files.fingerprint import weight_fingerprint
from theodora.files.trained_on import TrainedOn, trained_on
from theodora.kernels.library_weight import LibraryWeight
from theodora.layers import base_weight
from theodora.layers.libraries import prepare

pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")
IDS = torch.arange(3, 27).view(2, 12)
LAYER = {"nf4": {"quant_type": "nf4"}, "int8": {"has_fp16_weights": False}}
NAMES = {"nf4": "bitsandbytes nf4, double-quantised", "int8": "bitsandbytes int8"}


def load(folder, quantize=None, **options):
    return load_model(folder, quantize=quantize, device=CPU, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(params=NAMES)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tiny_model_dir, tiny_tokenizer, tmp_path):
    """A folder that holds quantised weights."""
    load(tiny_model_dir(), kind).save_pretrained(tmp_path / "quantised")
    tiny_tokenizer.save_pretrained(tmp_path / "quantised")
    return tmp_path / "quantised"


@pytest.fixture
def adapter(kind, tiny_model_dir, tmp_path):
    """An adapter of a base that was quantised as it was loaded, and the logits with it."""
    return saved_adapter(load(tiny_model_dir(), kind), tmp_path / "adapter")


def saved_adapter(model, folder, method="dora"):
    inject_adapter(model, AdapterConfig(rank=2, method=method)).eval()
    with torch.no_grad():
        for parameter in trained_tensors(model).values():
            parameter += 0.1 * torch.randn_like(parameter)
    save_adapter(model, folder)
    return folder, logits(model)


def test_all_linear_layers_but_the_head_are_quantised(kind, tiny_model_dir):
    plain, model = load(tiny_model_dir()), load(tiny_model_dir(), kind)
    stored = {path: m.weight.dtype for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    assert {path for path, dtype in stored.items() if dtype == torch.float32} == {"lm_head", "model.embed_tokens"}
    found = quantization_of(model)
    assert (found.name, found.kind) == (NAMES[kind], kind)
    assert str(found).endswith("MB in all")
    assert found.bytes == weight_bytes(model) < weight_bytes(plain)
    assert count_parameters(model) == plain.num_parameters() == count_parameters(plain)
    assert quantization_of(plain) is None


def test_bytes_are_those_of_packed_numbers_and_their_scales(tiny_model_dir):
    plain, model = load(tiny_model_dir()), load(tiny_model_dir(), "nf4")
    packed = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    weights = sum(m.in_features * m.out_features for m in packed)
    rest = sum(p.numel() * 4 for p in plain.parameters()) - 4 * weights
    blocks = sum(-(-m.in_features * m.out_features // 64) for m in packed)
    outer = sum(4 * -(-(m.in_features * m.out_features // 64) // 256) + 4 for m in packed)  # and one offset each
    buffers = sum(b.nbytes for b in plain.buffers())
    assert weight_bytes(model) == rest + weights // 2 + blocks + outer + buffers


def test_a_folder_of_quantised_weights_is_loaded_as_it_is(kind, folder, tiny_model_dir, tmp_path):
    model = load(folder)
    found = quantization_of(model)
    assert (found.name, found.kind) == (NAMES[kind], None)
    assert torch.equal(logits(model), logits(load(tiny_model_dir(), kind)))
    place, expected = saved_adapter(model, tmp_path / "adapter")
    assert read_trained_on(place) == TrainedOn(model=str(folder), quantization=NAMES[kind])
    again, _ = load_model_and_tokenizer(folder, adapter=place, device="cpu")
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=0)
    assert base_note(again) == f"The base is quantised as it was in training: {quantization_of(again)}."


def test_an_adapter_finds_its_base_quantised_as_it_was(kind, adapter, tiny_model_dir):
    place, expected = adapter
    assert read_trained_on(place).quantize == kind
    for options in ({"model": place}, {"model": tiny_model_dir(), "adapter": place}):
        model, _ = load_model_and_tokenizer(**options, device="cpu")
        assert quantization_of(model).kind == kind
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
        assert "--quantize none" in base_note(model)
    said = pytest.warns(UserWarning, match=rf"those were quantised \({NAMES[kind]}\), these are not\. The adapter may")
    with said if kind == "nf4" else nullcontext():
        model, _ = load_model_and_tokenizer(place, device="cpu", quantize="none")
    assert quantization_of(model) is None
    once = f"The adapter was trained on its base quantised as {NAMES[kind]}; here the base is not quantised."
    assert base_note(model) == (None if kind == "nf4" else once)


def test_the_base_is_quantised_of_weights_in_the_dtype_of_training(tiny_model_dir, tmp_path):
    trained = load(tiny_model_dir(), "nf4", dtype="bfloat16")
    place, expected = saved_adapter(trained, tmp_path / "adapter")
    assert read_trained_on(place).dtype == "bfloat16"
    model, _ = load_model_and_tokenizer(place, device="cpu")
    assert torch.equal(logits(model), expected)
    assert "as it was in training: " in base_note(model)
    other, _ = load_model_and_tokenizer(place, device="cpu", dtype="float32")
    path = "model.layers.0.mlp.up_proj"
    stored = [base_weight(m.get_submodule(path)).dense(torch.float32) for m in (trained, model, other)]
    assert torch.equal(stored[0], stored[1])
    assert not torch.allclose(stored[0], stored[2], atol=1e-3)
    assert "in training, but of weights in float32 instead of bfloat16: " in base_note(other)
    assert trained_on({"base": {"quantize": "nf4", "dtype": "int8"}}).dtype is None


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_an_adapter_remembers_its_base_while_it_is_on_another(kind, adapter, tiny_model_dir, tmp_path, method):
    place, _ = saved_adapter(load(tiny_model_dir(), kind), tmp_path / "first", method)
    first, plain = read_adapter(place), load(tiny_model_dir())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_adapter(plain, place)
    save_adapter(plain, tmp_path / "second")
    second = read_adapter(tmp_path / "second")
    assert (second.trained_on, second.fingerprint) == (first.trained_on, first.fingerprint)
    assert second.base_model == first.base_model
    with torch.no_grad():  # now it is trained here
        next(iter(trained_tensors(plain).values())).add_(1e-3)
    save_adapter(plain, tmp_path / "third")
    third = read_adapter(tmp_path / "third")
    assert third.trained_on.quantization is None
    assert third.fingerprint != first.fingerprint


def test_an_adapter_of_a_quantised_folder_goes_on_naming_it(folder, tiny_model_dir, tmp_path):
    place, _ = saved_adapter(load(folder), tmp_path / "first")
    plain = load(tiny_model_dir())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_adapter(plain, place)
    save_adapter(plain, tmp_path / "second")
    assert read_adapter(tmp_path / "second").base_model == str(folder)


def test_fingerprints_dequantise_a_few_rows(kind, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    layer = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}[kind](128, 96, bias=False, **LAYER[kind]).to("cpu")
    model = nn.Sequential(layer)
    prepare(model)
    whole = weight_fingerprint(base_weight(layer).dense())
    seen, form = [], type(base_weight(layer).format)
    rows = form.rows
    monkeypatch.setattr(LibraryWeight, "dense", None)
    monkeypatch.setattr(form, "dense", None)
    monkeypatch.setattr(
        form, "rows", lambda self, tensors, at, dtype: seen.append(len(at)) or rows(self, tensors, at, dtype)
    )
    assert module_fingerprint(layer) == whole
    assert seen == [16]


def test_layers_that_stay_plain_are_told(kind, tiny_model_dir):
    model = load(tiny_model_dir(), kind, keep=("down_proj",))
    assert left_plain(model, ("down_proj",)) is None
    assert left_plain(model) == "2 of 14 linear layers are not quantised (2 × down_proj; out × in: 32 × 48)"


def test_an_adapter_of_plain_weights_stays_on_plain_ones_unless_told(tiny_model_dir, tmp_path):
    place, _ = saved_adapter(load(tiny_model_dir()), tmp_path / "adapter")
    plain, _ = load_model_and_tokenizer(place, device="cpu")
    assert quantization_of(plain) is None
    assert base_note(plain) is None
    with pytest.warns(UserWarning, match="away from those"):
        model, _ = load_model_and_tokenizer(place, device="cpu", quantize="nf4")
    assert base_note(model).endswith("In training it was not quantised.")
    alone, _ = load_model_and_tokenizer(tiny_model_dir(), device="cpu", quantize="nf4")
    assert base_note(alone) == f"The model is quantised: {quantization_of(alone)}."


def test_float8_is_remembered_too(tiny_model_dir, tmp_path):
    place, expected = saved_adapter(load(tiny_model_dir(), "fp8"), tmp_path / "adapter")
    assert read_trained_on(place).quantize == "fp8"
    model, _ = load_model_and_tokenizer(place, device="cpu")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)


def test_peft_reads_the_adapter(adapter, kind, tiny_model_dir, tmp_path):
    peft = pytest.importorskip("peft")
    assert peft.PeftConfig.from_pretrained(adapter[0]).base_model_name_or_path == str(tiny_model_dir())
    place, expected = saved_adapter(load(tiny_model_dir(), kind), tmp_path / "lora", method="lora")
    model = peft.PeftModel.from_pretrained(load(tiny_model_dir(), kind), place).eval()
    torch.testing.assert_close(logits(model), expected, atol=2e-2, rtol=0)


def test_modules_that_are_trained_in_full_stay_plain(kind, tiny_model_dir):
    model = load(tiny_model_dir(), kind, keep=("down_proj", "model.layers.0.self_attn.q_proj"))
    layer = model.model.layers[0]
    assert {m.weight.dtype for m in (layer.mlp.down_proj, layer.self_attn.q_proj, model.lm_head)} == {torch.float32}
    assert layer.self_attn.k_proj.weight.dtype != torch.float32
    assert model.model.layers[1].self_attn.q_proj.weight.dtype != torch.float32


@pytest.mark.parametrize(("dtype", "compute"), [("float32", None), ("bfloat16", None), ("float32", torch.bfloat16)])
def test_products_are_in_the_dtype_that_is_asked_for(dtype, compute, tiny_model_dir):
    model = load(tiny_model_dir(), "nf4", dtype=dtype, compute=compute)
    assert model.dtype == getattr(torch, dtype)
    assert model.model.layers[0].mlp.up_proj.compute_dtype == (compute or model.dtype)


def test_what_is_quantised_is_not_quantised_again(kind, folder):
    with pytest.raises(
        ConfigError, match=f"quantize is nf4, but .* is quantised already \\({NAMES[kind]}\\).*Leave that out"
    ):
        load(folder, "nf4")
    assert quantization_of(load(folder, "none")).name == NAMES[kind]


def test_a_quantised_folder_stands_above_what_an_adapter_remembers(folder, adapter):
    model, _ = load_model_and_tokenizer(folder, adapter=adapter[0], device="cpu")
    assert quantization_of(model).kind is None
    torch.testing.assert_close(logits(model), adapter[1], atol=1e-5, rtol=0)
    for options in ({"quantize": "fp8"}, {"plain_for": "base_dtype is fp8"}):
        with pytest.raises(ConfigError, match=r"is fp8, but .* is quantised already"):
            load(folder, **options)


def test_a_library_that_is_missing_is_named_with_the_line_that_installs_it(kind, folder, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(quantized, "_installed", lambda library: False)
    with pytest.raises(ConfigError, match=rf"quantize={kind} wants bitsandbytes, .*: pip install 'theodora\[quant\]'"):
        load(tiny_model_dir(), kind)
    with pytest.raises(CheckpointError, match="which takes bitsandbytes, not installed here: pip install"):
        load(folder)


def test_what_no_adapter_can_be_put_on_is_refused_before_it_is_loaded(model_with):
    folder = model_with({"quant_method": "vptq"})
    with pytest.raises(CheckpointError, match=r"is quantised \(vptq\), and no adapter can be put on that here"):
        load(folder, adapted=True)
    for fields, missing in (
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "compressed-tensors"}, "compressed_tensors"),
    ):
        if not quantized._installed(missing):
            with pytest.raises(CheckpointError, match=f"pip install {missing.replace('_', '-')}"):
                load(model_with(fields))


@pytest.mark.parametrize("form", ["configuration", "hqq's file", "transformers' file"])
def test_folders_of_hqq_are_refused_by_name_at_once(model_with, tmp_path, form):
    if form == "configuration":
        folder = model_with({"quant_method": "hqq"})
    else:
        folder = tmp_path / "saved"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
        if form == "hqq's file":
            (folder / "qmodel.pt").write_bytes(b"pickle")
        else:
            packed = {"model.layers.0.mlp.up_proj.W_q": torch.zeros(8, 8, dtype=torch.uint8)}
            save_file(packed, folder / "model.safetensors", {"format": "pt"})
    for adapted in (True, False):
        with pytest.raises(CheckpointError, match=r"quantised with HQQ, and transformers \S+ loads no such folder"):
            load(folder, adapted=adapted)


@pytest.fixture
def model_with(tiny_model_dir, tmp_path):
    """A model's folder whose config.json says how it is quantised."""

    def make(quantization):
        folder = tmp_path / str(quantization["quant_method"])
        folder.mkdir()
        for file in tiny_model_dir().iterdir():
            (folder / file.name).symlink_to(file)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        return folder

    return make


@pytest.mark.skipif(best_device().type != "cpu", reason="a GPU has the kernels")
def test_a_device_that_lacks_the_kernels_is_said(tiny_model_dir):
    pytest.importorskip("torchao")
    with pytest.raises(ConfigError, match=r"kernels of torchao for NVIDIA GPUs .* this run is on cpu. Write quantize"):
        load(tiny_model_dir(), "int4", dtype="bfloat16")


def test_unknown_kinds_and_nonsense_are_refused(tiny_model_dir, model_with):
    with pytest.raises(ConfigError, match="quantize is 'nf5'; expected one of none, nf4, int8, int4, fp8"):
        load(tiny_model_dir(), "nf5")
    with pytest.raises(CheckpointError):
        load(model_with({"quant_method": "bitsandbytes", "load_in_4bit": "perhaps"}))


def test_a_gguf_file_is_sent_on_its_way(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for model in (tmp_path, tmp_path / "m.gguf"):
        for loading in (load, load_model_and_tokenizer):  # the latter begins with the tokenizer
            with pytest.raises(CheckpointError, match=r"m.gguf is a GGUF file; .*save_pretrained\(FOLDER\)"):
                loading(model, quantize="nf4")


def test_a_trainer_is_made_as_for_an_adapter_of_pefts(tiny_model_dir):
    model = load(tiny_model_dir(), "nf4")
    with as_adapted(model):
        assert model.is_loaded_in_4bit  # without our adapter it is what it is
    inject_adapter(model, AdapterConfig(rank=2))
    with as_adapted(model), as_adapted(model):
        assert not model.is_loaded_in_4bit
        assert model._hf_peft_config_loaded
    assert model.is_loaded_in_4bit
    assert "_hf_peft_config_loaded" not in vars(model)


def test_names():
    hqq = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}
    assert name_of(hqq) == "HQQ 4 bits, groups of 64"
    assert name_of({"quant_method": "gptq", "bits": 4, "group_size": -1}) == "GPTQ 4 bits"
    assert name_of({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}) == (
        "torchao Int8WeightOnly"
    )
    assert name_of({"quant_method": "fp8"}) == "fine-grained FP8"
    assert name_of({"quant_method": "compressed-tensors", "format": "pack-quantized"}).endswith("pack-quantized")
    assert name_of({"load_in_4bit": True}) == "bitsandbytes fp4"
    assert name_of({"quant_method": "\x1b[31m"}) == name_of({}) == "an unknown kind"


@pytest.mark.parametrize(
    "said", [None, [], "nf4", {"quantize": "../x"}, {"model": "\x1b[2J"}, {"model": 5}, {"model": "x" * 1000}]
)
def test_what_a_file_says_of_its_base_is_not_believed(said):
    assert trained_on({"base": said}) is None


def test_the_file_remembers_model_and_commit(tiny_model_dir, tmp_path):
    model = load(tiny_model_dir())
    model.config._commit_hash = "0123abcd"
    save_adapter(inject_adapter(model, AdapterConfig(rank=2)), tmp_path)
    assert trained_on({"base": read_trained_on(tmp_path).to_json()}) == read_trained_on(tmp_path)
    assert read_adapter(tmp_path).base_revision == read_trained_on(tmp_path).revision == "0123abcd"
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert "quantize" not in json.loads(file.metadata()["theodora"])["base"]


def test_rows_of_the_dequantised_weight_give_the_fingerprint(kind, tiny_model_dir, adapter):
    model = load(tiny_model_dir(), kind)
    path, values = next(iter(read_adapter(adapter[0]).fingerprint.items()))
    w_OI = base_weight(model.get_submodule(path)).dense().float()
    assert values[0] == pytest.approx(float(w_OI[0, 0]), abs=1e-6)
    load_adapter(model, adapter[0])


_PEAK = """
import sys, threading, time
import torch, bitsandbytes
from theodora.adapters.models import load_model

def anonymous():  # what the system cannot drop; the file's own pages it can
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024

torch.set_num_threads(1)
load_model(sys.argv[1], quantize=sys.argv[3], device=torch.device("cpu"))  # all that is imported on the way
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(sys.argv[2], quantize=sys.argv[3], device=torch.device("cpu"))
done = True
watcher.join()
print(peak - before)
"""


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="read from Linux's /proc")
@pytest.mark.parametrize("quantize", ["nf4", "int8", "fp8"])
def test_the_host_never_holds_the_model_in_bfloat16(quantize, tiny_model_dir, tmp_path, large_model):
    folder, size = large_model
    # Else the allocator keeps what is freed for the next of the same size, as much as it likes.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    command = [sys.executable, "-c", _PEAK, str(tiny_model_dir()), str(folder), quantize]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.splitlines()[-1])
    assert peak < {"nf4": 0.55, "int8": 0.8, "fp8": 0.8}[quantize] * size


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    """A folder of 270 MB in bfloat16, and how much that is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8, vocab_size=512
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    folder = tmp_path_factory.mktemp("large")
    model.save_pretrained(folder)
    return folder, 2 * model.num_parameters()
