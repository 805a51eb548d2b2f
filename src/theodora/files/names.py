"""What the files of an adapter are called, and what its keys begin with."""

from __future__ import annotations

KEY_PREFIX = "base_model.model."

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MLX_WEIGHTS_NAME = "adapters.safetensors"
