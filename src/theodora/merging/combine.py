"""Weighted combinations of adapters, defined on the weights they make, so that LoRA and DoRA combine alike.

    W' = W + Σ wᵢ (W'ᵢ − W)

For DoRA W'ᵢ = gᵢ ⊙ (W + sᵢ·Bᵢ·Aᵢ), and the sum is c ⊙ W + Σ wᵢ gᵢ ⊙ sᵢ·Bᵢ·Aᵢ with c = 1 + Σ wᵢ (gᵢ − 1): again a DoRA
adapter, of the ranks added up (`fit.py`). TIES and DARE change W'ᵢ − W element by element, which leaves no low rank.

PEFT's "linear" is another thing. It adds up the adapters' A and their B, each times the square root of its weight; the
product of these sums is not the sum of the products. And it drops DoRA's magnitudes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from theodora.adapters.biases import trained_biases
from theodora.adapters.inject import add_adapter
from theodora.adapters.state import (
    adapter_layers,
    check_name,
    new_low_rank,
    originals_in_place,
    require_state,
    set_adapter,
)
from theodora.adapters.token_rows import own_rows
from theodora.config import AdapterConfig, is_int, is_number
from theodora.errors import CheckpointError, ConfigError, bullet_list
from theodora.files.finite import not_finite
from theodora.layers import AdapterLayer, LowRank
from theodora.layers.base_weights import FLOATS
from theodora.layers.experts import place_at, weight_path
from theodora.merging.fit import FitReport, Held, Wanted, dense, exact_dtype, hold, of_experts, wanted_of
from theodora.merging.ties_dare import combined

CombineMethod = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties"]
_SPARSE = ("ties", "dare_linear", "dare_ties")


@dataclass(frozen=True)
class _Plan:
    names: list[str]
    weights: list[float]
    method: str
    rank: int | None
    density: float
    seed: int


def combine_adapters(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    into: str,
    method: CombineMethod = "linear",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> FitReport:
    """Make one adapter out of several that the model carries, and make it the active one; nothing of it trains.

    `linear` (`cat` is the same) is W' = W + Σ wᵢ (W'ᵢ − W), exactly: its rank is the sum of the ranks, at most that of
    the weight. `svd` is its best approximation of a lower rank. `ties` keeps the largest `density` of each change,
    elects a sign for each element and takes the mean of the changes that have it (arXiv 2306.01708); `dare_linear`
    and `dare_ties` keep each element with probability `density`, divided by it (arXiv 2311.03099). These three have
    full rank: without `rank` the result is exact and as large as the weight, with it an approximation.

    Modules that an adapter trains in full take part, too. The result is LoRA where all adapters are, else DoRA.

    Example:
        `combine_adapters(model, ["math", "style"], [0.7, 0.3], into="both")`

    Args:
        model: carries the adapters, none of them merged.
        names: the adapters, of any ranks, targets, scales and methods.
        weights: one for each, any finite numbers; a negative one takes an adapter's change away.
        into: the new adapter's name.
        method: linear, cat, svd, ties, dare_linear or dare_ties.
        rank: of the result. Default for svd: the largest of the adapters' ranks; for ties and dare: full.
        density: share of the elements that ties and dare keep, above 0 and at most 1.
        seed: of dare's draws (`ties_dare.dare_mask`).

    Returns:
        Ranks and errors, module by module.

    Raises:
        ConfigError: an unknown adapter or method, or values that make no sense; nothing was changed.
    """
    state = require_state(model)
    check_name(state, into)
    plan = _Plan(list(names), list(weights), method, rank, density or 1.0, seed)
    problems = [f"there is no adapter {name!r}" for name in plan.names if name not in state.configs]
    problems += list(_problems(plan, density))
    if problems:
        raise ConfigError("The adapters cannot be combined so:" + bullet_list(problems))
    odd = [path for name in plan.names for path in state.full[name] if state.originals[path].dtype not in FLOATS]
    if odd:
        raise ConfigError("These base parameters are quantised and cannot be combined:" + bullet_list(odd))
    rows = [f"{name}: {path}" for name in plan.names for path in own_rows(model, name)]
    if rows:
        raise ConfigError(
            "These adapters have rows of single tokens, which replace the base's and cannot be added up; merge them "
            "one after the other:" + bullet_list(rows)
        )
    with torch.no_grad(), originals_in_place(model):
        full, errors = _full(model, plan)
        held = {
            path: held
            for path, layer in adapter_layers(model).items()
            if weight_path(path, layer) not in full and (held := _module(layer, path, plan)) is not None
        }
    method_name = "dora" if any(h.magnitude_O is not None for h in held.values()) else "lora"
    return add_computed(model, into, held, full, method_name, errors)


def add_computed(
    model: nn.Module,
    name: str,
    held: dict[str, Held],
    full: dict[str, nn.Parameter],
    method: str,
    errors: dict[str, float] | None = None,
) -> FitReport:
    """Hang computed tensors on the model as an adapter of scale 1, make it active and freeze it.

    Raises:
        CheckpointError: they are not finite; nothing was changed.
    """
    check_held(held)
    config = scale_one_config(method, held, full)
    adapters: dict[str, LowRank] = {}
    with originals_in_place(model):
        for path, h in held.items():
            module = place_at(model, path)
            adapters[path] = new_low_rank(module, h.a_RI, h.b_OR, h.magnitude_O, 1.0, config, None)
    add_adapter(model, name, config, adapters, full)
    set_adapter(model, name)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return report_fit(name, method, held, errors)


def check_held(held: Mapping[str, Held]) -> None:
    """Raise a CheckpointError for computed tensors that are not finite."""
    tensors = {
        f"{path}.{part}": tensor
        for path, h in held.items()
        for part, tensor in (("lora_A", h.a_RI), ("lora_B", h.b_OR), ("magnitude", h.magnitude_O))
        if tensor is not None
    }
    bad = not_finite(tensors.items())
    if bad:
        raise CheckpointError(
            f"The result would hold NaN or infinite values in {str(tensors[bad[0]].dtype).removeprefix('torch.')}, so "
            "nothing was made of it:" + bullet_list(bad, 12)
        )


def scale_one_config(method: str, held: Mapping[str, Held], full: Mapping[str, Tensor]) -> AdapterConfig:
    """The configuration of computed tensors: alpha is the rank, so that the scale is 1."""
    ranks = {path: h.a_RI.shape[-2] for path, h in held.items()}
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    others = {re.escape(path): rank for path, rank in ranks.items() if rank != common}
    return AdapterConfig(
        method=method,  # pyright: ignore[reportArgumentType]
        rank=common,
        alpha=common,
        targets=tuple(held) or "all-linear",
        rank_pattern=others,
        alpha_pattern=others,
        modules_to_save=tuple(sorted({path.rpartition(".")[0] for path in full.keys() - trained_biases(full)})),
        adapter_dtype="base" if any(h.a_RI.dtype == torch.float64 for h in held.values()) else "float32",
    )


def report_fit(
    name: str, method: str, held: Mapping[str, Held], errors: Mapping[str, float] | None = None
) -> FitReport:
    """Ranks and errors of computed tensors."""
    ranks = {path: h.a_RI.shape[-2] for path, h in held.items()}
    return FitReport(name, method, ranks, {path: h.error for path, h in held.items()} | dict(errors or {}))


def wanted_by(layer: AdapterLayer, name: str) -> Wanted | None:
    """What one adapter makes of the layer's weight, or None if it leaves it alone."""
    if name not in layer.adapters:
        return None
    adapter: Any = layer.adapters[name]
    a, b = adapter.factors()
    return wanted_of(layer.base_weight.dense(), a, b, adapter.scale, adapter.magnitude)


def storage_dtype(w_OI: Tensor) -> torch.dtype:
    """What the factors of a computed adapter are stored in: float32, or float64 for float64 weights."""
    return torch.float64 if w_OI.dtype == torch.float64 else torch.float32


def _problems(plan: _Plan, density: float | None) -> list[str]:
    problems: list[str] = []
    if not plan.names:
        problems.append("no adapters are named; expected at least one")
    problems += [f"{name!r} is named {n} times" for name, n in Counter(plan.names).items() if n > 1]
    if len(plan.names) != len(plan.weights):
        problems.append(f"{len(plan.weights)} weights for {len(plan.names)} adapters; expected one for each")
    problems += [f"weight {w!r}; expected a finite number" for w in plan.weights if not is_number(w)]
    if plan.method not in get_args(CombineMethod):
        problems.append(f"method is {plan.method!r}; expected one of {', '.join(get_args(CombineMethod))}")
        return problems
    if plan.rank is not None and (not is_int(plan.rank) or plan.rank < 1):
        problems.append(f"rank is {plan.rank!r}; expected a whole number of at least 1")
    if plan.rank is not None and plan.method in ("linear", "cat"):
        problems.append(f"{plan.method} is exact and takes the rank it needs; for rank={plan.rank} choose method='svd'")
    if plan.method in _SPARSE and density is None:
        problems.append(f"{plan.method} needs a density: the share of each change to keep, such as 0.5")
    if density is not None and (plan.method not in _SPARSE or not is_number(density) or not 0 < density <= 1):
        problems.append(
            f"density is {density!r}; expected more than 0 and at most 1"
            + ("" if plan.method in _SPARSE else f", and none at all with {plan.method}")
        )
    return problems


def _module(layer: AdapterLayer, path: str, plan: _Plan) -> Held | None:
    """One module's part of the combination, or None if none of the adapters touches it."""
    parts = [(name, w, wanted_by(layer, name)) for name, w in zip(plan.names, plan.weights, strict=True)]
    parts = [(name, weight, wanted) for name, weight, wanted in parts if wanted is not None]
    if not parts:
        return None
    adapters: list[Any] = [layer.adapters[name] for name, _, _ in parts]
    dora = any(adapter.magnitude is not None for adapter in adapters)
    rank = plan.rank
    if plan.method == "svd" and rank is None:
        rank = max(adapter.factors()[0].shape[-2] for adapter in adapters)
    plan = replace(plan, rank=rank)
    w_OI = layer.base_weight.dense()
    if w_OI.dim() == 2:
        return _weight(w_OI, path, parts, plan, dora)
    experts = range(len(w_OI))
    of_each = ([(name, weight, wanted.of(e)) for name, weight, wanted in parts] for e in experts)
    return of_experts(
        [_weight(w_OI[e], f"{path}.{e}", own, plan, dora) for e, own in zip(experts, of_each, strict=True)]
    )


def _weight(w_OI: Tensor, path: str, parts: list[tuple[str, float, Wanted]], plan: _Plan, dora: bool) -> Held:
    """One weight's part of it."""
    dtype = storage_dtype(w_OI)
    if plan.method in _SPARSE:
        changes = [wanted.update(w_OI) for _, _, wanted in parts]
        keys = [f"{name}/{path}" for name, _, _ in parts]
        change = combined(plan.method, changes, [w for _, w, _ in parts], plan.density, plan.seed, keys)
        split = plan.rank is not None and plan.rank < min(w_OI.shape) and dora
        wanted = _scaled_rows(w_OI, change) if split else dense(change)
        return hold(w_OI, wanted, dora=dora, rank=plan.rank, dtype=dtype)
    return hold(w_OI, _sum([(w, wanted) for _, w, wanted in parts]), dora=dora, rank=plan.rank, dtype=dtype)


def _sum(parts: list[tuple[float, Wanted]]) -> Wanted:
    """c = 1 + Σ wᵢ (cᵢ − 1), and the factors one beside the other."""
    row = torch.ones_like(parts[0][1].row_O)
    for weight, wanted in parts:
        row = row + weight * (wanted.row_O - 1)
    used = [(weight, wanted) for weight, wanted in parts if weight != 0] or parts[:1]
    b = torch.cat([weight * wanted.b_OR for weight, wanted in used], dim=1)
    return Wanted(row, b, torch.cat([wanted.a_RI for _, wanted in used]))


def _scaled_rows(w_OI: Tensor, change_OI: Tensor) -> Wanted:
    """The same change as c ⊙ W and as little else as can be, which a low rank then has to hold."""
    w = w_OI.to(change_OI.dtype)
    size = w.square().sum(1)
    row = 1 + torch.where(size == 0, 0, (change_OI * w).sum(1) / size.masked_fill(size == 0, 1))
    return dense(change_OI - (row - 1)[:, None] * w)._replace(row_O=row)


def _full(model: nn.Module, plan: _Plan) -> tuple[dict[str, nn.Parameter], dict[str, float]]:
    """The parameters that one of the adapters trains in full, and the error that rounding them makes."""
    state = require_state(model)
    layers = {weight_path(path, layer): layer for path, layer in adapter_layers(model).items()}
    parameters: dict[str, nn.Parameter] = {}
    errors: dict[str, float] = {}
    for path in dict.fromkeys(path for name in plan.names for path in state.full[name]):
        original = state.originals[path]
        start = original.detach().to(exact_dtype(original.device))
        changes: list[Tensor] = []
        shares: list[tuple[str, float]] = []
        for name, weight in zip(plan.names, plan.weights, strict=True):
            change = None
            if path in state.full[name]:
                change = state.full[name][path].detach().to(start.device, start.dtype) - start
            elif (layer := layers.get(path)) is not None:
                wanted = wanted_by(layer, name)
                update = None if wanted is None else wanted.update(layer.base_weight.dense())
                change = update.mT if update is not None and layer.stored_transposed else update
            if change is not None:
                changes.append(change)
                shares.append((name, weight))
        keys = [f"{name}/{path}" for name, _ in shares]
        change = combined(plan.method, changes, [w for _, w in shares], plan.density, plan.seed, keys)
        parameters[path] = nn.Parameter((start + change).to(original.dtype))
        size = float(change.norm()) or float(start.norm()) or 1.0
        errors[path] = float((parameters[path].detach().to(start.dtype) - start - change).norm()) / size
    if bad := not_finite(parameters.items()):
        raise ConfigError("The combination does not fit the model's dtype:" + bullet_list(bad))
    assert all(math.isfinite(error) for error in errors.values())
    return parameters, errors
