"""Which weights an adapter is merged onto, where its base was quantised while it was trained.

original      the full-precision weights that the base was quantised from (the default)
dequantised   the numbers that training multiplied by, written as an ordinary model
quantised     the same, quantised again in the folder's own format
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from theodora.errors import CheckpointError, ConfigError, shown
from theodora.files.adapter import AdapterFile
from theodora.files.base_model import BaseCheckpoint, find_base, read_config
from theodora.files.folder import read_file
from theodora.files.packed import method_of, why_not_written
from theodora.files.quantised_store import OWN_FLOAT8, quantisation_of
from theodora.files.trained_on import KINDS

Onto = Literal["original", "dequantised", "quantised"]
_WAYS = (
    "There are three ways: --onto original with --base-model and the unquantised model; --onto dequantised, an "
    "ordinary model of the numbers that the adapter was trained on; --onto quantised, in the same format again."
)
# torchao's Int4WeightOnlyConfig as transformers writes it: the one layout whose kernels come with torch itself.
_INT4: dict[str, Any] = {
    "_type": "Int4WeightOnlyConfig",
    "_version": 2,
    "_data": {
        "group_size": 128,
        "int4_choose_qparams_algorithm": {"_type": "Int4ChooseQParamsAlgorithm", "_data": "TINYGEMM"},
        "int4_packing_format": "tile_packed_to_4d",
        "int4_tile_packed_ntile": 8,
        "set_inductor_config": True,
    },
}
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---", re.DOTALL)
_BASE_OF_CARD = re.compile(r"^base_model:[ \t]*(?:\n[ \t]*-)?[ \t]*[\"']?([\w.~/-]+)[\"']?[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Start:
    """Where a merge begins."""

    onto: Onto
    name: str
    """Folder or hub name of the weights that are merged onto."""
    folder: Path
    quantised_as: dict[str, Any] | None
    """How weights of a plain folder are quantised as they are read."""
    method: str | None
    """How the base was quantised while the adapter was trained, in words; None if it was not, as far as is known."""
    trained: tuple[Path, dict[str, Any] | None] | None = None
    """For `original`: the folder, and what `quantised_as` is to be for it, that give the weights of the training."""
    notes: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    """What the weights of a plain folder are rounded to before they are quantised; None: they stay as they are."""

    @property
    def quantised(self) -> bool:
        """Whether the weights that are merged onto are quantised ones."""
        return self.onto != "original"

    def open(self, *, trust_remote_code: bool, heads: Mapping[str, Tensor] | None = None) -> BaseCheckpoint:
        """The weights that are merged onto; `heads` as of `BaseCheckpoint`."""
        return BaseCheckpoint(
            self.folder,
            trust_remote_code=trust_remote_code,
            dequantise=self.onto != "original",
            quantised_as=self.quantised_as,
            quantised_from=self.dtype,
            heads=heads,
        )

    def open_trained(
        self, *, trust_remote_code: bool, heads: Mapping[str, Tensor] | None = None
    ) -> BaseCheckpoint | None:
        """The weights that the adapter was trained on, where they are others."""
        if self.trained is None:
            return None
        folder, quantised_as = self.trained
        return BaseCheckpoint(
            folder,
            trust_remote_code=trust_remote_code,
            dequantise=True,
            quantised_as=quantised_as,
            quantised_from=self.dtype if quantised_as is not None else None,
            heads=heads,
        )


def as_onto(text: str) -> Onto:
    """One of the three ways by its name, in either spelling.

    Raises:
        ConfigError: it is none of them.
    """
    name = text.replace("quantized", "quantised")
    if name not in get_args(Onto):
        raise ConfigError(f"onto is {shown(text)}; expected one of {', '.join(get_args(Onto))}")
    return name  # pyright: ignore[reportReturnType]


def find_start(
    file: AdapterFile, onto: Onto, *, base_model: str | Path | None = None, quantize: str | None = None
) -> Start:
    """The weights to merge onto.

    Args:
        file: the adapter, which remembers its base.
        onto: which of the three.
        base_model: the base's folder or hub name, if the adapter's is not to count.
        quantize: how the base was quantised as it was loaded for the training: nf4, int8, int4 or fp8. Default: as the
            adapter remembers.

    Raises:
        CheckpointError: they are not at hand; naming the three ways.
        ConfigError: nothing says how the base was quantised, or `quantize` is none of the kinds.
    """
    if quantize is not None and quantize not in KINDS:
        raise ConfigError(f"quantize is {shown(quantize)}; expected one of {', '.join(KINDS)}")
    name = str(base_model or file.base_model or "")
    folder = find_base(name, revision=None if base_model else file.base_revision, download=True)
    stored = quantisation_of(read_config(folder))
    if stored is not None and quantize is not None:
        raise ConfigError(f"quantize is {quantize}, but {name} is quantised already ({method_of(stored)})")
    if onto == "quantised" and stored is not None and (told := why_not_written(stored)) is not None:
        raise ConfigError(
            f"onto is quantised, but {name} is in {told}. Merge with --onto dequantised, or onto the original weights."
        )
    remembered = file.trained_on
    kind = quantize or (remembered.quantize if remembered is not None else None)
    rounded = remembered.dtype if remembered is not None and kind == remembered.quantize else None
    dtype = None if rounded is None else getattr(torch, rounded)
    if onto == "original":
        return _original(file, name, folder, stored, kind, dtype, given=base_model is not None)
    if stored is not None:
        return Start(onto, name, folder, None, method_of(stored))
    if kind is None:
        raise ConfigError(
            f"onto is {onto}, but {name} is not quantised, and the adapter does not say that its base was. Leave "
            "--onto out, give the quantised folder with --base-model, or say with --quantize (nf4, int8, int4, fp8) "
            "how the base was quantised as it was loaded."
        )
    config = quantisation_config(kind, dtype or _dtype_of(folder))
    if onto == "quantised" and kind == "fp8":
        raise ConfigError(
            "onto is quantised, but the base was in Theodora's own float8, which no folder stores. Merge with --onto "
            "dequantised, or onto the original weights."
        )
    return Start(onto, name, folder, config, _told(kind, config), dtype=dtype)


def quantisation_config(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """What `--quantize KIND` means, as a config.json has it.

    Args:
        kind: nf4, int8, int4 or fp8.
        dtype: of the model, in which its products are computed.
    """
    compute = str(dtype).removeprefix("torch.")
    if kind == "fp8":
        return {"quant_method": OWN_FLOAT8}
    if kind == "int4":
        return {"quant_method": "torchao", "quant_type": {"default": copy.deepcopy(_INT4)}}
    fields: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": kind == "nf4"}
    fields |= {"load_in_8bit": kind == "int8", "llm_int8_threshold": 6.0}
    if kind == "nf4":
        fields |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute}
    return fields


def original_of(folder: Path) -> str | None:
    """The model that a quantised folder was made from, as its model card or its configuration names it."""
    try:
        card = read_file(folder / "README.md").decode("utf-8", errors="replace")
    except (OSError, CheckpointError):
        card = ""
    front = _FRONT.match(card)
    found = _BASE_OF_CARD.search(front.group(1)) if front else None
    if found:
        return found.group(1)
    named = read_config(folder).get("_name_or_path")
    return named if isinstance(named, str) and named and Path(named).expanduser().absolute() != folder else None


def _original(
    file: AdapterFile,
    name: str,
    folder: Path,
    stored: Mapping[str, Any] | None,
    kind: str | None,
    dtype: torch.dtype | None,
    *,
    given: bool,
) -> Start:
    if stored is not None:
        if given:
            raise CheckpointError(f"--base-model {name} is quantised ({method_of(stored)}), not the original. {_WAYS}")
        original = original_of(folder)
        if original is None:
            raise CheckpointError(
                f"The adapter was trained on {name}, which is quantised ({method_of(stored)}) and does not say which "
                f"model it was made from. {_WAYS}"
            )
        try:
            plain = find_base(original, download=True)
            again = quantisation_of(read_config(plain))
        except CheckpointError as error:
            raise CheckpointError(
                f"The adapter was trained on {name}, which is quantised ({method_of(stored)}) and was made from "
                f"{original}; that is not at hand: {error} {_WAYS}"
            ) from error
        if again is not None:
            raise CheckpointError(
                f"{name} was made from {original}, which is quantised, too ({method_of(again)}). {_WAYS}"
            )
        note = f"The adapter was trained on {name} ({method_of(stored)}); it is merged onto {original}, its original."
        return Start("original", original, plain, None, method_of(stored), (folder, None), (note,))
    if given and (trained := quantised_base(file)) is not None:
        return Start("original", name, folder, None, *trained)
    if kind is None:
        return Start("original", name, folder, None, None)
    config = quantisation_config(kind, dtype or _dtype_of(folder))
    return Start("original", name, folder, None, _told(kind, config), (folder, config), dtype=dtype)


def quantised_base(file: AdapterFile) -> tuple[str, tuple[Path, None]] | None:
    """How the base that an adapter names is quantised, and its folder; None if it is plain, or not at hand."""
    try:
        folder = find_base(file.base_model, revision=file.base_revision)
        stored = quantisation_of(read_config(folder))
    except CheckpointError:
        return None
    return None if stored is None else (method_of(stored), (folder, None))


def _dtype_of(folder: Path) -> torch.dtype:
    config = read_config(folder)
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _told(kind: str, config: Mapping[str, Any]) -> str:
    return "float8 by rows" if kind == "fp8" else method_of(config)
