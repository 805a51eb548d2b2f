"""Tiny models that a library has quantised, saved as transformers saves them, and adapters trained (at random) on them.

Sizes are multiples of 64: on the CPU bitsandbytes 0.50.2 dequantises rows that are no multiple of its block wrongly.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import tiny
from theodora.adapters import inject_adapter, save_adapter
from theodora.adapters.models import load_model
from theodora.config import AdapterConfig

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "gpt2": {"n_embd": 64, "n_inner": 128},
}
FORMATS: dict[str, Any] = {
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "fp4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32
    ),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao float8": lambda: TorchAoConfig(Float8WeightOnlyConfig()),
    "torchao int4": lambda: TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
}
"""Format -> transformers' configuration."""
ERRORS = {"nf4": 0.1, "fp4": 0.13, "int8": 0.008, "torchao int8": 0.008, "torchao float8": 0.03, "torchao int4": 0.11}
"""Format -> what rounding normal weights to it makes, at most, relative to their norm."""


def save_plain(folder: Path, family: str = "llama", **config: Any) -> Path:
    """A tiny model with its tokenizer."""
    tiny.tiny_model(family, **SIZES[family], **config).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


def save_quantised(plain: Path, folder: Path, form: str) -> Path:
    """The same quantised, which names the plain one in its model card as such folders do."""
    AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=FORMATS[form](), dtype=torch.float32
    ).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(f"---\nlibrary_name: transformers\nbase_model: {plain}\n---\n")
    return folder


def save_adapted(
    base: Path,
    folder: Path,
    *,
    quantize: str | None = None,
    dtype: str = "float32",
    size: float = 0.15,
    **config: Any,
) -> torch.Tensor:
    """Save an adapter with random weights that was put on the base; gives the logits of both after `tokens()`."""
    model = load_model(str(base), dtype=dtype, quantize=quantize, adapted=True)
    inject_adapter(model, AdapterConfig(**{"rank": 4, **config}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, folder)
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(base)
    with torch.no_grad():
        return model(tokens()).logits


def tokens() -> torch.Tensor:
    """Two rows of twelve."""
    return torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(0))


def logits_of(folder: Path) -> torch.Tensor:
    """What the model in a folder predicts, loaded by transformers with nothing missing and nothing left."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        return model.eval()(tokens()).logits
