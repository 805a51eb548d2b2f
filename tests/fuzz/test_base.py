"""Base models: config.json, index, safetensors, GGUF; nothing is unpickled, nothing read or written elsewhere."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

import tiny
from exports import write_llama
from fuzz.fuzzing import EXAMPLES, damaged, files_under, fuzz, json_values, only_our_errors, text
from quantised import save_plain, save_quantised
from theodora import AdapterConfig, inject_adapter, save_adapter
from theodora.adapters.models import load_model, load_model_and_tokenizer
from theodora.errors import CheckpointError, TheodoraError
from theodora.files import base_model as base_checkpoint
from theodora.files.base_model import BaseCheckpoint, find_base
from theodora.files.model_folder import INDEX
from theodora.files.run_files import CONFIG_FILE, RUN_FILES
from theodora.merging.checkpoint import merge_checkpoint
from theodora.train.checkpoints import check_output, clear_run

FIELDS = st.one_of(
    st.sampled_from(
        [
            "model_type",
            "architectures",
            "num_hidden_layers",
            "hidden_size",
            "vocab_size",
            "num_attention_heads",
            "quantization_config",
            "dtype",
            "text_config",
            "auto_map",
            "head_dim",
            "tie_word_embeddings",
            "rope_parameters",
            "hidden_act",
            "pad_token_id",
        ]
    ),
    text,
)


@pytest.fixture
def model_copy(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir("llama"), tmp_path / "model"))


def merge_onto(base: Path, tmp_path: Path) -> Path:
    model = tiny.tiny_model()
    inject_adapter(model, AdapterConfig(rank=2, targets=("q_proj",)))
    save_adapter(model, tmp_path / "adapter")
    return merge_checkpoint(tmp_path / "adapter", tmp_path / "merged", base_model=base).output


@fuzz(25)
@given(st.dictionaries(FIELDS, json_values(FIELDS, st.sampled_from(["llama", "gpt2", "x.Y", 10**9, -1])), max_size=3))
@example({"num_hidden_layers": 10**9})
@example({"text_config": {"num_hidden_layers": 10**9}})
@example({"num_attention_heads": 0})
@example({"quantization_config": 5})
@example({"text_config": 5})
@example({"hidden_act": "os.system"})
@pytest.mark.filterwarnings("ignore")  # transformers warns about what it finds odd, and says which field
def test_configurations_of_every_kind(tiny_model_dir, tmp_path_factory, fields):
    large = [v for v in fields.values() if isinstance(v, int) and not isinstance(v, bool) and abs(v) > 10**4]
    if large and not fields.keys() & {"num_hidden_layers"}:
        return  # sizes are believed until the first tensor differs: memory for one tensor of that size
    folder = Path(shutil.copytree(tiny_model_dir("llama"), tmp_path_factory.mktemp("base") / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    before = files_under(folder)
    only_our_errors(lambda: BaseCheckpoint(folder))
    found = only_our_errors(lambda: load_model(folder))
    assert isinstance(found, PreTrainedModel | TheodoraError)
    assert files_under(folder) == before


@fuzz(25)
@given(st.data(), st.sampled_from(["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]))
@pytest.mark.filterwarnings("ignore")
def test_damaged_files(tiny_model_dir, tmp_path_factory, data, name):
    folder = Path(shutil.copytree(tiny_model_dir("llama"), tmp_path_factory.mktemp("base") / "model"))
    (folder / name).write_bytes(data.draw(damaged((folder / name).read_bytes())))
    only_our_errors(lambda: load_model_and_tokenizer(folder))
    only_our_errors(lambda: BaseCheckpoint(folder))


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{",
        '{"weight_map": []}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": "../../secret.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        "[" * 5000,
    ],
)
def test_an_index_names_files_beside_it_or_is_refused(model_copy, index):
    (model_copy / "model.safetensors").rename(model_copy.parent / "secret.safetensors")
    (model_copy / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=r"index|elsewhere"):
        BaseCheckpoint(model_copy)


class Owned:
    """What a pickle does when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_pickled_weights_are_not_opened(model_copy, tmp_path):
    (model_copy / "model.safetensors").unlink()
    torch.save({"a": Owned(tmp_path / "owned")}, model_copy / "pytorch_model.bin")
    for read in (load_model, BaseCheckpoint):
        with pytest.raises(CheckpointError, match="only as pickles"):
            read(model_copy)
    # Beside an index of pickles, transformers itself has to be told.
    (model_copy / "pytorch_model.bin").rename(model_copy / "part.bin")
    (model_copy / "pytorch_model.bin.index.json").write_text('{"metadata": {}, "weight_map": {"a": "part.bin"}}')
    (model_copy / "other.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        load_model(model_copy)
    assert not (tmp_path / "owned").exists()


def test_code_that_comes_with_a_model_does_not_run_unasked(model_copy, tmp_path):
    mark = tmp_path / "owned"
    (model_copy / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    config = json.loads((model_copy / "config.json").read_text())
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    (model_copy / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": auto}))
    for read in (load_model_and_tokenizer, BaseCheckpoint):
        with pytest.raises(CheckpointError):
            read(model_copy)
    assert not mark.exists()


def test_code_that_comes_with_a_model_runs_when_asked(model_copy):
    (model_copy / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig):\n    model_type = 'own'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
    )
    config = json.loads((model_copy / "config.json").read_text())
    auto = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    (model_copy / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto}))
    assert type(BaseCheckpoint(model_copy, trust_remote_code=True).model).__name__ == "M"
    assert type(load_model(model_copy, trust_remote_code=True)).__name__ == "M"


def test_more_layers_than_tensors_are_refused_before_any_is_built(model_copy):
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    for read in (load_model, BaseCheckpoint):
        with pytest.raises(CheckpointError, match="num_hidden_layers: 1000000000, but the weights hold only"):
            read(model_copy)


def test_a_link_out_of_a_model_is_not_copied_into_the_merged_one(model_copy, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (model_copy / "vocab.txt").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"is a link to .*secret"):
        merge_onto(model_copy, tmp_path)
    assert not (tmp_path / "merged").exists()


def test_the_links_of_the_hubs_cache_are_followed(model_copy, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model_copy.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    merged = merge_onto(snapshot, tmp_path)
    assert (merged / "tokenizer.json").is_file()
    assert not (merged / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("name", ["~nobody-of-this-name", "a" * 300, "a\0b", "../nowhere", "/nowhere", "a b", "-", ""])
def test_odd_base_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / ".")
    for read in (find_base, load_model):
        with pytest.raises(CheckpointError):
            read(name)


def test_the_hub_is_asked_for_names_and_for_no_pickles(model_copy, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        base_checkpoint, "snapshot_download", lambda name, **how: asked.append(how | {"name": name}) or model_copy
    )
    monkeypatch.chdir(tmp_path)
    for name in ("../nowhere", ".hidden", "a b", "a/b/c", "https://x.y/z", "a/b?c"):
        with pytest.raises(CheckpointError, match="is not a folder on this machine"):
            find_base(name, download=True)
    assert not asked
    model = inject_adapter(tiny.tiny_model(), AdapterConfig(rank=2, targets=("q_proj",)))
    save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    named = {"base_model_name_or_path": "owner/name", "revision": "0123"}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    merge_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    (how,) = asked
    assert (how["name"], how["revision"], how["local_files_only"]) == ("owner/name", "0123", False)
    files = ["a.safetensors", "pytorch_model.bin", "original/b.safetensors", "config.json", "consolidated.00.pth"]
    patterns = {key: how[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(files, **patterns)) == ["a.safetensors", "config.json"]


def test_links_in_an_output_folder_are_not_written_through(tmp_path):
    """A run begins only where nothing stands under its names, links that point nowhere included."""
    for name in RUN_FILES:
        output = tmp_path / name
        output.mkdir()
        (output / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(TheodoraError, match=r"holds .*, but no run of theodora"):
            check_output(output, overwrite=False, resume=None)
        clear_run(output)
        # The record stays until another run begins, and says that there is nothing to go on from.
        assert [path.name for path in output.iterdir() if not path.is_symlink()] == [CONFIG_FILE]
    kept = tmp_path / "kept"
    (kept / "deep").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(kept)
    clear_run(tmp_path / "run")
    assert (kept / "deep").is_dir()


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of one layer with a tokenizer of bytes, in GGUF."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(259)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*map(str, range(259))])
    writer.add_token_merges([])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    write_llama(writer, 259)
    return path


@fuzz(10)
@given(st.data())
@pytest.mark.filterwarnings("ignore")
def test_damaged_gguf_models(small_gguf, tmp_path_factory, data):
    """The demo's model is one; transformers and the package gguf read it."""
    from theodora.demo.model import convert

    folder = tmp_path_factory.mktemp("gguf")
    whole = small_gguf.read_bytes()
    header = data.draw(st.integers(1, len(whole) if EXAMPLES else 8000))
    (folder / "a.gguf").write_bytes(data.draw(damaged(whole[:header])) + whole[header:])
    only_our_errors(lambda: convert(folder / "a.gguf", folder / "model"))
    assert {path.name for path in folder.iterdir()} <= {"a.gguf", "model"}


QUANTISED = ("nf4", "int8", "torchao int8")
QUANTISATION_FIELDS = st.one_of(
    st.sampled_from(
        [
            "quant_method",
            "load_in_4bit",
            "load_in_8bit",
            "bnb_4bit_quant_type",
            "bnb_4bit_use_double_quant",
            "bnb_4bit_compute_dtype",
            "bnb_4bit_quant_storage",
            "llm_int8_threshold",
            "llm_int8_skip_modules",
            "modules_to_not_convert",
            "quant_type",
            "_type",
            "_data",
            "default",
            "bits",
            "group_size",
            "weight_block_size",
        ]
    ),
    text,
)
QUANTISATION_VALUES = st.sampled_from(
    ["bitsandbytes", "torchao", "fp8", "gptq", "nf4", "bfloat16", "lm_head", "(a+)+$", "Int8WeightOnlyConfig", 10**12]
)


@pytest.fixture(scope="session")
def quantised_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("quantised")
    plain = save_plain(top / "plain")
    return {form: save_quantised(plain, top / form, form) for form in QUANTISED}


def read_all(folder: Path) -> None:
    base = BaseCheckpoint(folder, dequantise=True)
    for key in base.tensors:
        base.read(key)


@fuzz(30)
@given(
    st.sampled_from(QUANTISED),
    st.dictionaries(QUANTISATION_FIELDS, json_values(QUANTISATION_FIELDS, QUANTISATION_VALUES), max_size=3),
)
@pytest.mark.filterwarnings("ignore")
def test_quantisation_configurations_of_every_kind(quantised_folders, tmp_path_factory, form, fields):
    folder = Path(shutil.copytree(quantised_folders[form], tmp_path_factory.mktemp("base") / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))
    before = files_under(folder)
    only_our_errors(lambda: read_all(folder))
    only_our_errors(lambda: load_model(folder, adapted=True, device=torch.device("cpu")))
    assert files_under(folder) == before


@fuzz(40)
@given(st.sampled_from(QUANTISED), st.data())
@pytest.mark.filterwarnings("ignore")
def test_packed_tensors_of_every_kind(quantised_folders, tmp_path_factory, form, data):
    """Parts of one weight are left out, cut, of another dtype or shape, or hold other bytes."""
    folder = Path(shutil.copytree(quantised_folders[form], tmp_path_factory.mktemp("base") / "model"))
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata, held = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    of_one = sorted(key for key in held if key.startswith("model.layers.0.mlp.down_proj."))
    for key in data.draw(st.lists(st.sampled_from(of_one), min_size=1, max_size=3, unique=True)):
        flat = held[key].reshape(-1)
        match data.draw(st.sampled_from(["none", "cut", "dtype", "shape", "bytes"])):
            case "none":
                del held[key]
            case "cut":
                held[key] = flat[: data.draw(st.integers(0, len(flat)))].clone()
            case "dtype":
                held[key] = held[key].to(data.draw(st.sampled_from([torch.uint8, torch.float16, torch.int64])))
            case "shape":
                held[key] = flat[None, None].clone()
            case _:
                whole = flat.view(torch.uint8).numpy().tobytes()
                changed = data.draw(damaged(whole)).ljust(len(whole), b"\0")[: len(whole)]
                held[key] = torch.frombuffer(bytearray(changed), dtype=flat.dtype).reshape(held[key].shape)
    if metadata and data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(metadata)))
        metadata[name] = data.draw(damaged(metadata[name].encode())).decode("utf-8", "replace")
    save_file(held, path, metadata)
    only_our_errors(lambda: read_all(folder))
    found = only_our_errors(lambda: load_model(folder, adapted=True, device=torch.device("cpu")))
    if isinstance(found, PreTrainedModel):
        with torch.no_grad():
            only_our_errors(lambda: found(torch.tensor([[5, 6, 7]])))
