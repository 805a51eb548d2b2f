"""Whether a configuration asks for a model that the files beside it could fill, before memory is taken.

Building a model takes memory for each layer, each expert and each row, so that one number in config.json could fill
any machine; which number that is differs from family to family. So there are two bounds. Numbers that count layers are
checked before transformers reads them, wherever they stand in the file. While a model is built, its modules and
parameters are counted. Both limits come from the weights that are there.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from theodora.errors import CheckpointError, shown

# What the configurations of language models call the number of layers; each has tensors.
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Names of other numbers that count parts, in any family; and of those that only look so: sizes and ids.
_COUNTS = re.compile(r"layer|block|depth|stage|expert|stack|level|group|repeat", re.IGNORECASE)
_NO_COUNTS = re.compile(
    "size|dim|eps|norm|window|scale|drop|init|coef|theta|id$|idx|ind(ex|ic)|token|length|interval|vocab"
)
_ALWAYS_FINE = 1 << 16
"""Up to so many parts a configuration may name whatever the files hold: the counts below bound what they take."""
_SPARE_MODULES, _MODULES_PER_TENSOR = 5_000, 20  # activations, norms and containers have modules and no tensors
# A model is built twice where its first class misses something, and a parameter is set again when it is loaded.
_SPARE_PARAMETERS, _PARAMETERS_PER_TENSOR = 1_000, 10
_SPARE_VALUES, _VALUES_PER_BYTE = 1 << 28, 16  # weights of four bits: two values a byte
_TOLD = 4


@dataclass(frozen=True)
class Stored:
    """What the weight files of a folder hold."""

    tensors: int
    size: int
    """Bytes of the files."""
    hqq: bool = False
    """Whether HQQ has packed weights in them."""


def stored_in(folder: Path) -> Stored:
    """What the safetensors files of a model folder hold; one that cannot be read holds nothing.

    The library reads their headers, as it does when transformers loads them: it knows kinds of numbers (F4, F6) that
    our own reader refuses.
    """
    tensors, size, hqq = 0, 0, False
    for file in sorted(file for file in folder.glob("*.safetensors") if file.is_file()):
        try:
            with safe_open(file, framework="pt") as opened:
                keys = opened.keys()
                tensors, hqq = tensors + len(keys), hqq or any(key.endswith(".W_q") for key in keys)
                size += file.stat().st_size
        except (SafetensorError, OSError):
            continue  # a stray file; transformers says so if it is one of the model's
    return Stored(tensors, size, hqq)


def check_layers(folder: str | Path, config: Mapping[str, Any], stored: int) -> None:
    """Raise a CheckpointError if a configuration speaks of more layers than the files hold tensors.

    Args:
        folder: for the message.
        config: config.json.
        stored: tensors in the files.
    """
    for name, count in _numbers(config):
        part, _, field = name.rpartition(".")
        if field in _LAYER_COUNTS and part in ("", "text_config"):
            most = stored
        elif _COUNTS.search(name) and not _NO_COUNTS.search(field):
            most = max(stored, _ALWAYS_FINE)
        else:
            continue
        if count > most:
            raise CheckpointError(
                f"{folder}/config.json says {name}: {shown(count)}, but the weights hold only {stored:,} tensors."
            )


@contextmanager
def bounded_build(folder: str | Path, config: Mapping[str, Any], stored: Stored) -> Iterator[None]:
    """Within it this thread can build no model that the stored tensors could not fill.

    Raises:
        CheckpointError: as soon as there are more modules or parameters than that, naming the largest numbers of the
            configuration.
    """
    thread = threading.get_ident()
    counted = {"modules": 0, "parameters": 0, "values": 0}
    most = {
        "modules": _SPARE_MODULES + _MODULES_PER_TENSOR * stored.tensors,
        "parameters": _SPARE_PARAMETERS + _PARAMETERS_PER_TENSOR * stored.tensors,
        "values": _SPARE_VALUES + _VALUES_PER_BYTE * stored.size,
    }

    def count(what: str, many: int = 1) -> None:
        counted[what] += many
        if counted[what] > most[what]:
            told = ", ".join(f"{name}: {shown(value)}" for name, value in _largest(config))
            raise CheckpointError(
                f"{folder}/config.json describes a model of more than {most[what]:,} {what}, but the weights hold only "
                f"{stored.tensors:,} tensors ({stored.size:,} bytes). Its largest numbers are {told}."
            )

    def on_module(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if threading.get_ident() == thread:
            count("modules")

    def on_parameter(parent: nn.Module, name: str, value: nn.Parameter | None) -> None:
        if threading.get_ident() == thread and value is not None:
            count("parameters")
            count("values", value.numel())

    def on_buffer(parent: nn.Module, name: str, value: Tensor | None) -> None:
        if threading.get_ident() == thread and value is not None:
            count("values", value.numel())

    hooks = [
        torch_modules.register_module_module_registration_hook(on_module),
        torch_modules.register_module_parameter_registration_hook(on_parameter),
        torch_modules.register_module_buffer_registration_hook(on_buffer),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _numbers(config: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number of a configuration with its dotted name; of a list the largest, or its length."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _numbers(value, f"{name}.{key}" if name else str(key))
    elif isinstance(config, list | tuple):
        whole = [value for value in config if isinstance(value, int)]
        yield name, max([*whole, len(config)])
        for value in config:
            if isinstance(value, Mapping | list | tuple):
                yield from _numbers(value, name)
    elif isinstance(config, int) and not isinstance(config, bool):
        yield name, config


def _largest(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The largest numbers, those that count parts first."""
    numbers = [(name, value) for name, value in _numbers(config) if not name.endswith(("_id", "_ids"))]
    return sorted(numbers, key=lambda number: (-number[1], not _COUNTS.search(number[0])))[:_TOLD]
