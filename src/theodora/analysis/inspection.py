"""`inspect_adapter`: what an adapter folder holds, what it was made for, and how far it moved its base."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from theodora.analysis.experts import ExpertMovement, barely_moved, measure_experts
from theodora.analysis.movement import Movement, measure, update_norm
from theodora.analysis.tuned import places_in_order
from theodora.errors import CheckpointError
from theodora.files.adapter import AdapterFile, AdapterTensors, read_adapter
from theodora.files.base_model import BaseCheckpoint, find_base
from theodora.files.fingerprint import SAME_BASE, check_fingerprint
from theodora.files.folder import read_file
from theodora.files.ours import changes, described
from theodora.files.trained_on import TrainedOn
from theodora.merging.plan import fingerprint_on_disk, plan_merge, weight_on_disk
from theodora.parse import parse_yaml
from theodora.paths import layer_index, layer_kinds

RUN_CONFIG = "config.yaml"


@dataclass(frozen=True)
class ModuleReport:
    """One adapted module. What needs the base weight is None without it."""

    path: str
    kind: str
    layer: int | None
    shape: tuple[int, ...]
    """(out, in), or (experts, out, in)."""
    rank: int
    scale: float
    parameters: int
    update: float
    """‖s·B·A‖, Frobenius norm."""
    relative_update: float | None
    """The same against ‖W‖."""
    magnitude_mean: float | None
    """Mean over the rows of how much their length changed, relative, without sign."""
    magnitude_max: float | None
    angle_mean: float | None
    """Mean over the rows of the angle between base and adapted row, in degrees."""
    angle_max: float | None
    magnitude_rests: bool | None
    """DoRA: whether the magnitudes are still the norms of the base rows."""
    experts: tuple[ExpertMovement, ...] = ()
    """Of fused experts, each by itself."""


@dataclass(frozen=True)
class FullReport:
    """One parameter trained in full."""

    path: str
    shape: tuple[int, ...]
    parameters: int
    relative_change: float | None
    """‖W' − W‖ / ‖W‖, if the base is at hand and has one."""


@dataclass(frozen=True)
class Group:
    """Means over the modules of one kind, or of one layer; the largest of their largest."""

    name: str
    modules: int
    parameters: int
    update: float
    magnitude_mean: float | None
    magnitude_max: float | None
    angle_mean: float | None
    angle_max: float | None


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter folder holds, and how far the adapter moved its base."""

    path: str
    method: str
    ranks: dict[int, int]
    """Rank -> number of modules that have it."""
    alpha: float
    rslora: bool
    scales: tuple[float, ...]
    """The distinct factors s in W + s·B·A."""
    targets: str | tuple[str, ...]
    modules_to_save: tuple[str, ...]
    parameters: int
    """Trained parameters, those trained in full included."""
    bytes: int
    dtype: str
    base_model: str | None
    base_folder: str | None
    """Where the base lies; None if it is not on this machine."""
    base_parameters: int | None
    modules: tuple[ModuleReport, ...]
    full: tuple[FullReport, ...]
    by_kind: tuple[Group, ...]
    by_layer: tuple[Group, ...]
    training: dict[str, Any] | None
    """The options of the run that made it, if Theodora trained it."""
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    """What is wrong with it."""
    written: str | None = None
    """Whether the adapter's folder is as it was written."""
    trained_on: TrainedOn | None = None
    """What base it was trained on, if its file remembers."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON: NaN (the mean of no rows) becomes None."""
        return plain(asdict(self))


def inspect_adapter(
    path: str | Path, base_model: str | Path | None = None, *, trust_remote_code: bool = False
) -> AdapterReport:
    """Say what an adapter is and how far it moved each module of its base.

    The base is read tensor by tensor from its folder or the local hub cache; nothing is downloaded. Without it the
    report holds ‖s·B·A‖ and says so.

    Example:
        `inspect_adapter("runs/first").by_kind`

    Args:
        path: the adapter's folder (PEFT's files).
        base_model: folder or hub name of the base. Default: the one that the adapter names.
        trust_remote_code: run Python code that comes with the base model.

    Raises:
        CheckpointError: the adapter is damaged, or does not fit the base that was asked for.
    """
    file = read_adapter(path)
    notes: list[str] = []
    warnings: list[str] = []
    base = _open_base(file, base_model, trust_remote_code, notes, warnings)
    paths = _in_order(file, base)
    kinds = layer_kinds(paths)
    modules = tuple(_module(path, kinds[path], file.modules[path], base) for path in paths)
    full = tuple(_full(path, tensor, base) for path, tensor in file.full.items())
    if base is not None:
        base.close()
    warnings += _suspicions(file, modules)
    notes += [f"{path} has rows of its own for {len(t.ids):,} tokens." for path, t in file.token_rows.items()]
    rows = sum(t.rows.numel() for t in file.token_rows.values())
    tensors = [t for m in file.modules.values() for t in (m.a, m.b, m.magnitude) if t is not None]
    rank_of = {path: tensors.a.shape[-2] // (2 if file.starts else 1) for path, tensors in file.modules.items()}
    return AdapterReport(
        path=str(file.path),
        method=file.config.method,
        ranks=dict(sorted(Counter(rank_of.values()).items())),
        alpha=(file.config.alpha or 0.0) / ((2**0.5 if file.config.rslora else 2) if file.starts else 1),
        rslora=file.config.rslora,
        scales=tuple(sorted({tensors.scale for tensors in file.modules.values()})),
        targets=file.config.targets,
        modules_to_save=file.config.modules_to_save,
        parameters=rows + sum(m.parameters for m in (*modules, *full)),
        bytes=file.weights.stat().st_size,
        dtype=", ".join(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in (*tensors, *file.full.values()))),
        base_model=file.base_model if base_model is None else str(base_model),
        base_folder=str(base.folder) if base is not None else None,
        base_parameters=sum(p.numel() for p in base.model.parameters()) if base is not None else None,
        modules=modules,
        full=full,
        by_kind=_groups(modules, [module.kind for module in modules]),
        by_layer=_by_layer(modules),
        training=_training(file.path),
        notes=tuple(notes),
        warnings=(*warnings, *_changes(file.path)),
        written=described(file.path),
        trained_on=file.trained_on,
    )


def _changes(folder: Path) -> list[str]:
    differences = changes(folder)
    return [f"The adapter is not as it was written: {'; '.join(differences)}."] if differences else []


def _open_base(
    file: AdapterFile, base_model: str | Path | None, trust_remote_code: bool, notes: list[str], warnings: list[str]
) -> BaseCheckpoint | None:
    """The base model if it is at hand and fits. One that was asked for must."""
    try:
        folder = find_base(str(base_model or file.base_model or ""))
        base = BaseCheckpoint(folder, trust_remote_code=trust_remote_code, heads=file.heads)
        plan_merge(base, file, None)
    except CheckpointError as error:
        if base_model is not None:
            raise
        notes.append(f"Measured without the base weights, so changes are absolute. {error}")
        return None
    check_base(file, base, "the adapter", notes, warnings)
    return base


def check_base(file: AdapterFile, base: BaseCheckpoint, whose: str, notes: list[str], warnings: list[str]) -> None:
    """Say how far the base at hand is from the one that an adapter was trained on, where it is.

    Args:
        file: the adapter.
        base: what is measured against.
        whose: "the adapter", or which of several.
        notes: take what was to be expected: a base that was quantised as it was loaded for the training.
        warnings: take any other distance.
    """
    distance, on = check_fingerprint(file, lambda path: fingerprint_on_disk(base, path)), file.trained_on
    if on is not None and on.quantize is not None:
        notes.append(
            f"Trained on the base quantised as {on.quantization}, and measured against the unquantised weights, "
            f"{distance:.1%} away: DoRA's magnitudes began at the norms of the quantised ones."
        )
    elif distance > SAME_BASE:
        warnings.append(
            f"The base weights here are {distance:.1%} away from those {whose} was trained on (quantised, or "
            "trained further?)."
        )


def _in_order(file: AdapterFile, base: BaseCheckpoint | None) -> list[str]:
    """The adapted modules in the model's order; without the model, layer by layer."""
    if base is None:
        return sorted(file.modules, key=lambda path: (layer_index(path) or 0, path))
    place = places_in_order(base)
    names = {path: (base.weight_name(path) or "").removesuffix(".weight") for path in file.modules}
    return sorted(file.modules, key=lambda path: (place.get(names[path], len(place)), layer_index(path) or 0))


def _module(path: str, kind: str, tensors: AdapterTensors, base: BaseCheckpoint | None) -> ModuleReport:
    w_OI = weight_on_disk(base, path) if base is not None else None
    experts: tuple[ExpertMovement, ...] = ()
    if tensors.a.dim() == 3:
        moved, experts = measure_experts(w_OI, tensors)
    else:
        moved = measure(w_OI, tensors) if w_OI is not None else None
    trained = [tensor for tensor in (tensors.a, tensors.b, tensors.magnitude) if tensor is not None]
    return ModuleReport(
        path=path,
        kind=kind,
        layer=layer_index(path),
        shape=(*tensors.a.shape[:-2], tensors.b.shape[-2], tensors.a.shape[-1]),
        rank=tensors.a.shape[-2],
        scale=tensors.scale,
        parameters=sum(tensor.numel() for tensor in trained),
        update=math.hypot(*(each.update for each in experts)) if experts else update_norm(tensors),
        relative_update=moved and moved.relative_update,
        **_statistics(moved),
        magnitude_rests=moved.magnitude_rests if moved is not None and tensors.magnitude is not None else None,
        experts=experts,
    )


def _statistics(moved: Movement | None) -> dict[str, float | None]:
    names = ("magnitude_mean", "magnitude_max", "angle_mean", "angle_max")
    if moved is None or not len(moved.angle):
        return dict.fromkeys(names)
    size, angle = moved.magnitude.abs(), moved.angle
    return dict(zip(names, map(float, (size.mean(), size.max(), angle.mean(), angle.max())), strict=True))


def _full(path: str, tensor: Tensor, base: BaseCheckpoint | None) -> FullReport:
    name = base.model_name(path) if base is not None else None
    key = base.key_of(name) if base is not None and name is not None else None
    change = None
    if base is not None and key in base.heads:  # which it has of this very adapter
        key = None
    if base is not None and key is not None and base.tensors[key].shape == tuple(tensor.shape):
        stored = base.read(key).float()
        change = float(torch.linalg.vector_norm(tensor.float() - stored) / torch.linalg.vector_norm(stored))
    return FullReport(path, tuple(tensor.shape), tensor.numel(), change)


def _by_layer(modules: tuple[ModuleReport, ...]) -> tuple[Group, ...]:
    inside = sorted((module for module in modules if module.layer is not None), key=lambda module: module.layer or 0)
    return _groups(tuple(inside), [str(module.layer) for module in inside])


def _groups(modules: tuple[ModuleReport, ...], names: list[str]) -> tuple[Group, ...]:
    members: dict[str, list[ModuleReport]] = {}
    for name, module in zip(names, modules, strict=True):
        members.setdefault(name, []).append(module)
    return tuple(
        Group(
            name=name,
            modules=len(group),
            parameters=sum(module.parameters for module in group),
            update=_mean(module.update for module in group) or 0.0,
            magnitude_mean=_mean(module.magnitude_mean for module in group),
            magnitude_max=_largest(module.magnitude_max for module in group),
            angle_mean=_mean(module.angle_mean for module in group),
            angle_max=_largest(module.angle_max for module in group),
        )
        for name, group in members.items()
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _suspicions(file: AdapterFile, modules: tuple[ModuleReport, ...]) -> list[str]:
    """Signs that the adapter was not trained, or is damaged."""
    warnings = []
    idle = [module for module in modules if _is_idle(file, file.modules[module.path])]
    if idle:
        warnings.append(f"{_of(idle, modules)} untrained: B is all zero (or still at its start), so B·A adds nothing.")
    still = {m.path: found for m in modules if m not in idle and (found := barely_moved(e.update for e in m.experts))}
    if still:
        first, of_first = next(iter(still.items()))
        warnings.append(
            f"{sum(map(len, still.values())):,} of {sum(len(m.experts) for m in modules):,} experts barely moved, in "
            f"{len(still)} weight{'' if len(still) == 1 else 's'} ({first}: {', '.join(map(str, of_first[:6]))}"
            f"{' …' if len(of_first) > 6 else ''}): had they tokens?"
        )
    resting = [module for module in modules if module.magnitude_rests and module not in idle]
    if resting:
        warnings.append(
            f"{_of(resting, modules)} trained as plain LoRA: the magnitudes never moved from the norms of the base "
            "rows. Were they reset on loading or left out of the optimizer?"
        )
    broken = [module for module in modules if any(v is not None and not math.isfinite(v) for v in _measures(module))]
    if broken:
        warnings.append(
            f"The base weights of {len(broken)} modules hold NaN or infinite values, {broken[0].path} first."
        )
    return warnings


def _of(some: list[ModuleReport], modules: tuple[ModuleReport, ...]) -> str:
    if len(some) == len(modules):
        return "All modules are"
    return f"{len(some)} of {len(modules)} modules ({some[0].path} first) {'is' if len(some) == 1 else 'are'}"


def _measures(module: ModuleReport) -> tuple[float | None, ...]:
    return (module.relative_update, module.magnitude_max, module.angle_max)


def _is_idle(file: AdapterFile, tensors: AdapterTensors) -> bool:
    if not file.starts:
        return not bool(tensors.b.any())
    # A PiSSA or OLoRA start: the second half of the factors takes the first away again.
    a, a_start = tensors.a.chunk(2, dim=-2)
    b, b_start = tensors.b.chunk(2, dim=-1)
    return torch.equal(a, a_start) and torch.equal(b, -b_start)


def _training(folder: Path) -> dict[str, Any] | None:
    """The options of the run, from the file that `theodora train` leaves beside the adapter."""
    try:
        options = parse_yaml(read_file(folder / RUN_CONFIG).decode("utf-8"))
    except (OSError, ValueError, CheckpointError):
        return None  # somebody else's file says nothing about the adapter
    return options if isinstance(options, dict) and {"model", "data", "output"} <= options.keys() else None


def plain(value: Any) -> Any:
    """A report's values as JSON takes them: lists for tuples, None for NaN and infinity, text for any other type."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)
