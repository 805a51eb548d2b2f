"""Quantised folders read and written weight by weight, held against what transformers itself makes and loads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantised import ERRORS, FORMATS, save_plain, save_quantised
from theodora.errors import CheckpointError
from theodora.files.base_model import BaseCheckpoint
from theodora.files.packed import bits_of, group_parts, method_of

CASES = [*(("llama", form) for form in FORMATS), ("gpt2", "nf4"), ("gpt2", "int8")]
# A fine-grained FP8 folder cannot be made by transformers without a GPU.
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def folders(request, tmp_path):
    family, form = request.param
    plain = save_plain(tmp_path / "plain", family)
    return plain, save_quantised(plain, tmp_path / "quantised", form), form


def quantisation(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_a_quantised_folder_reads_as_the_plain_one_it_was_made_from(folders):
    plain, quantised, form = folders
    here, there = BaseCheckpoint(quantised, dequantise=True), BaseCheckpoint(plain)
    assert {key: (t.shape, t.dtype) for key, t in here.tensors.items()} == {
        key: (t.shape, t.dtype) for key, t in there.tensors.items()
    }
    assert here.quantised is not None
    packed = here.quantised.parameters
    assert len(packed) == (14 if "gate" in str(packed) else 8)
    for key in there.tensors:
        w, q = there.read(key), here.read(key)
        error = (q - w).norm() / w.norm()
        assert (0 < error < ERRORS[form]) if key in packed else torch.equal(w, q), key


def test_quantising_a_plain_folder_gives_every_bit_that_transformers_writes(folders):
    plain, quantised, _ = folders
    written = load_file(quantised / "model.safetensors")
    base = BaseCheckpoint(plain, quantised_as=quantisation(quantised))
    made = base.quantised
    assert made is not None
    with safe_open(quantised / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    seen = {key for key in written if key not in base.tensors or key in made.parameters}
    for key, parameter in made.parameters.items():
        for part, tensor in made.read_parts(key).items():
            assert torch.equal(tensor, written[made.part_key(key, part)]), (key, part)
            seen.remove(made.part_key(key, part))
        described = made.packed.metadata_of(parameter)
        assert {k: json.loads(v)["_type"] for k, v in described.items()} == {
            k: json.loads(metadata[k])["_type"] for k in described
        }
    assert not seen


def test_the_model_without_memory_stays_without(folders):
    _, quantised, _ = folders
    base = BaseCheckpoint(quantised, dequantise=True)
    for key in base.tensors:
        base.read(key)
    assert all(parameter.is_meta for parameter in base.model.parameters())
    assert base.quantised is not None
    assert all(parameter.is_meta for parameter in base.quantised.packed._model.parameters())


def test_fine_grained_fp8(tmp_path):
    plain = save_plain(tmp_path / "plain")
    made = BaseCheckpoint(plain, quantised_as=FP8)
    assert made.quantised is not None
    tensors = {key: made.read_stored(key) for key in made.tensors if key not in made.quantised.parameters}
    for key in made.quantised.parameters:
        parts = made.quantised.read_parts(key)
        assert set(parts) == {"weight", "weight_scale_inv"}
        assert parts["weight_scale_inv"].shape == tuple(size // 32 for size in parts["weight"].shape)
        tensors |= {made.quantised.part_key(key, part): tensor for part, tensor in parts.items()}
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": FP8}
    (plain / "config.json").write_text(json.dumps(config))
    again = BaseCheckpoint(plain, dequantise=True)
    for key in made.tensors:
        assert torch.equal(made.read(key), again.read(key))


def test_blocks_of_fine_grained_fp8_that_end_with_the_weight(tmp_path):
    """The size of a block is the configuration's: 64 rows in blocks of 48 are 48 and 16, not twice 32."""
    plain = save_plain(tmp_path / "plain")
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = FP8 | {"weight_block_size": [48, 64], "modules_to_not_convert": ["lm_head"]}
    (plain / "config.json").write_text(json.dumps(config))
    tensors, expected, generator = {}, {}, torch.Generator().manual_seed(0)
    for key, w in load_file(plain / "model.safetensors").items():
        tensors[key] = w
        if "proj" in key:
            rows, columns = torch.arange(w.shape[0]) // 48, torch.arange(w.shape[1]) // 64
            scale = torch.rand(int(rows[-1]) + 1, int(columns[-1]) + 1, generator=generator) + 0.5
            tensors[key], tensors[f"{key}_scale_inv"] = w.to(torch.float8_e4m3fn), scale
            expected[key] = tensors[key].float() * scale[rows][:, columns]
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    base = BaseCheckpoint(plain, dequantise=True)
    for key, w in expected.items():
        assert torch.equal(base.read(key), w), key
    key = next(iter(expected))
    save_file(tensors | {f"{key}_scale_inv": torch.ones(3, 1)}, plain / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"blocks of 48 × 64 have \(3, 1\) scales; expected"):
        BaseCheckpoint(plain, dequantise=True).read(key)
    save_file({k: t for k, t in tensors.items() if k != f"{key}_scale_inv"}, plain / "model.safetensors")
    with pytest.raises(CheckpointError, match="without what they were packed with"):
        BaseCheckpoint(plain, dequantise=True)


def test_our_own_float8_is_that_of_quantize_base(tmp_path):
    from theodora.adapters import quantize_base
    from theodora.adapters.models import load_model
    from theodora.layers import base_weight
    from theodora.layers.float8 import Float8Layer

    plain = save_plain(tmp_path / "plain")
    base = BaseCheckpoint(plain, quantised_as={"quant_method": "theodora-float8"})
    model = quantize_base(load_model(str(plain)))
    inside = {path: m for path, m in model.named_modules() if isinstance(m, Float8Layer)}
    assert base.quantised is not None
    assert {f"{path}.weight" for path in inside} == set(base.quantised.parameters)
    for path, module in inside.items():
        assert torch.equal(base_weight(module).dense(), base.read(f"{path}.weight"))


@pytest.mark.parametrize("form", ["nf4", "torchao int8"])
def test_a_missing_library_is_named_with_its_pip_line(tmp_path, form, monkeypatch):
    folder = save_quantised(save_plain(tmp_path / "plain"), tmp_path / "quantised", form)
    for module in ("quantizer_bnb_4bit", "quantizer_torchao"):
        for name in ("is_bitsandbytes_available", "is_torchao_available"):
            monkeypatch.setattr(f"transformers.quantizers.{module}.{name}", lambda: False, raising=False)
    library = "torchao" if "torchao" in form else "bitsandbytes"
    with pytest.raises(CheckpointError, match=rf"{library} is not installed: pip install 'theodora\[quant\]'"):
        BaseCheckpoint(folder, dequantise=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"quant_method": "hqq", "quant_config": {}},
        {"quant_method": "other\x1b[1m", "bits": 4},
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        {"quant_method": "gptq", "bits": 5},
        {"quant_method": "gptq", "bits": 4, "dynamic": {"x": {"bits": 8}}},
        {"quant_method": "awq", "bits": 4, "version": "GEMV"},
        {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "config_groups": {"a": {"weights": {}}},
        },
    ],
)
def test_packed_weights_that_are_not_read_here_are_refused_with_what_to_do(tmp_path, fields):
    folder = save_plain(tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = fields
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="--onto original") as caught:
        BaseCheckpoint(folder, dequantise=True)
    assert "\x1b" not in str(caught.value)


DAMAGES = {
    "a part is missing": lambda tensors, key: tensors.pop(f"{key}.absmax"),
    "a part is too short": lambda tensors, key: tensors.update({key: tensors[key][:-64].clone()}),
    "the state is no JSON": lambda tensors, key: tensors.update(
        {f"{key}.quant_state.bitsandbytes__nf4": torch.tensor(list(b"{nonsense"), dtype=torch.uint8)}
    ),
    "another shape": lambda tensors, key: tensors.update(
        {
            f"{key}.quant_state.bitsandbytes__nf4": torch.tensor(
                list(
                    bytes(tensors[f"{key}.quant_state.bitsandbytes__nf4"].tolist()).replace(b"[64, 64]", b"[32, 128]")
                ),
                dtype=torch.uint8,
            )
        }
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parts_are_named(tmp_path, damage):
    folder = save_quantised(save_plain(tmp_path / "plain"), tmp_path / "quantised", "nf4")
    tensors, key = load_file(folder / "model.safetensors"), "model.layers.1.self_attn.q_proj.weight"
    DAMAGES[damage](tensors, key)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.weight: "):
        BaseCheckpoint(folder, dequantise=True).read(key)


def test_a_header_without_its_descriptions(tmp_path):
    folder = save_quantised(save_plain(tmp_path / "plain"), tmp_path / "quantised", "torchao int8")
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="header of its file does not describe it"):
        BaseCheckpoint(folder, dequantise=True).read("model.layers.0.self_attn.q_proj.weight")


def test_a_quantised_folder_is_refused_where_nobody_asked_for_one(tmp_path):
    folder = save_quantised(save_plain(tmp_path / "plain"), tmp_path / "quantised", "nf4")
    with pytest.raises(CheckpointError, match=r"quantised .bitsandbytes nf4.*--base-model"):
        BaseCheckpoint(folder)


SAID = {
    "nf4": "bitsandbytes nf4",
    "fp4": "bitsandbytes fp4",
    "int8": "bitsandbytes int8",
    "torchao int8": "torchao Int8WeightOnly",
    "torchao float8": "torchao Float8WeightOnly",
    "torchao int4": "torchao IntxWeightOnly",
}


def test_methods_as_people_call_them():
    for form, made in FORMATS.items():
        assert method_of(made().to_dict()) == SAID[form]
        assert bits_of(made().to_dict()) == (4 if form in ("nf4", "fp4", "torchao int4") else 8)
    assert method_of({}) == "an unknown kind"
    assert method_of({"quant_method": ["x"]}) == "an unknown kind"
    assert method_of({"load_in_8bit": True}) == "bitsandbytes int8"


def test_parts_are_found_by_their_keys():
    keys = [
        "a.weight",
        "a.weight.absmax",
        "a.bias",
        "b.weight",
        "b.SCB",
        "c._weight_qdata",
        "c._weight_scale",
        "d.weight",
    ]
    assert group_parts(keys) == {
        "a.weight": {"weight.absmax": "a.weight.absmax", "weight": "a.weight"},
        "b.weight": {"SCB": "b.SCB", "weight": "b.weight"},
        "c.weight": {"_weight_qdata": "c._weight_qdata", "_weight_scale": "c._weight_scale"},
    }
