"""Quantised folders that lie: in their configuration, in the numbers that native code believes, in what is missing."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fuzz.fuzzing import files_under
from quantised import save_adapted, save_plain, save_quantised
from theodora.adapters import quantized
from theodora.adapters.models import load_model
from theodora.errors import CheckpointError, TheodoraError
from theodora.files.base_model import BaseCheckpoint
from theodora.files.quantisation_config import check_quantisation
from theodora.merging.checkpoint import merge_checkpoint

LAYER = "model.layers.1.mlp.down_proj"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Quantised folders, and an adapter of the first."""
    top = tmp_path_factory.mktemp("whole")
    plain = save_plain(top / "plain")
    made = {form: save_quantised(plain, top / form, form) for form in ("nf4", "fp4", "int8", "torchao int8")}
    for form in ("nf4", "int8"):
        save_adapted(made[form], top / f"{form} adapter")
        made[f"{form} adapter"] = top / f"{form} adapter"
    return made


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of one of them, with other fields in its quantization_config."""

    def make(form: str, **fields: Any) -> Path:
        folder = Path(shutil.copytree(whole[form], tmp_path / "model"))
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= fields
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Exchange tensors of the folder's one file, or leave them out."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    held = load_file(path) | tensors
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, path, metadata)


def state(**fields: Any) -> torch.Tensor:
    known = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 128]}
    known |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}
    return torch.tensor(list(json.dumps(known | fields).encode()), dtype=torch.uint8)


def refused(folder: Path, adapter: Path, match: str) -> None:
    """Loading and merging say the same, soon, in little memory, and write nothing."""
    before, began = files_under(folder.parent), time.monotonic()
    room = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    output = folder.parent / "merged"
    for attack in (
        lambda: load_model(folder, adapted=True, device=torch.device("cpu")),
        lambda: BaseCheckpoint(folder, dequantise=True).read(f"{LAYER}.weight"),
        *(
            lambda onto=onto: merge_checkpoint(adapter, output, base_model=folder, onto=onto)
            for onto in ("dequantised", "quantised")
        ),
    ):
        with pytest.raises(TheodoraError, match=match) as raised:
            attack()
        assert len(str(raised.value)) < 2_000
    assert files_under(folder.parent) == before
    assert not output.exists()
    assert time.monotonic() - began < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - room < 500_000  # KB


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"llm_int8_skip_modules": ["(a+)+$"]}, "nested repetitions"),
        ({"llm_int8_skip_modules": ["(?:a|aa)*b"]}, "nested repetitions"),
        ({"llm_int8_skip_modules": [".*.*.*.*.*.*.*.*.*.*x"]}, "steps for the path of one module"),
        ({"llm_int8_skip_modules": ["a?" * 40 + "x"]}, "steps for the path of one module"),
        ({"llm_int8_skip_modules": ["(" * 50 + ")" * 49]}, "no regular expression"),
        ({"llm_int8_skip_modules": ["x" * 200_000 + "*"]}, "characters"),
        ({"bnb_4bit_quant_type": "os.system"}, "expected nf4 or fp4"),
        ({"bnb_4bit_compute_dtype": "hub"}, "expected a dtype of torch"),
        ({"llm_int8_threshold": float("nan")}, "expected a finite number"),
        ({"llm_int8_threshold": 10**400}, "expected a number up to"),
        ({"quant_method": "compressed-tensors"}, "load_in_4bit or load_in_8bit is set"),
        ({"more": json.loads("[" * 60 + "1" + "]" * 60)}, "nested more than"),
    ],
)
def test_configurations_that_lie(copy, whole, fields, match):
    refused(copy("nf4", **fields), whole["nf4 adapter"], match)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"quant_method": "gptq", "bits": 10**12}, "bits is 1000000000000"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size is 0"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:(a+)+$": {"bits": 8}}}, "nested repetitions"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*down.*": {"bits": -1}}}, "bits is -1"),
        ({"quant_method": "awq", "bits": 4, "group_size": -7}, "group_size is -7"),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4.5}}}, "nbits is 4.5"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [10**12, 128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "rows and columns of a block"),
        ({"quant_method": "fp8", "modules_to_not_convert": ["(?:.*a){20}"]}, "nested repetitions"),
        ({"quant_method": "compressed-tensors", "format": "folder/file.py:Name"}, "expected a name"),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"a": {"type": "/tmp/x.py:C", "apply": []}}},
            "transform_config.a.type",
        ),
        ({"quant_method": "compressed-tensors", "ignore": ["re:(x+x+)+y"]}, "nested repetitions"),
        ({"quant_method": "torchao", "quant_type": {"default": "int8"}}, "quant_type"),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8DynActInt4WeightLinear"}}},
            "expected a configuration of torchao",
        ),
        (
            {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "FqnToConfig", "_data": {"fqn_to_config": {"re:(a+)+b": None}}}},
            },
            "nested repetitions",
        ),
    ],
)
def test_configurations_of_every_method_that_lie(fields, match):
    with pytest.raises(CheckpointError, match=match):
        check_quantisation(fields, "the folder")


@pytest.mark.parametrize(
    "fields",
    [
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128}}},
            "ignore": ["lm_head", "re:.*mlp.gate$", r"re:model\.layers\.\d+\.mlp\.experts\.\d+\..*"],
            "version": "0.9.1.dev3+gabcdef",
        },
        {"quant_method": "gptq", "bits": 4, "group_size": -1, "dynamic": {r"+:.*\.(?:gate|up)_proj.*": {"bits": 8}}},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": None},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["model.layers.0.a"] * 900},
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
    ],
)
def test_configurations_as_people_have_them_are_taken(fields):
    check_quantisation(fields, "the folder")


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({STATE: state(shape=[64, 128 << 20])}, "its weight has 4,096 bytes"),
        ({STATE: state(shape=[-64, -128])}, r"shape is \[-64, -128\]"),
        ({STATE: state(shape=[2**62, 4])}, "shape is"),
        ({STATE: state(shape=None)}, "shape is None"),
        ({STATE: state(blocksize=1)}, "blocksize is 1"),
        ({STATE: state(blocksize=0)}, "blocksize is 0"),
        ({STATE: state(blocksize=32)}, "absmax has 128 numbers in uint8; expected 256"),
        ({STATE: state(nested_blocksize=-1)}, "nested_blocksize is -1"),
        ({STATE: state(nested_blocksize=32)}, "nested_absmax has 1 numbers"),
        ({STATE: state(nested_offset=float("nan"))}, "nested_offset is nan"),
        ({STATE: state(dtype="hub")}, "dtype is 'hub'"),
        ({STATE: state(quant_type="fp4")}, "quant_type is 'fp4'"),
        ({STATE: state(absmax=[1.0])}, r"its state holds \['absmax'\]"),
        ({STATE: torch.tensor(list(b"[" * 3000), dtype=torch.uint8)}, "no JSON"),
        ({STATE: torch.zeros(1 << 20, dtype=torch.uint8)}, "expected JSON of at most 4,096 bytes"),
        ({STATE: torch.zeros(200)}, "expected JSON of at most 4,096 bytes|its state is"),
        ({STATE.replace("nf4", "int3"): state(), STATE: None}, "quant_type is 'nf4' in"),
        ({f"{LAYER}.weight.absmax": torch.zeros(1, dtype=torch.uint8)}, "absmax has 1 numbers"),
        ({f"{LAYER}.weight.absmax": None}, "lacks weight.absmax"),
        ({f"{LAYER}.weight.quant_map": torch.zeros(2)}, "quant_map has 2 numbers"),
        ({f"{LAYER}.weight.nested_quant_map": torch.zeros(16)}, "nested_quant_map has 16 numbers"),
        ({f"{LAYER}.weight.nested_absmax": torch.zeros(0)}, "nested_absmax has 0 numbers"),
        ({f"{LAYER}.weight": torch.zeros(8, 1, dtype=torch.uint8)}, "its weight has 8 bytes"),
    ],
)
def test_states_that_lie_to_native_code(copy, whole, tensors, match):
    folder = copy("nf4")
    change(folder, **tensors)
    refused(folder, whole["nf4 adapter"], match)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({f"{LAYER}.SCB": torch.zeros(3)}, "SCB has 3 numbers in float32; expected 64"),
        ({f"{LAYER}.SCB": torch.zeros(64, dtype=torch.float16)}, "SCB has 64 numbers in float16"),
        ({f"{LAYER}.weight": torch.zeros(64 * 128, dtype=torch.int8)}, "its weight is"),
    ],
)
def test_scales_of_eight_bits_that_do_not_fit(copy, whole, tensors, match):
    folder = copy("int8")
    change(folder, **tensors)
    refused(folder, whole["int8 adapter"], match)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("onto", ["dequantised", "quantised"])
def test_scales_that_are_not_finite_are_not_merged(copy, whole, onto, value):
    """Whether the adapter changes the weight or not, the base's tensor is named."""
    folder = copy("int8")
    change(folder, **{f"{LAYER}.SCB": torch.full((64,), value)})
    adapter = folder.parent / "adapter"
    save_adapted(whole["int8"], adapter, targets=("q_proj",))
    for chosen in (adapter, whole["int8 adapter"]):
        with pytest.raises(CheckpointError, match=rf"{LAYER}.weight: the base model's own weight"):
            merge_checkpoint(chosen, folder.parent / "merged", base_model=folder, onto=onto)
    assert not (folder.parent / "merged").exists()


def test_packed_weights_of_another_shape_than_their_layers_are_refused_as_they_are_loaded(copy):
    folder = copy("torchao int8")
    whole = load_file(folder / "model.safetensors")
    for part, tensor, match in (
        ("qdata", whole[f"{LAYER}._weight_qdata"][None], r"it is \(1, 64, 128\); expected"),
        ("scale", whole[f"{LAYER}._weight_scale"][:1], "its scale has 1 numbers; expected 64"),
    ):
        change(folder, **whole | {f"{LAYER}._weight_{part}": tensor})
        with pytest.raises(CheckpointError, match=rf"not whole:\s.*{LAYER}: {match}"):
            load_model(folder, device=torch.device("cpu"))


def test_states_that_lie_are_refused_without_a_folder_to_look_into(copy, monkeypatch):
    """Those of the hub are there when they are loaded."""
    folder = copy("nf4")
    change(folder, **{STATE: state(blocksize=32)})
    monkeypatch.setattr(quantized, "check_packed_folder", lambda folder: None)
    with pytest.raises(CheckpointError, match=rf"{LAYER}: it has 128 scales; expected 256"):
        load_model(folder, device=torch.device("cpu"))


@pytest.mark.parametrize(("form", "lost"), [("nf4", (STATE,)), ("int8", (f"{LAYER}.SCB", f"{LAYER}.weight_format"))])
@pytest.mark.parametrize("looked", [True, False])
def test_packed_weights_without_what_they_were_packed_with(copy, monkeypatch, form, lost, looked):
    folder = copy(form)
    change(folder, **dict.fromkeys(lost))
    if not looked:
        monkeypatch.setattr(quantized, "check_packed_folder", lambda folder: None)
    with pytest.raises(CheckpointError, match=r"missing|automatic conversion of the weights"):
        load_model(folder, device=torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"without what they were packed with|cannot be read as"):
        BaseCheckpoint(folder, dequantise=True).read(f"{LAYER}.weight")


def test_a_merge_does_not_fetch_kernels(whole, tmp_path):
    """bitsandbytes asks the hub for one and runs it, as it is imported, wherever `kernels` is installed."""
    (tmp_path / "kernels.py").write_text(f"def get_kernel(*a, **k):\n    open({str(tmp_path / 'owned')!r}, 'w')\n")
    code = (
        "import sys; from pathlib import Path; from theodora.files.base_model import BaseCheckpoint; "
        "base = BaseCheckpoint(Path(sys.argv[1]), dequantise=True); base.read(sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(whole["nf4"]), f"{LAYER}.weight"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=120)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("quantization", "match"),
    [([1], "expected an object"), ({"quant_method": "theodora-float8"}, "not read one by one")],
)
def test_what_is_no_configuration_or_stands_for_what_no_folder_holds(copy, whole, quantization, match):
    folder = copy("nf4")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=match):
        merge_checkpoint(whole["nf4 adapter"], folder.parent / "merged", base_model=folder, onto="dequantised")
    with pytest.raises(CheckpointError):
        load_model(folder, device=torch.device("cpu"))


def test_an_empty_configuration_is_refused_alike_by_all(copy, whole):
    folder = copy("nf4")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    told = "quantization_config: {}.*take that field out"
    for onto in ("original", "dequantised", "quantised"):
        with pytest.raises(CheckpointError, match=told):
            merge_checkpoint(whole["nf4 adapter"], folder.parent / "merged", base_model=folder, onto=onto)
    for adapted in (False, True):
        with pytest.raises(CheckpointError, match=told):
            load_model(folder, device=torch.device("cpu"), adapted=adapted)
