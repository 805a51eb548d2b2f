"""Linear layers of other libraries that store their weight quantised: the one file that knows them.

    weight = library_weight(module, module.weight)      # LibraryWeight, or None for a plain weight

A module is known by its class, a tensor by its own. No library is imported: where one has not been, no module is its.

| library | module | weight |
|---|---|---|
| bitsandbytes | `Linear4bit` (NF4, FP4, double quantised or not) | `Params4bit`, and the `quant_state` on it |
| bitsandbytes | `Linear8bitLt` (LLM.int8()) | `Int8Params`, and SCB on it or on the module's `state` |
| torchao | `nn.Linear` | a tensor of torchao's, of two dimensions, that can `dequantize` |
| HQQ, GPTQ, AWQ, compressed-tensors, fine-grained FP8 | in `packed.py` | |

Shapes: O out features, I in features.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from theodora.kernels.formats import Bits4, Bits8, Subclass
from theodora.kernels.library_weight import LibraryWeight
from theodora.kernels.packed_formats import Awq, Gptq
from theodora.kernels.packed_sizes import WORD, why_groups_beyond, why_not_awq, why_not_gptq
from theodora.layers import packed
from theodora.layers.packed import DTYPE as _DTYPE

PAPER = "_theodora_paper"
"""Where a tensor of the meta device, which no library can pack, notes the `LibraryWeight` that it would be."""
_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_log = logging.getLogger(__name__)


def runs_as_linear(module: nn.Module) -> bool:
    """Whether the module is a library's linear layer, by the forward of its class."""
    if packed.runs_as_linear(module):
        return True
    forward = type(module).forward
    return any(forward is known.forward for known in (_class("Linear4bit"), _class("Linear8bitLt")) if known)


def library_weight(module: nn.Module, tensor: Tensor) -> LibraryWeight | None:
    """The weight `tensor` of `module` as a library stores it; None if it is a plain tensor, or not ready for use."""
    if tensor.is_meta and (paper := getattr(tensor, PAPER, None)) is not None:
        return paper
    if (weight := packed.packed_weight(module, tensor)) is not None:
        return weight
    if type(tensor) in (nn.Parameter, Tensor):
        return _of_lost_class(module, tensor)
    if _is(tensor, "Params4bit"):
        return _bits4(module, tensor)
    if _is(tensor, "Int8Params"):
        return _bits8(module, tensor)
    return _subclass(tensor)


def why_unfit(module: nn.Module, tensor: Any) -> str | None:
    """Why a library's module has no frozen weight to stand beside: part of a sentence, or None if it has one."""
    if (reason := packed.why_packed_unfit(module)) is not None:
        return reason
    if _is(tensor, "Int8Params") and module.state.has_fp16_weights:  # pyright: ignore[reportAttributeAccessIssue]
        return (
            "its weight is trained in 16 bits and quantised in each pass; expected Linear8bitLt with "
            "has_fp16_weights=False, or nn.Linear"
        )
    waits4 = _is(tensor, "Params4bit") and _state4(module, tensor) is None
    if waits4 or (_is(tensor, "Int8Params") and tensor.dtype != torch.int8):
        return (
            "bitsandbytes has not quantised its weight yet, which moving the model to its device does "
            f"(model.to({tensor.device.type!r}))"
        )
    return None


def why_damaged(module: nn.Module) -> str | None:
    """What a file has made of a library's weight that its layer cannot be computed with: part of a sentence, or None.

    By sizes alone: bitsandbytes' kernels read as far as they are told, beyond the end of memory, too.
    """
    if (told := _why_packed(module)) is not None:
        return told
    tensor: Any = getattr(module, "weight", None)
    sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    if not isinstance(tensor, Tensor) or tensor.is_meta or None in sizes:
        return None
    if _is(module, "Linear4bit"):
        state = _state4(module, tensor)
        if state is None:
            return None if tensor.is_floating_point() else "it is packed, and its quant_state is missing"
        return None if getattr(state, "packing_format_for_cpu", False) else _why_4bit(tensor, state, sizes)
    if _is(module, "Linear8bitLt") and tensor.dtype == torch.int8:
        state8: Any = module.state
        scale = state8.SCB if getattr(tensor, "SCB", None) is None else tensor.SCB  # pyright: ignore
        if scale is None:
            return "it is packed, and its scales (SCB) are missing"
        if scale.numel() != tensor.shape[0]:
            return f"it has {scale.numel():,} scales; expected {tensor.shape[0]:,}"
    elif not type(tensor).__module__.startswith("torchao."):
        return None
    if tuple(tensor.shape) != sizes:
        return f"it is {tuple(tensor.shape)}; expected (out, in) {sizes}"
    return _why_blocks(tensor, sizes) if type(tensor).__name__ in _IN_BLOCKS else None


def _why_packed(module: nn.Module) -> str | None:
    """Of the modules in `packed.py`."""
    held = held_weight(module)
    weight = packed.packed_weight(module, held) if isinstance(held, Tensor) and not held.is_meta else None
    if weight is None or packed.why_packed_unfit(module) is not None:  # (others' layouts, which are told of elsewhere)
        return None
    form, tensors = weight.format, weight.tensors()
    group: Any = getattr(module, "group_size", None)
    if isinstance(form, Gptq) and form.pack == WORD:
        return why_not_gptq(_named(_GPTQ, tensors), form.bits, group, form.shape) or why_groups_beyond(
            tensors[3], len(tensors[2])
        )
    if isinstance(form, Awq):
        return why_not_awq(_named(_GPTQ[:3], tensors), form.bits, group, form.shape)
    return None


_GPTQ = ("qweight", "qzeros", "scales", "g_idx")


def _named(names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(names, tensors, strict=True))


_IN_BLOCKS = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
"""Of torchao: with a scale for each block."""


def _why_blocks(tensor: Any, sizes: tuple[Any, ...]) -> str | None:
    block = tuple(tensor.block_size)
    if len(block) != len(sizes) or not all(isinstance(side, int) and side > 0 for side in block):
        return f"its blocks are {block}; expected two sizes"
    wanted = 1
    for size, side in zip(sizes, block, strict=True):
        wanted *= -(-size // side)
    for name in ("scale", "zero_point"):
        part = getattr(tensor, name, None)
        if isinstance(part, Tensor) and part.numel() != wanted:
            return f"its {name} has {part.numel():,} numbers; expected {wanted:,}, one for each block {block}"
    return None


def _why_4bit(tensor: Any, state: Any, sizes: tuple[Any, ...]) -> str | None:
    if tuple(state.shape) != sizes:
        return f"it is {tuple(state.shape)}; expected (out, in) {sizes}"
    numbers, outer = sizes[0] * sizes[1], state.state2
    expected = [("bytes", tensor.nbytes, -(-numbers // 2))]
    blocks = -(-numbers // state.blocksize) if state.blocksize > 0 else 0
    expected += [("scales", state.absmax.numel(), blocks), ("numbers in its format", state.code.numel(), 16)]
    if outer is not None:
        blocks = -(-blocks // outer.blocksize) if outer.blocksize > 0 else 0
        expected += [("scales of scales", outer.absmax.numel(), blocks), ("numbers for them", outer.code.numel(), 256)]
    return next((f"it has {n:,} {what}; expected {wanted:,}" for what, n, wanted in expected if n != wanted), None)


def reads_packed(module: nn.Module) -> bool:
    """Whether the forward of the module's own class reads a packed weight, and no plain one in its place."""
    return packed.packed_tensor(module) is not None or _is(module, "Linear4bit") or _is(module, "Linear8bitLt")


def held_weight(module: nn.Module) -> Any:
    """What the module holds as its weight: its `weight`, or its packed numbers by another name."""
    weight = packed.packed_tensor(module)
    return getattr(module, "weight", None) if weight is None else weight


def prepare(model: nn.Module) -> None:
    """Make the layers of bitsandbytes ready for adapters; what they compute stays.

    On CPUs with AVX512-BF16 `Linear4bit` repacks its weight for inference and rounds the largest number of each block
    to bfloat16: training and inference would run on two weights, and the first could not be had back. So that is
    switched off. Its bias, which its own first forward pass would round to the compute dtype, in place, is rounded now;
    and where it has no compute dtype, that pass no longer chooses one for good, which would round W otherwise than
    before. `Linear8bitLt` does not remember which dtype its weight had: it is the model's.

    Says once which layers it dequantises wrongly on this CPU.
    """
    dtype_of_model = cache(partial(_dtype_of, model))  # asked for where a layer has forgotten it, once
    packed.prepare_model(model, dtype_of_model)
    for module in model.modules():
        if _is(module, "Linear4bit"):
            _prepare4(module)
        elif _is(module, "Linear8bitLt"):
            module.__dict__.setdefault(_DTYPE, dtype_of_model())
    _say_what_is_wrong(model)


def _prepare4(module: Any) -> None:
    module.support_avx512bf16_for_cpu = False
    module.compute_type_is_set = True
    bias, compute = module.bias, module.compute_dtype
    if bias is not None and compute is not None and bias.dtype != compute:
        bias.data = bias.data.to(compute)


_TOLD: WeakSet[nn.Module] = WeakSet()
"""Layers of which `_say_what_is_wrong` has spoken, or which it has found right."""


def _say_what_is_wrong(model: nn.Module) -> None:
    """Warn of layers on the CPU whose rows bitsandbytes (0.50.2) dequantises with the scales of other blocks.

    Rows that are no multiple of a block are what its kernels for CPUs may get wrong; as one long row they are right.
    """
    off: dict[str, float] = {}
    found: dict[Bits4, float] = {}  # equal formats fare alike
    for path, module in model.named_modules():
        tensor = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
        if not _is(module, "Linear4bit") or module in _TOLD or tensor is None or tensor.device.type != "cpu":
            continue
        weight = library_weight(module, tensor)
        if weight is None or not isinstance(form := weight.format, Bits4):
            continue  # not quantised yet, or merged
        _TOLD.add(module)
        if form.shape[1] % form.block:
            if form not in found:
                found[form] = form.off(weight.tensors())
            if found[form] > _OFF:
                off[path or type(model).__name__] = found[form]
    if off:
        some = ", ".join(list(off)[:3]) + (", …" if len(off) > 3 else "")
        _log.warning(
            f"On this CPU bitsandbytes computes wrongly in {len(off)} of the model's layers ({some}): their rows are "
            "no multiple of its block, and it takes other blocks' scales. Their weights are off by up to "
            f"{max(off.values()):.0%}, and what is trained beside them does not fit the same model on a GPU. Use a "
            "GPU, quantise in 8 bits, or leave these layers as they are (llm_int8_skip_modules)."
        )


_OFF = 1e-3
"""Beyond rounding."""


def why_not_captured(model: nn.Module) -> str | None:
    """What keeps the model's products out of CUDA graphs: part of a panel's line, or None."""
    for module in model.modules():
        tensor = packed.packed_tensor(module)
        if tensor is None:
            tensor = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
        weight = None if tensor is None else library_weight(module, tensor)
        if weight is not None and not weight.captures:
            return f"the host waits in each product of {weight.format.name} (not with llm_int8_threshold=0)"
    return None


def moved(parameter: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> bool:
    """Apply `fn`, which `nn.Module._apply` hands on, to a library's parameter that is no module's at the moment.

    Returns:
        Whether it was a library's.
    """
    if _is(parameter, "Params4bit") or _is(parameter, "Int8Params"):
        new: Any = fn(parameter)  # moves the quant_state, too
        parameter.data = new.data
        if getattr(new, "SCB", None) is not None:
            parameter.CB, parameter.SCB = new.CB, new.SCB  # pyright: ignore[reportAttributeAccessIssue]
        return True
    return False


def follow(module: nn.Module) -> None:
    """After a move: the state of a `Linear8bitLt`, which moves with nobody, goes where its weight is."""
    packed.follow_packed(module)
    if not _is(module, "Linear8bitLt"):
        return
    state: Any = module.state
    parameter: Any = getattr(module, "base_parameter", module.weight)
    if state.SCB is not None and parameter.device.type != "meta":
        state.SCB = state.SCB.to(parameter.device)
        state.CB = parameter.data


@contextmanager
def tokens_by_themselves(model: nn.Module) -> Iterator[None]:
    """Inside the block no layer rounds a token by what others of its batch are.

    LLM.int8() leaves out of the rounding the columns in which any token of the batch is large: a later token then
    changes what earlier ones come out as, and a model looks as if it saw ahead, or rows that are packed each other.
    """
    with _threshold_of(model, 0.0):
        yield


@contextmanager
def inputs_unrounded(model: nn.Module) -> Iterator[bool]:
    """Inside the block LLM.int8() rounds no x to eight bits: all of its columns are beyond the threshold.

    Yields:
        Whether there are such layers.
    """
    with _threshold_of(model, _BELOW_ALL) as layers:
        yield layers > 0


_BELOW_ALL = 1e-30


@contextmanager
def _threshold_of(model: nn.Module, threshold: float) -> Iterator[int]:
    """LLM.int8() with another threshold; gives the number of its layers."""
    states: list[Any] = [m.state for m in model.modules() if _is(m, "Linear8bitLt")]
    before = [state.threshold for state in states]
    for state in states:
        state.threshold = threshold
    try:
        yield len(states)
    finally:
        for state, was in zip(states, before, strict=True):
            state.threshold = was


def _class(name: str) -> type[Any] | None:
    library = sys.modules.get("bitsandbytes.nn")
    return None if library is None else getattr(library, name, None)


def _is(thing: Any, name: str) -> bool:
    """Whether a module or a tensor is of that class of bitsandbytes'."""
    known = _class(name)
    return known is not None and isinstance(thing, known)


def _of_lost_class(module: Any, tensor: Tensor) -> LibraryWeight | None:
    """A packed weight that is a plain tensor: sharding and pickling keep the numbers, and the module their state."""
    if tensor.dtype == torch.int8:
        return _bits8(module, tensor) if _is(module, "Linear8bitLt") else None
    state = module.__dict__.get("quant_state")
    if state is None or tensor.dtype != module.quant_storage or tensor.dim() != 2 or tensor.shape[1] != 1:
        return None
    return _bits4(module, tensor)


def _state4(module: nn.Module, tensor: Any) -> Any:
    state = getattr(tensor, "quant_state", None)  # (lost where torch has pickled or sharded the weight)
    return getattr(module, "quant_state", None) if state is None else state


def _bits4(module: Any, tensor: Any) -> LibraryWeight | None:
    state = _state4(module, tensor)
    if state is None:
        return None
    if getattr(state, "packing_format_for_cpu", False):
        _unpack(tensor, state)
    outputs, inputs = state.shape
    compute = module.compute_dtype
    packed = tensor.detach().view(torch.uint8)  # (which, unlike `.data`, shares the count of writes)
    outer = getattr(state, "state2", None)
    nested = () if outer is None else (outer.absmax, outer.code, state.offset)
    form = Bits4(
        (outputs, inputs),
        compute or state.dtype,
        table=state.quant_type,
        block=state.blocksize,
        nested=0 if outer is None else outer.blocksize,
        compute=compute,
    )
    return LibraryWeight(form, packed, state.absmax, *nested)


def _unpack(tensor: Any, state: Any) -> None:
    """Undo the packing for inference on CPUs with AVX512-BF16, with the numbers that it has left.

    (The library's own way back quantises them once more.)
    """
    _log.warning(
        "bitsandbytes had packed a weight for inference on this CPU, and rounded the largest number of each of its "
        "blocks to bfloat16: the adapter sees the rounded weight. Put adapters on a model before it first runs."
    )
    unpack = sys.modules["bitsandbytes.functional"]._convert_weight_packed_for_cpu_inverse
    nested, state.original_nested = state.original_nested, False
    tensor.data, _ = unpack(tensor.data, state)
    state.original_nested = nested
    state.absmax = state.absmax.T.reshape(-1).float()
    state.nested, state.state2, state.offset = False, None, None


def _bits8(module: Any, tensor: Any) -> LibraryWeight | None:
    if tensor.dtype != torch.int8:
        return None
    state = module.state
    scale = tensor.SCB if getattr(tensor, "SCB", None) is not None else state.SCB
    if scale is None:
        return None
    outputs, inputs = tensor.shape
    dtype = getattr(module, _DTYPE, None) or (torch.float16 if module.bias is None else module.bias.dtype)
    whole = tensor.device.type != "cpu" or not module.training
    form = Bits8((outputs, inputs), dtype, threshold=state.threshold, int8_product=whole)
    return LibraryWeight(form, tensor.detach(), scale.to(tensor.device))


def _subclass(tensor: Any) -> LibraryWeight | None:
    kind = type(tensor)
    if not kind.__module__.startswith("torchao.") or not hasattr(kind, "dequantize") or tensor.dim() != 2:
        return None
    outputs, inputs = tensor.shape
    rounds = any(getattr(tensor, name, None) is not None for name in _ACTIVATION)
    numbers = getattr(tensor, "target_dtype", None)
    name = f"torchao {kind.__name__}" + ("" if numbers is None else f" ({str(numbers).removeprefix('torch.')})")
    return LibraryWeight(Subclass((outputs, inputs), tensor.dtype, name, rounds), tensor)


_ACTIVATION = ("act_quant_kwargs", "activation_quantization")
"""Where torchao's tensors say how x is quantised in their products."""


def _dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that most of the model's plain numbers are in."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.dtype in _PLAIN and type(parameter) is nn.Parameter:
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float16)
