"""What base an adapter was trained on, as its file remembers it beside PEFT's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KINDS = ("nf4", "int8", "int4", "fp8")
"""What `quantize` can make of a base as it is loaded."""
DTYPES = ("float32", "bfloat16", "float16")
"""Of the weights that it is made from."""
TRAINED_ON_KEY = "base"
"""Within the metadata of the file."""
_LONGEST = 400


@dataclass(frozen=True)
class TrainedOn:
    """The base under an adapter while it was trained."""

    model: str | None = None
    """Folder or hub name."""
    revision: str | None = None
    """Its commit on the hub."""
    quantization: str | None = None
    """How its weights were stored, in words: "bitsandbytes nf4, double-quantised"; None for plain ones."""
    quantize: str | None = None
    """The kind (`KINDS`) that it was quantised to as it was loaded; None for plain weights, and for a folder that holds
    quantised ones."""
    dtype: str | None = None
    """What its weights were rounded to before `quantize` put them into few bits, on which these depend a little:
    "bfloat16". None where no kind is named."""

    def to_json(self) -> dict[str, str]:
        """Fit for the metadata of a file."""
        return {name: value for name, value in vars(self).items() if value is not None}


def trained_on(metadata: Mapping[str, Any]) -> TrainedOn | None:
    """What the metadata of an adapter's file says; None if it says nothing, or nonsense."""
    said = metadata.get(TRAINED_ON_KEY)
    if not isinstance(said, dict):
        return None
    texts = {name: said.get(name) for name in ("model", "revision", "quantization", "quantize", "dtype")}
    known = {n: v for n, v in texts.items() if isinstance(v, str) and v.isprintable() and len(v) <= _LONGEST}
    if known.get("quantize") not in KINDS:
        known.pop("quantize", None)
    if known.get("dtype") not in DTYPES or "quantize" not in known:
        known.pop("dtype", None)
    return TrainedOn(**known) if known else None
