"""Adapter folders: configuration, safetensors headers, tensors, metadata, and what MLX writes."""

import json
import math
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import tiny
from fuzz.fuzzing import damaged, files_under, fuzz, json_values, only_our_errors, text
from theodora import AdapterConfig, inject_adapter, load_adapter, paths, save_adapter
from theodora.adapters.save_mlx import save_mlx
from theodora.errors import CheckpointError, ConfigError, TheodoraError
from theodora.files.adapter import AdapterFile, read_adapter
from theodora.files.names import CONFIG_NAME, MLX_WEIGHTS_NAME, WEIGHTS_NAME

WHERE = "base_model.model.model.layers.0.self_attn.q_proj"
FIELDS = st.one_of(
    st.sampled_from(
        [
            "peft_type",
            "r",
            "lora_alpha",
            "use_dora",
            "use_rslora",
            "rank_pattern",
            "alpha_pattern",
            "modules_to_save",
            "target_modules",
            "target_parameters",
            "bias",
            "lora_dropout",
            "init_lora_weights",
            "base_model_name_or_path",
            "layers_to_transform",
            "layers_pattern",
            "exclude_modules",
            "lora_bias",
            "fine_tune_type",
            "lora_parameters",
            "model",
            "revision",
        ]
    ),
    text,
)
VALUES = json_values(
    FIELDS,
    st.sampled_from(
        [
            "LORA",
            "q_proj",
            "experts.down_proj",
            "dora",
            "../..",
            "/etc",
            "a/b",
            "(a+)+$",
            "[",
            "~x",
            "gaussian",
            ".*",
            10**9,
            8,
        ]
    ),
)
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.tiny_model()
    inject_adapter(model, AdapterConfig(rank=2, targets=("q_proj", "embed_tokens"), rank_pattern={"1.*q_proj": 4}))
    folder = tmp_path_factory.mktemp("sound")
    save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def sound_mlx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.tiny_model()
    inject_adapter(model, AdapterConfig(rank=2, targets=("q_proj",)))
    folder = tmp_path_factory.mktemp("mlx")
    save_mlx(model, folder)
    return folder


def read_and_load(folder: Path) -> AdapterFile | TheodoraError:
    """Read an adapter and put it on a model, which computes finite numbers or was left as it was."""
    before = files_under(folder)
    found = only_our_errors(lambda: read_adapter(folder))
    if not isinstance(found, TheodoraError):
        for tensors in found.modules.values():
            assert math.isfinite(tensors.scale)
            assert tensors.a.shape[0] == tensors.b.shape[1]
            assert (tensors.magnitude is not None) == (found.config.method == "dora")
        model = tiny.tiny_model()
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if isinstance(only_our_errors(lambda: load_adapter(model, folder)), TheodoraError):
            after = model.state_dict()
            assert after.keys() == weights.keys()
            assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
        else:
            assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all() or found.config.alpha
    assert files_under(folder) == before
    return found


@pytest.fixture
def variant(sound: Path, tmp_path: Path) -> Make:
    """A copy of the sound adapter with other fields in its configuration, other tensors, other metadata."""

    def make(fields: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None, meta: Any = None) -> Path:
        config = json.loads((sound / CONFIG_NAME).read_text()) | (fields or {})
        (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
        changed = {**load_file(sound / WEIGHTS_NAME), **(tensors or {})}
        kept = {key: tensor for key, tensor in changed.items() if tensor is not None}
        save_file(kept, tmp_path / WEIGHTS_NAME, None if meta is None else {"theodora": meta})
        return tmp_path

    return make


@fuzz(80)
@given(st.dictionaries(FIELDS, VALUES, max_size=4))
@example({"r": 10**9})
@example({"r": 10**400, "lora_alpha": 10**400})
@example({"lora_alpha": float("nan")})
@example({"rank_pattern": {"a{99999999999}": 2}})
@example({"rank_pattern": {"(" * 5000: 2}})
@example({"rank_pattern": {"": 2}})
@example({"use_dora": "false"})
@example({"modules_to_save": [""]})
@example({"modules_to_save": ["model"]})
@example({"layers_to_transform": {"a": 1}})
@example({"lora_alpha": 1e300})
@example({"lora_alpha": 1e-300})
def test_configurations_of_every_kind(sound, tmp_path_factory, fields):
    folder = tmp_path_factory.mktemp("adapter")
    (folder / WEIGHTS_NAME).write_bytes((sound / WEIGHTS_NAME).read_bytes())
    config = json.loads((sound / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | fields))
    read_and_load(folder)


@fuzz(80)
@given(st.data(), st.booleans())
def test_damaged_files(sound, sound_mlx, tmp_path_factory, data, mlx):
    source = sound_mlx if mlx else sound
    folder = tmp_path_factory.mktemp("adapter")
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    name = data.draw(st.sampled_from([CONFIG_NAME, MLX_WEIGHTS_NAME if mlx else WEIGHTS_NAME]))
    (folder / name).write_bytes(data.draw(damaged((source / name).read_bytes())))
    read_and_load(folder)


HEADER_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.one_of(
            st.sampled_from(["F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E8M0", "F4", "I64", "BOOL", "C64"]), text
        ),
        "shape": st.one_of(
            st.lists(st.sampled_from([0, 1, 2, 4, 16, 32, 2**31, 2**62, -1]), max_size=3), json_values()
        ),
        "data_offsets": st.one_of(
            st.lists(st.sampled_from([0, 4, 8, 64, 256, 2**63]), min_size=2, max_size=2), json_values()
        ),
    }
)
KEYS = st.one_of(
    st.sampled_from(
        [f"{WHERE}.lora_A.weight", f"{WHERE}.lora_B.weight", f"{WHERE}.lora_magnitude_vector", "__metadata__", "x"]
    ),
    text,
)


@fuzz(80)
@given(
    st.lists(st.tuples(KEYS, HEADER_ENTRY), max_size=4),
    st.integers(0, 512),
    st.sampled_from([None, 0, 2**40, 2**63, 5]),
)
def test_headers_of_every_kind(sound, tmp_path_factory, entries, size, claimed):
    """Names twice, offsets that overlap or leave the file, shapes beyond all memory, headers longer than the file."""
    folder = tmp_path_factory.mktemp("adapter")
    (folder / CONFIG_NAME).write_bytes((sound / CONFIG_NAME).read_bytes())
    header = ("{" + ",".join(f"{json.dumps(key)}:{json.dumps(entry)}" for key, entry in entries) + "}").encode()
    length = struct.pack("<Q", len(header) if claimed is None else claimed)
    (folder / WEIGHTS_NAME).write_bytes(length + header + bytes(size))
    read_and_load(folder)


@fuzz(40)
@given(json_values(st.sampled_from(["starts", "probe", "init", "a"]), st.sampled_from([1e308, 0.0, [1.0] * 16])))
@example({"starts": "no"})
@example({"starts": True})
@example({"probe": {"model.layers.0.self_attn.q_proj": [float("nan")] * 16}})
@example({"probe": {"model.layers.0.self_attn.q_proj": [1e308] * 16}})
@example({"probe": {"model.layers.0.self_attn.q_proj": [0.0] * 16}})
@example([[]])
def test_metadata_of_every_kind(sound, tmp_path_factory, metadata):
    folder = tmp_path_factory.mktemp("adapter")
    (folder / CONFIG_NAME).write_bytes((sound / CONFIG_NAME).read_bytes())
    try:
        written = json.dumps(metadata, ensure_ascii=True).encode().decode()
        save_file(load_file(sound / WEIGHTS_NAME), folder / WEIGHTS_NAME, {"theodora": written})
    except UnicodeError:
        assume(False)
    read_and_load(folder)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"r": 10**9}, r"rank 2, but adapter_config.json says 1000000000"),
        ({"use_dora": "false"}, "use_dora is 'false'; expected true or false"),
        ({"use_rslora": 1}, "use_rslora is 1; expected true or false"),
        ({"lora_alpha": 10**400}, "alpha is 1000"),
        ({"rank_pattern": {"a{99999999999}": 2}}, "repeats more than 100,000 times"),
        ({"modules_to_save": [""]}, "modules_to_save holds ''"),
        ({"base_model_name_or_path": ["a"]}, "expected a folder or hub name"),
    ],
)
def test_configurations_that_are_refused(variant, fields, what):
    with pytest.raises(CheckpointError, match=what):
        read_adapter(variant(fields))


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({f"{WHERE}.lora_A.weight": torch.full((2, 32), math.nan)}, "NaN or infinite"),
        ({f"{WHERE}.lora_A.weight": torch.zeros(2, 32).to(torch.float8_e4m3fn)}, "dtype torch.float8_e4m3fn"),
        ({f"{WHERE}.lora_A.weight": torch.zeros(32, 2)}, "expected .rank, in. and .out, rank."),
        ({f"{WHERE}.lora_magnitude_vector": torch.zeros(32, 1)}, "one for each output row"),
        ({f"{WHERE}.lora_magnitude_vector": None}, "magnitudes .* are missing"),
        ({f"{WHERE}.lora_embedding_A": torch.zeros(2, 32)}, "holds this twice"),
        ({f"{WHERE}/../../x.weight": torch.zeros(2)}, "no such parameter|unknown key"),
    ],
)
def test_tensors_that_are_refused(variant, tensors, what):
    with pytest.raises(CheckpointError, match=what):
        load_adapter(tiny.tiny_model(), variant(tensors=tensors))


def test_a_key_that_stands_twice_is_refused(variant):
    """JSON lets an object name a key twice, and readers differ in which of them counts."""
    folder = variant()
    config = (folder / CONFIG_NAME).read_text()
    (folder / CONFIG_NAME).write_text(config.replace('"use_dora": true', '"use_dora": true, "use_dora": false'))
    with pytest.raises(CheckpointError, match="'use_dora' twice"):
        read_adapter(folder)
    (folder / CONFIG_NAME).write_text(config)
    raw = (folder / WEIGHTS_NAME).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    key, entry = next((key, entry) for key, entry in entries.items() if key.endswith("lora_B.weight"))
    twice = raw[8 : 8 + length].rstrip()[:-1] + f",{json.dumps(key)}:{json.dumps(entry)}".encode() + b"}"
    (folder / WEIGHTS_NAME).write_bytes(struct.pack("<Q", len(twice)) + twice + raw[8 + length :])
    with pytest.raises(CheckpointError, match="twice"):
        read_adapter(folder)


def test_an_expression_that_never_ends_is_stopped(variant, monkeypatch):
    """Python's own `re` would be busy with this one until the sun is cold."""
    monkeypatch.setattr(paths, "PATIENCE", 0.2)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"take more than 0\.2 s together"):
        read_adapter(variant({"rank_pattern": {r"(.|\w)*[!?]": 2, "1.*": 4}}))
    assert time.monotonic() - start < 30


def test_an_adapter_that_no_memory_holds_is_refused_before_any_is_taken():
    model = tiny.tiny_model()
    for config in (
        AdapterConfig(rank=10**9),
        AdapterConfig(rank=4, rank_pattern={"q_proj": 10**12}),
        AdapterConfig(rank=10**9, init="orthogonal"),
    ):
        with pytest.raises(ConfigError, match=r"takes .* GB; this machine has"):
            inject_adapter(model, config)


def test_pickles_are_not_opened(variant):
    folder = variant()
    (folder / WEIGHTS_NAME).rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="a pickle file, which can run code"):
        read_adapter(folder)


def test_a_probe_of_zeros_does_not_pass_for_any_model(variant):
    probe = {"probe": {"model.layers.0.self_attn.q_proj": [0.0] * 16}}
    with pytest.raises(CheckpointError, match="another base model"):
        load_adapter(tiny.tiny_model(), variant(meta=json.dumps(probe)))


@pytest.mark.parametrize(
    "name", ["~nobody-of-this-name/a", "a" * 300, "a\0b", "\ud800", "", "/dev/null", "a/b/../../../etc"]
)
def test_odd_folder_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        read_adapter(name)


def test_saving_follows_no_links_out_of_the_folder(sound, tmp_path):
    """What stands at a file's name may be a link planted there; it is replaced, not written through."""
    model = tiny.tiny_model()
    load_adapter(model, sound)
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (folder / name).symlink_to(outside)
    save_adapter(model, folder)
    assert outside.read_text() == "mine"
    assert read_adapter(folder).modules
