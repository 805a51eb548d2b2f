"""Merge back into the quantised format: dequantise, merge, quantise again, one weight at a time, and say what it cost.

What the adapter leaves alone is copied bit for bit. What it changes is quantised by the library as on loading, read
back, and held against the formula in float64: in a coarse format most of a small change falls below the steps between
two of its numbers, and is rounded away.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from theodora.errors import CheckpointError, ConfigError, bullet_list
from theodora.files.base_model import BaseCheckpoint
from theodora.files.finite import finite
from theodora.files.packed import bits_of
from theodora.files.quantised_store import QuantisedStore
from theodora.files.read_back import save_tensors
from theodora.merging.plan import MergePlan, OutputTensor

MAX_ERROR = {4: 0.2, 8: 0.05}
"""Bits of the format -> largest relative error of a layer. Rounding itself makes 0.09 (nf4), 0.12 (fp4, int4), 0.03
(float8) and 0.01 (int8); a magnitude that is left out makes 0.33."""
_LAYERS_TOLD = 8
_BASE_NOT_FINITE = (
    "the base model's own weight holds NaN or infinite values. Bring its file back as it was published. Nothing was "
    "written."
)


@dataclass(frozen=True)
class LayerError:
    """How far one merged weight is from the formula W', in float64; all in Frobenius norms."""

    path: str
    error: float
    """‖written − W'‖ / ‖W'‖."""
    change: float
    """‖W' − W‖ / ‖W'‖: what the adapter does to the layer."""
    norms: float = math.nan
    """Mean relative difference of the norms of the output rows."""

    @property
    def lost(self) -> float:
        """The error as a share of what the adapter changed; from 1 on nothing of it need be left."""
        return self.error / self.change if self.change else math.inf if self.error else 0.0


@dataclass
class Written:
    """The weight files of a merged model in a quantised format."""

    shards: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """File -> keys in it."""
    bytes: int = 0
    layers: list[LayerError] = field(default_factory=list[LayerError])


def write_requantised(
    folder: Path,
    base: BaseCheckpoint,
    plan: MergePlan,
    plain: Callable[[OutputTensor], Tensor],
    *,
    max_shard_size: str | int,
    max_error: float | None,
    done: Callable[[OutputTensor, tuple[Tensor, Tensor, Tensor] | None], None],
) -> Written:
    """Write the weight files of the merged model, in the format of its base.

    Args:
        folder: to write them to.
        base: the quantised base.
        plan: what the adapter changes.
        plain: gives a tensor that is not quantised, as it is written.
        max_shard_size: largest file.
        max_error: largest relative error of a layer. Default: by the format (`MAX_ERROR`).
        done: called after each tensor; with W, W' and what the written one stands for, where a quantised weight
            changed.

    Raises:
        CheckpointError: layers are further from the formula than that; with the worst of them.
    """
    store = base.quantised
    assert store is not None
    files = _Files(folder, shard_size(max_shard_size), store.packed.with_metadata)
    layers: list[LayerError] = []
    for output in plan.outputs:
        if output.key not in store.parameters:
            tensor = plain(output)
            files.add({output.key: tensor}, {output.key: json.dumps({"_type": "Tensor"})})
            done(output, None)
            continue
        weights = None
        parts = store.read_parts(output.key)
        if output.change is not None:
            weights, parts, error = _requantise(base, store, output, parts)
            layers.append(error)
        elif not all(finite(part) for part in parts.values() if part.is_floating_point()):
            raise CheckpointError(f"{output.key}: {_BASE_NOT_FINITE}")
        named = {store.part_key(output.key, part): tensor for part, tensor in parts.items()}
        files.add(named, store.packed.metadata_of(store.parameters[output.key]))
        done(output, weights)
    files.finish()
    layers.sort(key=lambda layer: -layer.error)
    bound = MAX_ERROR[bits_of(store.config)] if max_error is None else max_error
    if worse := [layer for layer in layers if not layer.error <= bound]:
        told = [f"{layer.path}: {layer.error:.1%} (the adapter changes it by {layer.change:.1%})" for layer in worse]
        raise CheckpointError(
            f"Quantised again ({store.packed.method}), {len(worse)} of {len(layers)} merged weights are more than "
            f"{bound:.3g} away from the formula, relative to their norm. Nothing was written. Merge with --onto "
            "dequantised or onto the original weights, or allow it with --max-error:" + bullet_list(told, _LAYERS_TOLD)
        )
    return Written(files.shards, files.bytes, layers)


def check_reads_again(folder: Path, base: BaseCheckpoint, *, trust_remote_code: bool) -> None:
    """Open what was written as a quantised folder, and see that each weight of the base is there, in its shape.

    Raises:
        CheckpointError: it is not.
    """
    written = BaseCheckpoint(folder, trust_remote_code=trust_remote_code, dequantise=True)
    assert base.quantised is not None
    assert written.quantised is not None
    lost = sorted(base.quantised.parameters.keys() ^ written.quantised.parameters.keys())
    lost += sorted(base.tensors.keys() - written.tensors.keys())
    for key in list(written.quantised.parameters)[:1]:
        written.read(key)
    written.close()
    if lost:
        raise CheckpointError("What was written does not read back right:" + bullet_list(lost, _LAYERS_TOLD))


def exact_weight(output: OutputTensor, stored: Tensor) -> Tensor:
    """W' in float64, in the layout of `stored`, the base weight."""
    return output.merged(stored.double())


def layer_error(path: str, stored: Tensor, exact: Tensor, written: Tensor, *, transposed: bool = False) -> LayerError:
    """The error of one written weight.

    Args:
        path: of the module.
        stored: the base weight.
        exact: W', float64.
        written: what is to be W'.
        transposed: whether all three are (in, out).
    """
    size, got = float(exact.norm()) or 1.0, written.double()
    change = float((exact - stored.double()).norm()) / size if stored.shape == exact.shape else math.nan
    norms = [weight.norm(dim=-2 if transposed else -1) for weight in (exact, got)]
    apart = ((norms[1] - norms[0]).abs() / norms[0].clamp_min(1e-30)).mean()
    return LayerError(path, float((got - exact).norm()) / size, change, float(apart))


def _requantise(
    base: BaseCheckpoint, store: QuantisedStore, output: OutputTensor, old: dict[str, Tensor]
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor], LayerError]:
    name = store.parameters[output.key]
    stored = store.dense(output.key, old)
    if not finite(stored):
        raise CheckpointError(f"{output.key}: {_BASE_NOT_FINITE}")
    exact = exact_weight(output, stored)
    if not bool(exact.isfinite().all()):
        raise CheckpointError(
            f"{output.key}: the merged weight holds NaN or infinite values, and the base's own does not: the adapter "
            "overflows. Nothing was written."
        )
    if exact.shape != stored.shape:
        raise CheckpointError(f"{output.key}: {tuple(exact.shape)} in the adapter, {tuple(stored.shape)} in the base")
    dtype = stored.dtype if store.stored else base.read_stored(output.key).dtype
    parts = store.pack(output.key, exact.to(dtype), old if store.stored else None)
    written = store.dense(output.key, parts)
    error = layer_error(name.removesuffix(".weight"), stored, exact, written, transposed=store.turned(output.key))
    return (stored, exact, written), parts, error


class _Files:
    """Weight files, filled one after the other; how many there are is known at the end, when they get their names."""

    def __init__(self, folder: Path, most: int, described: bool) -> None:
        self._folder, self._most, self._described = folder, most, described
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        # torchao's reader takes the list of names from the last file, so that each lists those before it, too.
        self._metadata: dict[str, str] = {}
        self._names: list[str] = []
        self._written: list[list[str]] = []
        self.shards: dict[str, list[str]] = {}
        self.bytes = 0

    def add(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """The tensors of one weight: they stay together."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._held and self._held_bytes + size > self._most:
            self._flush()
        self._held |= {key: tensor.contiguous() for key, tensor in tensors.items()}
        self._held_bytes += size
        self.bytes += size
        self._metadata |= metadata
        self._names += metadata

    def finish(self) -> None:
        """Write what is left, and give all files their names."""
        self._flush()
        many = len(self._written)
        for at, keys in enumerate(self._written, 1):
            name = "model.safetensors" if many == 1 else f"model-{at:05d}-of-{many:05d}.safetensors"
            self._place(at).rename(self._folder / name)
            self.shards[name] = keys

    def _flush(self) -> None:
        self._written.append(list(self._held))
        metadata = {"format": "pt"}
        if self._described:
            metadata |= self._metadata | {"tensor_names": json.dumps(self._names)}
        save_tensors(self._held, self._place(len(self._written)), metadata, checked=True)
        self._held, self._held_bytes = {}, 0

    def _place(self, at: int) -> Path:
        return self._folder / f"part-{at}.safetensors"


def shard_size(text: str | int) -> int:
    """The bytes that a text such as 5GB means.

    Raises:
        ConfigError: it means none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B?", str(text), re.IGNORECASE)
    if found is None:
        raise ConfigError(f"max_shard_size is {text!r}; expected a size such as 5GB or 500MB")
    return int(float(found.group(1)) * 1000 ** " KMGT".index(found.group(2).upper() or " "))
