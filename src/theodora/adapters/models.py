"""Loading a causal language model and its tokenizer, from a model folder, a hub name, or an adapter folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from theodora.adapters.heads import head_paths
from theodora.adapters.load import load_adapter, load_report
from theodora.adapters.quantize import quantize_base
from theodora.adapters.quantized import loading_options, quantization_of, trained_on
from theodora.adapters.scoring import set_padding
from theodora.adapters.state import find_state
from theodora.errors import CheckpointError, ConfigError, TheodoraError, bullet_list
from theodora.files.adapter import read_trained_on
from theodora.files.classes import auto_classes, capped_attention, check_kernels, model_alone, scoring_class
from theodora.files.distrust import expanded
from theodora.files.fingerprint import SAME_BASE
from theodora.files.generation import set_ends
from theodora.files.model_folder import (
    DTYPES,
    base_model_of,
    check_model_folder,
    check_weights,
    damaged_weights,
    has_tokenizer,
    is_adapter_folder,
    not_here,
)
from theodora.files.peft_config import check_continues_text
from theodora.files.peft_options import PEFTS_HEADS
from theodora.files.tokenizer import load_tokenizer
from theodora.layers.libraries import prepare, why_damaged

_TOLD = 5


def load_model_and_tokenizer(
    model: str | Path,
    *,
    dtype: str = "auto",
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    device: str | torch.device | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    quantize: str | None = None,
    scores: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in eval mode, with its adapter if there is one.

    Example:
        `model, tokenizer = load_model_and_tokenizer("runs/first")`: the base model of that adapter, and the adapter.

    Args:
        model: a model folder or hub name; or an adapter folder, whose base model is loaded and the adapter on it.
        dtype: of the base weights: auto (as stored, or, where they are quantised as the adapter remembers, what they
            were then), float32, bfloat16, float16, or bf16, fp16, fp32 for short.
        adapter: folder of an adapter to put on `model`.
        trust_remote_code: run Python code that comes with the model.
        revision: branch, tag or commit on the hub, of the base model.
        device: where the model goes. Default: the accelerator, if there is one.
        model_kwargs: more arguments for transformers' `from_pretrained`.
        quantize: what the frozen weights are quantised to as they are loaded: nf4, int8, int4, fp8, or none. Default:
            as they were while the adapter was trained; none without an adapter. (`base_note` says which.)
        scores: load a model that gives a text one number, a reward model, with the token that pads in its configuration
            and the tokenizer.

    Raises:
        ConfigError: an unknown dtype, or what the quantisation wants is not there.
        CheckpointError: a folder is missing, holds no model, or lacks weights that the model has.
    """
    named = None  # the adapter that says which model
    if is_adapter_folder(model):
        if adapter is not None:
            raise ConfigError(
                f"{model} is an adapter, and adapter={adapter} is another; expected a model, or one of them"
            )
        model, adapter = base_model_of(model), model
        named = adapter
    if adapter is not None and not scores:
        check_continues_text(adapter)
    place, on = torch.device(device or best_device()), None if adapter is None else read_trained_on(adapter)
    remembered = quantize is None and on is not None and on.quantize is not None
    if on is not None and quantize in (None, on.quantize) and dtype == "auto":
        dtype = on.dtype or dtype  # few bits of rounded weights are others than those of what they were rounded from
    with _named_by(named, model), _remembered(remembered):
        tokenizer = load_tokenizer(
            adapter if adapter is not None and has_tokenizer(adapter) else model,
            trust_remote_code=trust_remote_code,
            revision=None if adapter is not None and has_tokenizer(adapter) else revision,
        )
        loaded = load_model(
            model,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            revision=revision,
            model_kwargs=model_kwargs,
            quantize=on.quantize if remembered and on is not None else quantize,
            device=place,
            adapted=adapter is not None,
            remembered=remembered,
            scores=scores,
        )
    if adapter is not None:
        load_adapter(loaded, adapter)
    if scores:
        set_padding(loaded, tokenizer)
    else:
        set_ends(loaded, tokenizer)
    return move(loaded, place).eval(), tokenizer


@contextmanager
def _named_by(adapter: str | Path | None, model: str | Path) -> Iterator[None]:
    """If a model cannot be loaded because it is not here, add to the error which adapter names it."""
    try:
        yield
    except CheckpointError as error:
        if adapter is None or expanded(model).exists():
            raise
        raise CheckpointError(f"{not_here(adapter, str(model))}\n{error}") from error


@contextmanager
def _remembered(remembered: bool) -> Iterator[None]:
    """If the base cannot be quantised as an adapter remembers it, add that it need not be."""
    try:
        yield
    except ConfigError as error:
        if not remembered:
            raise
        raise ConfigError(
            f"{error}\nThe adapter was trained on a base quantised so. --quantize none takes the base as it is stored."
        ) from error


def load_model(
    model: str | Path,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    quantize: str | None = None,
    compute: torch.dtype | None = None,
    device: torch.device | None = None,
    keep: tuple[str, ...] = (),
    adapted: bool = False,
    remembered: bool = False,
    plain_for: str | None = None,
    sharded: bool = False,
    scores: bool = False,
) -> PreTrainedModel:
    """Load a causal language model, a plain one on the CPU. Arguments and errors as in `load_model_and_tokenizer`.

    Args:
        model: a model folder or hub name.
        dtype: of the weights; of a quantised model, of those that stay plain.
        trust_remote_code: run Python code that comes with the model.
        revision: branch, tag or commit on the hub.
        model_kwargs: more arguments for transformers' `from_pretrained`.
        quantize: as in `load_model_and_tokenizer`; without an adapter to look at, none by default.
        compute: dtype of a quantised weight's products. Default: the plain weights'.
        device: where a quantised model is going to be, which goes there straight. Default: the accelerator.
        keep: names of modules that are not quantised, such as those that are trained in full.
        adapted: whether an adapter comes onto it: quantisations that none can be put on are refused then.
        remembered: whether `quantize` is what an adapter remembers: a folder of quantised weights is taken as it is.
        plain_for: what is going to be done to plain weights: a folder of quantised ones is refused with it.
        sharded: whether its weights are going to be cut over processes, for which NF4 is stored otherwise.
        scores: whether the model is to give a text one number. Its head is new where the folder has none.
    """
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in ("auto", *DTYPES.values()):
        raise ConfigError(f"dtype is {dtype!r}; expected one of auto, {', '.join([*DTYPES, *DTYPES.values()])}")
    check_model_folder(model)
    bounded = check_weights(expanded(model))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    try:
        config = AutoConfig.from_pretrained(model, **options)
        check_kernels(config, model, trust_remote_code=trust_remote_code)
        if scores:
            classes, keep = [scoring_class(config, model)], (*keep, *PEFTS_HEADS["SEQ_CLS"])
        else:
            classes = auto_classes(config, model, trust_remote_code=trust_remote_code)
        options |= {
            "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
            "use_safetensors": True,  # the other format is a pickle
            **model_alone(model),
            **capped_attention(config),
            **loading_options(
                config,
                model,
                quantize=quantize,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                compute=compute,
                device=device or best_device(),
                keep=keep,
                auto_class=classes[0],
                adapted=adapted,
                trust_remote_code=trust_remote_code,
                remembered=remembered,
                plain_for=plain_for,
                sharded=sharded,
            ),
            **({"num_labels": 1} if scores else {}),
            **(model_kwargs or {}),
        }
        with bounded:
            result: Any = classes[0].from_pretrained(model, **options, output_loading_info=True)
            if result[1]["missing_keys"] and len(classes) > 1:
                result = classes[1].from_pretrained(model, **options, output_loading_info=True)
    except TheodoraError:
        raise
    except Exception as error:  # transformers raises whatever a damaged file leads it to
        why = bullet_list(damaged_weights(expanded(model))) or f" {error}"
        if is_adapter_folder(expanded(model)):  # transformers 5.17 looks at it in spite of `model_alone`
            why += "\nAn adapter lies beside the model; move its adapter_config.json into a folder of its own."
        kind = "a model that scores texts" if scores else "a causal language model"
        raise CheckpointError(f"{model} does not load as {kind}:{why}") from error
    loaded, info = result
    heads = tuple(f"{path}." for path in head_paths(loaded)) if scores else ()
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(heads))
    if missing:
        # transformers would go on with random values in their place.
        raise CheckpointError(
            f"{model} lacks {len(missing)} tensors of a {type(loaded).__name__}: {', '.join(missing[:5])}"
            + (", …" if len(missing) > 5 else "")
        )
    named = {path: why_damaged(module) for path, module in loaded.named_modules()}
    if damaged := [f"{path}: {why}" for path, why in named.items() if why is not None]:
        raise CheckpointError(f"{model} holds packed weights that are not whole:" + bullet_list(damaged, _TOLD))
    prepare(loaded)  # before the first forward pass, in which bitsandbytes packs weights anew on some CPUs
    to_float8 = quantize == "fp8" and quantization_of(loaded) is None
    return quantize_base(loaded, exclude=keep) if to_float8 else loaded


def move(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model on a device. Quantised ones are there already: libraries pack weights for the device, and some refuse
    to move them."""
    alike = model.device.type == device.type and device.index in (None, model.device.index)
    return model if alike else model.to(device)  # pyright: ignore[reportArgumentType]


def base_note(model: PreTrainedModel, name: str | None = None) -> str | None:
    """What a model is quantised to, and whether its adapter was trained on it so; None where all is plain.

    Args:
        model: with an adapter that was loaded, or without one.
        name: which; by default the active one.
    """
    here = quantization_of(model)
    if find_state(model) is None:
        return None if here is None else f"The model is quantised: {here}."
    report = load_report(model, name)
    then = None if report is None or report.trained_on is None else report.trained_on.quantization
    if here is None:
        if then is None or (report.base_distance or 0) > SAME_BASE:  # pyright: ignore[reportOptionalMemberAccess]
            return None  # (loading has warned of weights so far apart, with the reason)
        return f"The adapter was trained on its base quantised as {then}; here the base is not quantised."
    if then == here.name:
        undo = " (--quantize none loads it as it is stored)" if here.kind is not None else ""
        dtypes = [on.dtype for on in (report.trained_on, trained_on(model))]  # pyright: ignore[reportOptionalMemberAccess]
        other = (
            f", but of weights in {dtypes[1]} instead of {dtypes[0]}"
            if None not in dtypes and len({*dtypes}) > 1
            else ""
        )
        return f"The base is quantised as it was in training{other}: {here}{undo}."
    known = report is not None and report.trained_on is not None
    trained = (
        f"quantised as {then}" if then is not None else "not quantised" if known else "of a kind nobody wrote down"
    )
    return f"The base is quantised: {here}. In training it was {trained}."


def best_device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
