"""The plug-in proves itself when a model is loaded: its layers run on random input, functional.py says what is right.

One layer of each kind in the model is tried: where it lies, in its dtype, by the kernels that will serve, in every
slot, with tokens of DoRA, of LoRA and of no adapter in one batch, as prefill and as decoding. The adapters come through
vLLM's own loading. A kind that gives anything else than the formula, or cannot be tried, keeps vLLM's own forward pass:
base and LoRA are served as without the plug-in, and a DoRA adapter on such layers is refused with what was found here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from theodora.errors import bullet_list
from theodora.functional import dora_norm, dora_scale, lora_delta
from theodora.vllm_plugin.layers import DoraLayer

_log = logging.getLogger("vllm.theodora")
_ALPHA = 1.5  # of each rank: a scale other than 1
_ROWS = 64  # of each slice that are compared, evenly spread
_TOKENS = 2  # of each adapter
_TF32 = 2.0**-10  # the digits of float32 products on a GPU, at the least
_SHOWN = 8


@dataclass
class _Trial:
    """A layer, and what was found."""

    name: str
    layer: DoraLayer
    parts: list[str]
    """Modules of the adapter that lie in it: itself, or those packed into it."""
    sizes: list[int]
    """Output rows of each slice, over all ranks."""
    dora: bool
    """Whether it is one that serves DoRA; others are tried with LoRA and without an adapter."""
    problems: dict[str, float] = field(default_factory=dict[str, float])
    """What was tried and is wrong → how far off it is, as a share of what is right."""


@dataclass(frozen=True)
class _Adapter:
    """What a slot was given."""

    id: int
    slot: int
    rank: int
    tensors: dict[str, tuple[Tensor, Tensor, Tensor | None]]
    """Module → A, B and m, over all ranks; m of DoRA alone."""


def prove(manager: Any, dtype: torch.dtype, versions: str) -> None:
    """Try the layers of a model that was just given its LoRA layers, and let those serve DoRA that are right.

    Args:
        manager: vLLM's LoRAModelManager, without an adapter.
        dtype: of activations.
        versions: whose these layers are, and which the tests ran on, for what is logged.
    """
    layers = {name: layer for name, layer in manager.modules.items() if isinstance(layer, DoraLayer)}
    kinds: dict[Any, list[DoraLayer]] = {}
    trials: dict[Any, _Trial | str] = {}
    for name, layer in layers.items():
        kind = _kind(layer)
        kinds.setdefault(kind, []).append(layer)
        if kind not in trials and layer.dora_plain:
            trials[kind] = _trial(manager, name, layer)
    started = [trial for trial in trials.values() if isinstance(trial, _Trial)]
    begun = time.perf_counter()
    try:
        with torch.inference_mode():
            for number in range(2):
                _run(manager, started, dtype, number)
        whole = None
    except Exception as error:  # of a vLLM that is another: it may be anything, and vLLM itself has to go on
        whole = f"{type(error).__name__}: {error}"
    finally:
        _leave(manager, started)
    failed: dict[str, str] = {}
    for kind, trial in trials.items():
        why = whole or (trial if isinstance(trial, str) else _told(trial))
        for layer in kinds[kind]:
            layer.dora_unproved = why
        if why is not None:
            failed[kind[0].__name__] = why
    if failed:
        lines = [f"{name}: {why}" for name, why in failed.items()]
        _log.warning(
            "Theodora's DoRA plug-in could not prove itself here. It refuses DoRA adapters on these layers; base and "
            "LoRA are served by vLLM alone. %s.%s",
            versions,
            bullet_list(lines, _SHOWN),
        )
    else:
        _log.info(
            "DoRA adapters are served: %d kinds of layers gave what the formula gives, in %d slots (%.1f s). %s.",
            len(trials),
            manager.lora_slots,
            time.perf_counter() - begun,
            versions,
        )


def _kind(layer: Any) -> tuple[Any, ...]:
    base = layer.base_layer
    weight = getattr(base, "weight", None)
    stored = None if weight is None else (weight.dtype, weight.numel() > 0)
    return type(layer), type(base), type(getattr(base, "quant_method", None)), layer.n_slices, stored


def _trial(manager: Any, name: str, layer: Any) -> _Trial | str:
    """How a layer is tried, or why it is not."""
    base = layer.base_layer
    heads = getattr(base, "total_num_heads", None)
    if heads is not None:  # output_sizes count a key's head for each rank that holds it
        kv = base.total_num_kv_heads
        sizes = [heads * base.head_size, kv * base.head_size, kv * getattr(base, "v_head_size", base.head_size)]
    else:
        sizes = list(getattr(base, "output_sizes", None) or [base.output_size])
    parts = list(manager.packed_modules.get(name) or [name])
    if len(parts) not in (1, len(sizes)):
        return f"{len(parts)} modules are packed into {len(sizes)} slices, and which goes where is not known"
    layer.dora_unproved = None  # while it is tried
    if len(parts) == 1:
        sizes = [sum(sizes)]
    return _Trial(name=name, layer=layer, parts=parts, sizes=sizes, dora=layer.unfit() is None)


def _run(manager: Any, trials: Sequence[_Trial], dtype: torch.dtype, number: int) -> None:
    """A round: an adapter in every slot, DoRA and LoRA by turns, and the other way round in the next."""
    random = torch.Generator().manual_seed(number)  # the same on all ranks
    adapters = [_load(manager, trials, slot, number, random) for slot in range(manager.lora_slots)]
    for trial in trials:
        if trial.layer.tp_size == 1:
            for adapter in adapters:
                _compare_slot(trial, adapter)
        for prefill in (True, False):
            for batch in _batches(manager, adapters):
                _compare_outputs(manager, trial, batch, prefill, dtype, random)
    manager.remove_all_adapters()


def _load(manager: Any, trials: Sequence[_Trial], slot: int, number: int, random: torch.Generator) -> _Adapter:
    """Make a random adapter, and bring it into a slot as vLLM does."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    dora = (slot + number) % 2 == 0
    rank = max(1, manager.lora_config.max_lora_rank // (1 + number))
    given: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
    tensors: dict[str, Tensor] = {}
    for trial in trials:
        if dora and not trial.dora:
            continue
        inside = trial.layer.base_layer.input_size
        for index, (part, rows) in enumerate(zip(trial.parts, trial.sizes, strict=True)):
            if number and index == 0 and len(trial.parts) > 1:
                continue  # not every module of a packed layer is adapted
            a = torch.randn(rank, inside, generator=random) / inside**0.5
            b = torch.randn(rows, rank, generator=random) / rank**0.5
            m = torch.rand(rows, generator=random) + 0.5 if dora else None
            given[part] = a, b, m
            tensors[f"base_model.model.{part}.lora_A.weight"] = a.clone()
            tensors[f"base_model.model.{part}.lora_B.weight"] = b.clone()  # vLLM multiplies the scale into it in place
            if m is not None:
                tensors[f"base_model.model.{part}.lora_magnitude_vector"] = m
    helper = PEFTHelper(r=rank, lora_alpha=_ALPHA * rank, target_modules=list(given), use_dora=dora)
    stored = manager.lora_config.lora_dtype
    lora = LoRAModel.from_lora_tensors(slot + 1, tensors, helper, device="cpu", dtype=stored)
    manager.add_adapter(lora)
    manager.activate_adapter(lora.id)
    at = manager.lora_index_to_id.index(lora.id)
    return _Adapter(id=lora.id, slot=at, rank=rank, tensors=given)


def _batches(manager: Any, adapters: Sequence[_Adapter]) -> Iterator[list[_Adapter | None]]:
    """All adapters and none, by as many as fit into a batch of this server."""
    most = max(2, min(manager.max_num_seqs, manager.max_num_batched_tokens // _TOKENS)) - 1
    for start in range(0, len(adapters), most):
        yield [*adapters[start : start + most], None] if manager.max_num_seqs > 1 else list(adapters[start : start + 1])
    if manager.max_num_seqs == 1:
        yield [None]


def _compare_slot(trial: _Trial, adapter: _Adapter) -> None:
    """A and s·B lie where they belong, and zeros beside them. (Of whole layers: parts are cut by vLLM.)"""
    given = [adapter.tensors.get(part) for part in trial.parts]
    layer = trial.layer
    b_found = torch.cat([b[adapter.slot, 0] for b in layer.lora_b_stacked]).double().cpu()
    b_right = torch.zeros_like(b_found)
    start = 0
    for index, (rows, tensors) in enumerate(zip(trial.sizes, given, strict=True)):
        found = layer.lora_a_stacked[index][adapter.slot, 0].double().cpu()
        right = torch.zeros_like(found)
        if tensors is not None:
            right[: adapter.rank] = tensors[0]
            b_right[start : start + rows, : adapter.rank] = _ALPHA * tensors[1]
        _note(trial, f"lora_A in slot {adapter.slot}", found, right, layer.lora_a_stacked[index].dtype)
        start += rows
    _note(trial, f"scale · lora_B in slot {adapter.slot}", b_found, b_right, layer.lora_b_stacked[0].dtype)


def _compare_outputs(
    manager: Any,
    trial: _Trial,
    batch: Sequence[_Adapter | None],
    prefill: bool,
    dtype: torch.dtype,
    random: torch.Generator,
) -> None:
    """y of a batch with tokens of these adapters against the formula."""
    from vllm.lora.layers import LoRAMapping

    layer: Any = trial.layer
    ids = [0 if adapter is None else adapter.id for adapter in batch]
    of_tokens = [id for id in ids for _ in range(_TOKENS)] if prefill else ids
    mapping = LoRAMapping(tuple(of_tokens), tuple(ids), is_prefill=prefill)
    layer.punica_wrapper.update_metadata(mapping, manager.lora_index_to_id, manager.lora_slots + 1, manager.vocab_size)
    shape = len(of_tokens), layer.lora_a_stacked[0].shape[-1]
    x = torch.randn(shape, generator=random).to(layer.device, dtype)
    bias = torch.randn(sum(layer.output_slices), generator=random).to(layer.device, dtype)
    y = layer.apply(x, bias).double()
    z = layer.base_layer.quant_method.apply(layer.base_layer, x, None).double()
    for adapter, tokens in zip(batch, torch.arange(len(of_tokens)).split(len(of_tokens) // len(ids)), strict=True):
        magnitudes: list[Tensor | None] = [None] * layer.n_slices
        what = "no adapter"
        if adapter is not None:
            given = [adapter.tensors.get(part) for part in trial.parts]
            m = [None if tensors is None else tensors[2] for tensors in given]
            dora = any(each is not None for each in m)
            what = f"{'DoRA' if dora else 'LoRA'} in slot {adapter.slot}"
            if dora:
                magnitudes = layer._local(m[0] if len(trial.parts) == 1 else m)
        start = 0
        for number, size in enumerate(layer.output_slices):
            rows = torch.linspace(start, start + size - 1, min(size, _ROWS)).long().to(layer.device)
            right = z[tokens][:, rows]
            if adapter is not None:
                m_O = magnitudes[number]
                a = layer.lora_a_stacked[number][adapter.slot, 0].double()
                b = layer.lora_b_stacked[number][adapter.slot, 0][rows - start].double()
                right = right + x[tokens].double() @ lora_delta(a, b, 1.0).T
                if m_O is not None:
                    norm = dora_norm(layer.rows_of_base(rows).double(), a, b, 1.0)
                    norm = layer.over_all_ranks(norm, adapter.id)
                    right = right * dora_scale(m_O.to(norm)[rows - start], norm)
            found = y[tokens][:, rows]
            _note(trial, f"{what}, {'prefill' if prefill else 'decoding'}", found, right + bias[rows].double(), dtype)
            start += size


def _note(trial: _Trial, what: str, found: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """Keep how far off something is, if it is farther than rounding explains: three roundings to `dtype`, or TF32's."""
    off = float((found - right).norm() / right.norm().clamp_min(1e-30))
    if not off <= 2 * max(torch.finfo(dtype).eps, _TF32):
        trial.problems[what] = off


def _told(trial: _Trial) -> str | None:
    """What was found about a layer, if it is not right."""
    if not trial.problems:
        return None
    worst = max(trial.problems, key=lambda what: trial.problems[what])
    more = f" (and {len(trial.problems) - 1} more of what was tried)" if len(trial.problems) > 1 else ""
    return f"in {trial.name} {worst} is off by {trial.problems[worst]:.2g} of what the formula gives{more}"


def _leave(manager: Any, trials: Sequence[_Trial]) -> None:
    """Everything as it was before."""
    manager.remove_all_adapters()
    for trial in trials:
        for slot in range(manager.lora_slots):
            trial.layer.reset_lora(slot)
