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
from theodora.errors import ConfigError
from theodora.files.base_model import BaseCheckpoint
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
