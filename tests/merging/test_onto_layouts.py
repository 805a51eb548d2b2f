"""Adapters of GPTQ, AWQ and compressed-tensors folders, merged onto the dequantised weights.

The libraries are not beside the tests: `make test-quantisers` runs what needs them. GPTQ is plain torch here, and a
folder of it is packed by hand.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantised import logits_of, save_plain
from theodora.adapters import inject_adapter, save_adapter
from theodora.config import AdapterConfig
from theodora.errors import CheckpointError, ConfigError
from theodora.files.base_model import BaseCheckpoint
from theodora.files.packed_layouts import check_layout_folder
from theodora.merging import merge_checkpoint

GROUP = 32
NAMES = ("gate_proj", "up_proj", "down_proj")


def packed_words(codes_NI, bits):
    """Whole numbers (N, I) in the words of 32 bits that GPTQ stores, (N, ⌈I·bits/32⌉), number by number."""
    rows = []
    for row in codes_NI.tolist():
        stream = sum(int(code) << (bits * at) for at, code in enumerate(row))
        words = [(stream >> (32 * at)) & 0xFFFFFFFF for at in range(-(-len(row) * bits // 32))]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def packed_gptq(w_OI, bits, *, first, order):
    """The tensors of one weight, and the numbers that they stand for."""
    outputs, inputs = w_OI.shape
    g_idx = torch.arange(inputs) // GROUP
    g_idx = g_idx[torch.randperm(inputs)] if order else g_idx
    scales, zeros, q = [], [], torch.zeros(outputs, inputs, dtype=torch.long)
    for group in range(inputs // GROUP):
        some = w_OI[:, g_idx == group]
        scale = ((some.amax(1) - some.amin(1)) / (2**bits - 1)).half().float()
        zero = (-some.amin(1) / scale).round().clamp(1, 2**bits - 1)
        q[:, g_idx == group] = (some / scale[:, None] + zero[:, None]).round().clamp(0, 2**bits - 1).long()
        scales.append(scale)
        zeros.append(zero)
    scales, zeros = torch.stack(scales), torch.stack(zeros)
    dense = (q - zeros.long()[g_idx].T) * scales[g_idx].T
    parts = {
        "qweight": packed_words(q, bits).T.contiguous(),
        "qzeros": packed_words(zeros - int(first), bits),
        "scales": scales.half(),
        "g_idx": g_idx.to(torch.int32),
    }
    return parts, dense


def gptq_folder(folder, bits=4, checkpoint_format="gptq", order=False):
    """A tiny Llama whose MLP is in GPTQ, and the same with plain weights of the same numbers."""
    plain = save_plain(folder / "plain", dtype=torch.float32)
    tensors = load_file(plain / "model.safetensors")
    torch.manual_seed(0)
    packed = dict(tensors)
    for key in [key for key in tensors if any(name in key for name in NAMES)]:
        parts, dense = packed_gptq(packed.pop(key), bits, first=checkpoint_format == "gptq", order=order)
        packed |= {f"{key.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}
        tensors[key] = dense.half().float()  # (scales are float16, and so are the products)
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    quantised = Path(shutil.copytree(plain, folder / "quantised"))
    save_file(packed, quantised / "model.safetensors", {"format": "pt"})
    told = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": order, "sym": False}
    say(quantised, quantization_config={**told, "checkpoint_format": checkpoint_format})
    return plain, quantised


def say(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def adapter_of(plain, base, folder, targets=NAMES):
    """An adapter with random weights that says that it was trained on `base`, and the logits of the two."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plain)
    inject_adapter(model, AdapterConfig(method="dora", rank=4, targets=targets))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.15 * torch.randn(parameter.shape))
        logits = model(tokens()).logits
    save_adapter(model, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))
    return logits


def tokens():
    return torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("bits", "checkpoint_format", "order"),
    [(4, "gptq", False), (4, "gptq_v2", True), (3, "gptq", False), (8, "gptq", False), (2, "gptq", True)],
)
def test_gptq_onto_the_dequantised_weights(tmp_path, bits, checkpoint_format, order):
    plain, base = gptq_folder(tmp_path, bits, checkpoint_format, order)
    read, numbers = BaseCheckpoint(base, dequantise=True), BaseCheckpoint(plain)
    assert set(read.tensors) == set(numbers.tensors)
    for key in numbers.tensors:
        assert torch.equal(read.read(key), numbers.read(key)), key
    logits = adapter_of(plain, base, tmp_path / "adapter")
    report = merge_checkpoint(tmp_path / "adapter", tmp_path / "merged", onto="dequantised")
    assert len(report.layers) == 6
    assert report.layers[0].error < 1e-6
    assert report.logits is not None
    assert report.logits.kl_mean < 1e-9 < report.logits.kl_effect
    assert not report.notes
    assert report.quantisation == "gptq"
    assert (logits_of(tmp_path / "merged") - logits).abs().max() < 1e-5 * logits.abs().max()


def test_gptq_is_not_quantised_again(tmp_path):
    plain, base = gptq_folder(tmp_path)
    adapter_of(plain, base, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"found by calibration.*--onto dequantised"):
        merge_checkpoint(tmp_path / "adapter", tmp_path / "merged", onto="quantised")


# Tensors that do not fit ---------------------------------------------------------------------------------------------

KEY = "model.layers.1.mlp.up_proj"
LIES = {
    "a qweight that is cut short": (lambda t: {"qweight": t["qweight"][:-1]}, "its qweight has the shape"),
    "scales of fewer groups": (lambda t: {"scales": t["scales"][:1]}, "its scales has the shape"),
    "scales of fewer outputs": (lambda t: {"scales": t["scales"][:, :-8]}, "its scales has the shape"),
    "zeros of fewer outputs": (lambda t: {"qzeros": t["qzeros"][:, :-1]}, "its qzeros has the shape"),
    "groups that have no scales": (
        lambda t: {"g_idx": t["g_idx"] + 1},
        "its g_idx names groups from 1 to 2; expected 0 to 1",
    ),
    "groups before the first": (lambda t: {"g_idx": t["g_idx"] - 1}, "its g_idx names groups from -1 to 0"),
    "numbers of another kind": (lambda t: {"qweight": t["qweight"].float()}, "its qweight is float32; expected int32"),
    "no zeros": (lambda t: {"qzeros": None}, "it lacks qzeros"),
}


def lie(folder, change, key=KEY):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in change({n: tensors[f"{key}.{n}"] for n in ("qweight", "qzeros", "scales", "g_idx")}).items():
        del tensors[f"{key}.{name}"]
        if tensor is not None:
            tensors[f"{key}.{name}"] = tensor.contiguous()
    save_file(tensors, path, {"format": "pt"})


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("which", LIES)
def test_gptq_that_is_not_whole_is_refused_before_it_is_read(tmp_path, which):
    _, base = gptq_folder(tmp_path)
    check_layout_folder(base, config_of(base))
    change, told = LIES[which]
    lie(base, change)
    with pytest.raises(CheckpointError, match=f"not whole:\\n.*{KEY}: {told}"):
        check_layout_folder(base, config_of(base))
    with pytest.raises(CheckpointError, match=told):
        BaseCheckpoint(base, dequantise=True).read(f"{KEY}.weight")


def test_gptq_of_another_shape_than_the_models_is_refused(tmp_path):
    _, base = gptq_folder(tmp_path)
    lie(base, lambda t: {"qweight": t["qweight"][:, :64], "scales": t["scales"][:, :64], "qzeros": t["qzeros"][:, :8]})
    check_layout_folder(base, config_of(base))  # it is whole, by itself
    with pytest.raises(CheckpointError, match=r"qweight has the shape \(8, 64\); expected \(8, 128\)"):
        BaseCheckpoint(base, dequantise=True).read(f"{KEY}.weight")


INT, HALF = torch.int32, torch.float16
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": False}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}
EIGHT = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
INT8 = PACKED | {"format": "int-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": EIGHT}}}


@pytest.mark.parametrize(
    ("config", "whole", "damaged", "told"),
    [
        (AWQ, {"qweight": (64, 12), "qzeros": (2, 12), "scales": (2, 96)}, {"qweight": (64, 11)}, "its qweight has"),
        (AWQ, {"qweight": (64, 12), "qzeros": (2, 12), "scales": (2, 96)}, {"scales": (1, 96)}, "its scales has"),
        (AWQ, {"qweight": (64, 12), "qzeros": (2, 12), "scales": (2, 96)}, {"qzeros": (2, 8)}, "its qzeros has"),
        (
            PACKED,
            {"weight_packed": (96, 8), "weight_scale": (96, 2), "weight_zero_point": (12, 2)},
            {"weight_packed": (96, 7)},
            "its weight_packed has",
        ),
        (
            PACKED,
            {"weight_packed": (96, 8), "weight_scale": (96, 2), "weight_zero_point": (12, 2)},
            {"weight_zero_point": (11, 2)},
            "its weight_zero_point has",
        ),
        (
            PACKED,
            {"weight_packed": (96, 8), "weight_scale": (96, 2), "weight_zero_point": (12, 2)},
            {"weight_shape": (96, 96)},
            "its weight_packed has",
        ),
        (INT8, {"weight": (96, 64), "weight_scale": (96, 1)}, {"weight_scale": (95, 1)}, "its weight_scale has"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, config, whole, damaged, told):
    sizes = whole | {"weight_shape": (96, 64)} if "weight_packed" in whole else whole
    save_parts(tmp_path, sizes)
    check_layout_folder(tmp_path, config)
    save_parts(tmp_path, sizes | damaged)
    with pytest.raises(CheckpointError, match=f"x.proj: {told}"):
        check_layout_folder(tmp_path, config)


def save_parts(folder, sizes):
    kinds = {"scales": HALF, "weight_scale": HALF, "weight": torch.int8}
    tensors = {name: torch.zeros(size, dtype=kinds.get(name, INT)) for name, size in sizes.items()}
    if "weight_shape" in sizes:
        tensors["weight_shape"] = torch.tensor(sizes["weight_shape"])
    named = {f"x.proj.{name}": tensor for name, tensor in tensors.items()}
    save_file(named | {"x.norm.weight": torch.ones(4), "x.act.scales": torch.ones(4)}, folder / "model.safetensors")
