"""What the files of an adapter are called, and the names within them."""

from __future__ import annotations

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MLX_WEIGHTS_NAME = "adapters.safetensors"

KEY_PREFIX = "base_model.model."
"""What PEFT's keys of tensors begin with."""
METADATA_KEY = "theodora"
"""In the header of a safetensors file: what we store beside PEFT's tensors."""
FINGERPRINT_KEY = "probe"
"""Within that metadata: the fingerprint of the base (`fingerprint.py`), under the name that it has in old files."""
