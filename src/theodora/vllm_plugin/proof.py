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
from dataclasses import dataclass, field, replace
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
    """What a slot was given. Its tensors are made anew where they are needed: all slots' at once may be gigabytes."""

    id: int
    slot: int
    dora: bool
    rank: int
    whole: bool
    """Whether it adapts all modules of a packed layer, or all but the first."""

    def tensors(self, trial: _Trial) -> list[tuple[Tensor, Tensor, Tensor | None] | None]:
        """A, B and m of each of a layer's modules, over all ranks and the same on all; m of DoRA alone."""
        random = torch.Generator().manual_seed(100 * self.id + 10 * self.dora + len(trial.parts))
        inside = trial.layer.base_layer.input_size
        made: list[tuple[Tensor, Tensor, Tensor | None] | None] = []
        for number, rows in enumerate(trial.sizes):
            a = torch.randn(self.rank, inside, generator=random) / inside**0.5
            b = torch.randn(rows, self.rank, generator=random) / self.rank**0.5
            m = torch.rand(rows, generator=random) + 0.5 if self.dora else None
            left_out = (self.dora and not trial.dora) or (number == 0 and not self.whole and len(trial.sizes) > 1)
            made.append(None if left_out else (a, b, m))
        return made


def prove(manager: Any, dtype: torch.dtype, versions: str) -> None:
    """Try the layers of a model that was just given its LoRA layers, and let those serve DoRA that are right.

    Args:
        manager: vLLM's LoRAModelManager, without an adapter.
        dtype: of activations.
        versions: whose these layers are, and which the tests ran on, for what is logged.
    """
    kinds: dict[Any, list[tuple[str, DoraLayer]]] = {}
    for name, layer in manager.modules.items():
        if isinstance(layer, DoraLayer) and layer.dora_plain:
            kinds.setdefault(_kind(layer), []).append((name, layer))
    if not kinds:
        return
    trials = [_trial(manager, *layers[0]) for layers in kinds.values()]
    begun = time.perf_counter()
    found = _try(manager, [trial for trial in trials if isinstance(trial, _Trial)], dtype)
    why = [found or (trial if isinstance(trial, str) else _told(trial)) for trial in trials]
    why = _agreed(why, next(iter(kinds.values()))[0][1])
    for layers, reason in zip(kinds.values(), why, strict=True):
        for _, layer in layers:
            layer.dora_unproved = reason
    if any(why):
        _log.warning(
            "Theodora's DoRA plug-in could not prove itself here. It refuses DoRA adapters on these layers; base and "
            "LoRA are served by vLLM alone. %s.%s",
            versions,
            bullet_list([f"{kind[0].__name__}: {each}" for kind, each in zip(kinds, why, strict=True) if each], _SHOWN),
        )
    else:
        _log.info(
            "%d kinds of layers gave what the formula gives in all %d slots (%.1f s), %d of them with DoRA. %s.",
            len(trials),
            manager.lora_slots,
            time.perf_counter() - begun,
            sum(isinstance(trial, _Trial) and trial.dora for trial in trials),
            versions,
        )


def _try(manager: Any, trials: Sequence[_Trial], dtype: torch.dtype) -> str | None:
    """Run the trials, leave no trace, and say why none of them counts, if that is so."""
    try:
        with torch.inference_mode():
            for number in range(2):
                _run(manager, trials, dtype, number)
    except Exception as error:  # of a vLLM that is another: it may be anything, and vLLM itself has to go on
        return f"{type(error).__name__}: {error}"
    finally:
        manager.remove_all_adapters()
        for trial in trials:
            for slot in range(manager.lora_slots):
                trial.layer.reset_lora(slot)
    return None


def _agreed(why: list[str | None], layer: Any) -> list[str | None]:
    """The same on all ranks, or an adapter would be taken by some: what one found wrong, all do not use."""
    if layer.tp_size == 1:
        return why
    from vllm.distributed import tensor_model_parallel_all_reduce

    wrong = torch.tensor([each is not None for each in why], dtype=torch.float32, device=layer.device)
    wrong = tensor_model_parallel_all_reduce(wrong)
    return [
        each or ("another rank found it wrong, and says so in its log" if float(count) else None)
        for each, count in zip(why, wrong, strict=True)
    ]


def _kind(layer: Any) -> tuple[Any, ...]:
    base = layer.base_layer
    weight = getattr(base, "weight", None)
    stored = None if weight is None else (weight.dtype, weight.numel() > 0)
    return type(layer), type(base), type(getattr(base, "quant_method", None)), layer.n_slices, stored


def _trial(manager: Any, name: str, layer: Any) -> _Trial | str:
    """How a layer is tried, or why it is not."""
    try:
        sizes = _sizes(layer.base_layer)
    except AttributeError as error:
        return f"AttributeError: {error}"
    parts = list(manager.packed_modules.get(name) or [name])
    if len(parts) not in (1, len(sizes)):
        return f"{len(parts)} modules are packed into {len(sizes)} slices, and which goes where is not known"
    layer.dora_unproved = None  # while it is tried
    return _Trial(
        name=name,
        layer=layer,
        parts=parts,
        sizes=[sum(sizes)] if len(parts) == 1 else sizes,
        dora=layer.unfit() is None,
    )


def _sizes(base: Any) -> list[int]:
    """Output rows of each slice of a layer, over all ranks."""
    if not hasattr(base, "total_num_heads"):
        return list(getattr(base, "output_sizes", None) or [base.output_size])
    # Its output_sizes count a head of keys for each rank that holds it.
    heads, keys = base.total_num_heads, base.total_num_kv_heads
    return [heads * base.head_size, keys * base.head_size, keys * getattr(base, "v_head_size", base.head_size)]


def _run(manager: Any, trials: Sequence[_Trial], dtype: torch.dtype, number: int) -> None:
    """A round: an adapter in every slot, DoRA and LoRA by turns, and the other way round in the next."""
    most = manager.lora_config.max_lora_rank
    adapters = [
        _load(manager, trials, slot, dora=(slot + number) % 2 == 0, rank=most if number == 0 else max(1, most // 2))
        for slot in range(manager.lora_slots)
    ]
    for trial in trials:
        if trial.layer.tp_size == 1:
            for adapter in adapters:
                _compare_slot(trial, adapter)
        for prefill in (True, False):
            for batch in _batches(manager, adapters):
                _compare_outputs(manager, trial, batch, prefill, dtype)
    manager.remove_all_adapters()


def _load(manager: Any, trials: Sequence[_Trial], number: int, *, dora: bool, rank: int) -> _Adapter:
    """Make a random adapter, and bring it into a slot as vLLM does."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    most = manager.lora_config.max_lora_rank
    adapter = _Adapter(id=number + 1, slot=number, dora=dora, rank=rank, whole=rank == most)
    tensors: dict[str, Tensor] = {}
    for trial in trials:
        for part, given in zip(trial.parts, adapter.tensors(trial), strict=True):
            if given is not None:
                names = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
                held = {f"base_model.model.{part}.{name}": t for name, t in zip(names, given, strict=True)}
                tensors |= {name: t for name, t in held.items() if t is not None}
    helper = PEFTHelper(r=rank, lora_alpha=_ALPHA * rank, target_modules="all-linear", use_dora=dora)
    stored = manager.lora_config.lora_dtype
    lora = LoRAModel.from_lora_tensors(adapter.id, tensors, helper, device="cpu", dtype=stored)
    manager.add_adapter(lora)
    manager.activate_adapter(lora.id)
    return replace(adapter, slot=manager.lora_index_to_id.index(lora.id))


def _batches(manager: Any, adapters: Sequence[_Adapter]) -> Iterator[list[_Adapter | None]]:
    """All adapters and none, by as many as fit into a batch of this server."""
    most = max(2, min(manager.max_num_seqs, manager.max_num_batched_tokens // _TOKENS)) - 1
    for start in range(0, len(adapters), most):
        yield [*adapters[start : start + most], None] if manager.max_num_seqs > 1 else list(adapters[start : start + 1])
    if manager.max_num_seqs == 1:
        yield [None]


def _compare_slot(trial: _Trial, adapter: _Adapter) -> None:
    """A and s·B lie where they belong, and zeros beside them. (Of whole layers: parts are cut by vLLM.)"""
    layer, slot = trial.layer, adapter.slot
    b_found = torch.cat([b[slot, 0] for b in layer.lora_b_stacked]).double().cpu()
    b_right = torch.zeros_like(b_found)
    start = 0
    for number, (rows, given) in enumerate(zip(trial.sizes, adapter.tensors(trial), strict=True)):
        found = layer.lora_a_stacked[number][slot, 0].double().cpu()
        right = torch.zeros_like(found)
        if given is not None:
            right[: adapter.rank] = given[0]
            b_right[start : start + rows, : adapter.rank] = _ALPHA * given[1]
        _note(trial, f"lora_A in slot {slot}", found, right, layer.lora_a_stacked[number].dtype)
        start += rows
    _note(trial, f"scale · lora_B in slot {slot}", b_found, b_right, layer.lora_b_stacked[0].dtype)


def _compare_outputs(
    manager: Any, trial: _Trial, batch: Sequence[_Adapter | None], prefill: bool, dtype: torch.dtype
) -> None:
    """y of a batch with tokens of these adapters against the formula."""
    from vllm.lora.layers import LoRAMapping

    layer: Any = trial.layer
    ids = [0 if adapter is None else adapter.id for adapter in batch]
    of_tokens = [id for id in ids for _ in range(_TOKENS)] if prefill else ids
    mapping = LoRAMapping(tuple(of_tokens), tuple(ids), is_prefill=prefill)
    layer.punica_wrapper.update_metadata(mapping, manager.lora_index_to_id, manager.lora_slots + 1, manager.vocab_size)
    random = torch.Generator().manual_seed(len(of_tokens))
    x = torch.randn(len(of_tokens), layer.lora_a_stacked[0].shape[-1], generator=random).to(layer.device, dtype)
    bias = torch.randn(sum(layer.output_slices), generator=random).to(layer.device, dtype)
    found = layer.apply(x, bias).double()
    base = layer.base_layer.quant_method.apply(layer.base_layer, x, None).double()
    of_each = torch.arange(len(of_tokens)).split(len(of_tokens) // len(ids))
    for adapter, tokens in zip(batch, of_each, strict=True):
        what = "no adapter" if adapter is None else f"{'DoRA' if adapter.dora else 'LoRA'} in slot {adapter.slot}"
        for rows, right in _formula(trial, adapter, x[tokens].double(), base[tokens]):
            part = found[tokens][:, rows]
            _note(trial, f"{what} ({'prefill' if prefill else 'decoding'})", part, right + bias[rows].double(), dtype)


def _formula(trial: _Trial, adapter: _Adapter | None, x_TI: Tensor, base_TO: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of each slice, and what the layer gives there without its bias, float64."""
    layer: Any = trial.layer
    magnitudes: list[Tensor | None] = [None] * layer.n_slices
    if adapter is not None and adapter.dora and trial.dora:
        given = [None if each is None else each[2] for each in adapter.tensors(trial)]
        magnitudes = layer._local(given[0] if len(trial.parts) == 1 else given)
    start = 0
    for number, size in enumerate(layer.output_slices):
        rows = torch.linspace(0, size - 1, min(size, _ROWS)).long().to(layer.device)
        y = base_TO[:, start + rows]
        if adapter is not None:
            a = layer.lora_a_stacked[number][adapter.slot, 0].double()
            b = layer.lora_b_stacked[number][adapter.slot, 0][rows].double()
            y = y + x_TI @ lora_delta(a, b, 1.0).T
            if (m := magnitudes[number]) is not None:
                norm = dora_norm(layer.rows_of_base(start + rows).double(), a, b, 1.0)
                norm = layer.over_all_ranks(norm, adapter.id)
                y = y * dora_scale(m.to(norm)[rows], norm)
        yield start + rows, y
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
