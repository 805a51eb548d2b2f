"""Adapters on disk that change what their model says, for the tests of exports."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from theodora import AdapterConfig, inject_adapter, save_adapter


def adapter_folder(path: Path, base: Path, *, size: float = 0.1, seed: int = 5, **config: Any) -> Path:
    """Save an adapter for the model in `base`, every tensor of it moved by about `size`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    inject_adapter(model, AdapterConfig(**{"method": "dora", "rank": 4, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("magnitude"):
                parameter.mul_(1 + size * noise)
            elif name.endswith("lora_B"):
                parameter.add_(size * noise)
    save_adapter(model, path)
    config_path = path / "adapter_config.json"
    settings = json.loads(config_path.read_text()) | {"base_model_name_or_path": str(base)}
    config_path.write_text(json.dumps(settings))
    return path


def write_llama(writer: Any, vocabulary: int) -> None:
    """Add the tensors of a llama of one layer and width 32 to a `gguf.GGUFWriter`, and write its file."""
    shapes = {"token_embd.weight": (vocabulary, 32), "output_norm.weight": (32,), "output.weight": (vocabulary, 32)}
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{part}.weight"] = (32, 32)
    shapes |= {"blk.0.attn_norm.weight": (32,), "blk.0.ffn_norm.weight": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
