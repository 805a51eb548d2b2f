"""Adapters ready to serve: read, checked, g computed; in host memory until a slot is free for them.

Every adapter has a serial number of its own that is never used again: what was cached for an adapter of the same name
that has been unloaded is not taken for the new one's.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from theodora.adapters.check import check_fit
from theodora.adapters.renamed import in_names_of
from theodora.config import METHOD_NAMES
from theodora.errors import CheckpointError, bullet_list
from theodora.files.adapter import AdapterFile, read_adapter
from theodora.files.adapter_folder import Bounds
from theodora.files.finite import all_finite_on_gpu, finite
from theodora.files.folder import Place
from theodora.serve.slotted import Routing, SlottedLayer, SlotTensors, prepare_slots, slot
from theodora.serve.slotted_group import group_slotted

if TYPE_CHECKING:
    from theodora.serve.stamp import FolderStamp

_serials = itertools.count(1)
_TOGETHER = 2**25  # numbers of A and B that are computed with at a time: 128 MB in float32
_LEAST_TEXT, _TEXT_OF_A_MODULE = 2 << 20, 2 << 10  # bytes: some ten times what headers have


@dataclass(eq=False)
class ServedAdapter:
    """One loaded adapter."""

    name: str
    path: Path
    method: str
    """DoRA or LoRA."""
    rank: int
    """The largest of its modules."""
    modules: dict[str, SlotTensors] | None
    """Module path -> its tensors, in host memory (just after loading, on the GPU); None while they are on disk."""
    seconds: float
    """It took to load."""
    created: int
    """Unix time of loading."""
    serial: int
    stamp: FolderStamp | None = None
    """Of its files when it was loaded."""
    format_files: Mapping[str, bytes] = field(default_factory=dict)
    """The files that its chat format is read from, as they were then (see `read_format_files`)."""
    users: int = 0
    """Requests that run or wait with it."""
    leaving: bool = False
    """Unloaded: it goes when its last request does."""

    @property
    def bytes(self) -> int:
        """In host memory."""
        modules = (self.modules or {}).values()
        return sum(t.numel() * t.element_size() for tensors in modules for t in tensors.tensors())


def read_served(path: str | Path | Place, model: nn.Module, most_rank: int) -> AdapterFile:
    """Read and check an adapter against the model, before anything of the model changes.

    Raises:
        CheckpointError: it is damaged, made for another model, too large, has modules trained in full, or is on
            fused experts.
    """
    device = next(model.parameters()).device
    bounds = bounds_of(model, most_rank)
    file = in_names_of(model, read_adapter(path, device if device.type == "cuda" else None, bounds=bounds))
    check_fit(model, file)
    problems = [f"{key}: trained in full" for key in file.full]
    problems += [f"{path}: a convolution" for path, tensors in file.modules.items() if tensors.filter_shape]
    problems += [f"{path}: on fused experts" for path, tensors in file.modules.items() if tensors.a.dim() == 3]
    problems += [f"{path}: has rows of its own for {len(t.ids)} tokens" for path, t in file.token_rows.items()]
    if problems:
        raise CheckpointError(
            f"{file.path} cannot be served beside others, because it changes weights of the model that all requests "
            "share; merge it (theodora merge) and serve the merged model:" + bullet_list(problems, 12)
        )
    rank = rank_of(file)
    if rank > most_rank:
        raise CheckpointError(f"{file.path} has rank {rank}; this server takes ranks up to {most_rank} (--max-rank)")
    return file


def bounds_of(model: nn.Module, most_rank: int) -> Bounds:
    """How large the files of an adapter of this model can be: larger ones are made to fill memory, or to take time.

    All weights adapted, and copies of the embeddings and the head, which PEFT may save beside, in float64.
    """
    weights = [parameter.shape for parameter in model.parameters() if parameter.ndim > 1 and parameter.numel()]
    numbers = [(most_rank + 1) * (shape.numel() // shape[-1] + shape.numel() // shape[-2]) for shape in weights]
    numbers += sorted(shape.numel() for shape in weights)[-2:]
    text = _LEAST_TEXT + _TEXT_OF_A_MODULE * sum(shape[:-2].numel() for shape in weights)
    return Bounds(text=text, file=text + 8 * sum(numbers))


def rank_of(file: AdapterFile) -> int:
    """The largest rank of an adapter's modules."""
    return max(tensors.a.shape[0] for tensors in file.modules.values())


def make_room(model: nn.Module, file: AdapterFile, routing: Routing) -> bool:
    """Slot the modules that the adapter touches; whether anything changed. No batch may run meanwhile.

    If it fails, for want of memory, say, some modules have changed; each is whole.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    changed = False
    try:
        for path, tensors in file.modules.items():
            module: Any = model.get_submodule(path)
            if not isinstance(module, SlottedLayer) or module.rank < tensors.a.shape[0]:
                slot(module, routing, tensors.a.shape[0], is_head=module is head)
                changed = True
    finally:
        if changed:
            group_slotted(model)
    return changed


def prepare(name: str, file: AdapterFile, model: nn.Module, started: float) -> ServedAdapter:
    """Compute what the slots will hold, on the model's device; see `in_host_memory`."""
    modules = slot_tensors(file, model)
    return ServedAdapter(
        name=name,
        path=file.path,
        method=METHOD_NAMES[file.config.method],
        rank=rank_of(file),
        modules=modules,
        seconds=time.perf_counter() - started,
        created=int(time.time()),
        serial=next(_serials),
    )


def slot_tensors(file: AdapterFile, model: nn.Module) -> dict[str, SlotTensors]:
    """Module path -> what an adapter puts into a slot, on the model's device.

    Raises:
        CheckpointError: A, s·B or g is not finite, as it runs.
    """
    alike: dict[Any, list[str]] = {}
    for path, tensors in file.modules.items():
        layer: Any = model.get_submodule(path)
        weight = layer.current_weight
        kind = weight.shape, weight.stored, weight.dtype, weight.device
        dtypes = tensors.a.dtype, tensors.b.dtype, None if tensors.magnitude is None else tensors.magnitude.dtype
        kind += (tensors.a.shape[0], *dtypes, tensors.scale)
        # On a CPU launches cost nothing, and copies do.
        alike.setdefault(kind if layer.weight.is_cuda else path, []).append(path)
    modules: dict[str, SlotTensors] = {}
    for paths in itertools.chain.from_iterable(_few(paths, file) for paths in alike.values()):
        layers: list[Any] = [model.get_submodule(path) for path in paths]
        files = [file.modules[path] for path in paths]
        magnitudes = [t.magnitude for t in files if t.magnitude is not None] or None
        prepared = prepare_slots(layers, [t.a for t in files], [t.b for t in files], magnitudes, files[0].scale)
        modules |= dict(zip(paths, prepared, strict=True))
    _check_finite(file, modules)
    if (first := next(iter(modules.values())).a_RI).is_cuda:
        torch.cuda.current_stream(first.device).synchronize()
    return modules


def _check_finite(file: AdapterFile, modules: dict[str, SlotTensors]) -> None:
    """Refuse what is finite in the file and not as it runs: in another dtype, times s, on this model's weights."""
    tensors = [tensor for tensors in modules.values() for tensor in tensors.tensors()]
    if all_finite_on_gpu(tensors) or all(finite(tensor) for tensor in tensors):
        return
    for path, (a, b, g) in ((path, (t.a_RI, t.b_RO, t.g_O)) for path, t in modules.items()):
        for what, tensor in (("A", a), ("s·B", b), ("m / ‖W + s·B·A‖", g)):
            if tensor is not None and not finite(tensor):
                raise CheckpointError(
                    f"{file.path}: {path}: {what} is not finite on this model's weights, in "
                    f"{str(tensor.dtype).removeprefix('torch.')}: the adapter's values are too large. Serve the model "
                    "in a wider dtype (--dtype), or train the adapter again."
                )


def _few(paths: list[str], file: AdapterFile) -> Iterator[list[str]]:
    """The modules, all alike, a few at a time: what is computed for them takes several times their tensors' memory."""
    tensors = file.modules[paths[0]]
    many = max(1, _TOGETHER // (tensors.a.numel() + 4 * tensors.b.numel()))
    return (paths[at : at + many] for at in range(0, len(paths), many))


def in_host_memory(modules: dict[str, SlotTensors]) -> dict[str, SlotTensors]:
    """The tensors in one piece of pinned memory (many small ones take long to pin), or as they are on a CPU."""
    first = next(iter(modules.values())).a_RI
    if not first.is_cuda:
        return modules
    total = sum(_aligned(t) for tensors in modules.values() for t in tensors.tensors())
    memory, at = torch.empty(total, dtype=torch.uint8, pin_memory=True), 0

    def to_host(tensor: Tensor) -> Tensor:
        nonlocal at
        piece = memory[at : at + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        at += _aligned(tensor)
        return piece.copy_(tensor, non_blocking=True)

    moved = {path: tensors.map(to_host) for path, tensors in modules.items()}
    torch.cuda.current_stream(first.device).synchronize()
    return moved


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // 256) * 256


class Registry:
    """Adapters by name. Any thread may ask."""

    def __init__(self) -> None:
        self._adapters: dict[str, ServedAdapter] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """In order of loading."""
        with self._lock:
            return list(self._adapters)

    def adapters(self) -> list[ServedAdapter]:
        """In order of loading."""
        with self._lock:
            return list(self._adapters.values())

    def get(self, name: str) -> ServedAdapter | None:
        """The adapter, if it is loaded."""
        with self._lock:
            return self._adapters.get(name)

    def add(self, adapter: ServedAdapter) -> ServedAdapter | None:
        """Serve it under its name from now on; the one that it replaces."""
        with self._lock:
            before = self._adapters.get(adapter.name)
            if before is not None:
                before.leaving = True
            self._adapters[adapter.name] = adapter
            return before

    def remove(self, name: str) -> ServedAdapter | None:
        """Serve it no more to new requests."""
        with self._lock:
            adapter = self._adapters.pop(name, None)
            if adapter is not None:
                adapter.leaving = True
            return adapter

    def use(self, name: str) -> ServedAdapter | None:
        """The adapter with one more user."""
        with self._lock:
            adapter = self._adapters.get(name)
            if adapter is not None:
                adapter.users += 1
            return adapter

    def release(self, adapter: ServedAdapter) -> bool:
        """One user less; whether it was the last one of an adapter that is leaving."""
        with self._lock:
            adapter.users -= 1
            return adapter.leaving and adapter.users == 0
