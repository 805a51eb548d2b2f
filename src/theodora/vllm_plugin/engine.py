"""vLLM's engine in this process, for one DoRA or LoRA adapter that changes between the calls.

    engine = Engine("org/model", dtype="bfloat16", rank=16, length=1024, rows=64)
    engine.take("folder/of/adapter")            # the old one is forgotten
    drawn = engine.draw(prompts, seeds, max_tokens=256, ends=[2])
    engine.close()

The engine has weights of its own, those of the base on disk; of the adapter it gets the small tensors alone, whose g
the plug-in computes. DoRA that the plug-in could not prove itself on is refused (`proof`), and so is all DoRA where the
plug-in does not fit vLLM: magnitudes are never dropped.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import distributed

from theodora.errors import ConfigError
from theodora.vllm_plugin import register

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM makes room for."""
LEAST_TEMPERATURE = 0.01
"""vLLM takes this where less was asked for."""
_LOG = "vllm"
_BATCHED_TOKENS = 4096  # as TRL has it: with vLLM's 32768 its profile of memory asks for more than there is


_OPEN: WeakSet[Engine] = WeakSet()


class Engine:
    """Draws from a base model with the adapter that it was given last. There is one in a process: a new one closes
    another that was left open.

    Args:
        model: a folder, or a name on the hub.
        dtype: of the base's weights.
        rank: of the adapters, at most.
        length: tokens of prompt and completion, at most.
        rows: completions under way at a time, at most; others wait.
        temperature: that tokens are drawn with.
        filters: whether anything (top_p, top_k, min_p, a penalty) changes what the temperature leaves.
        eager: whether nothing is compiled or recorded.
        share: of the device's memory, for the weights and for keys and values.
        sleeps: whether the memory is given back between the calls.
        revision: on the hub.
        trust_remote_code: whether the model's own code may run.

    Raises:
        ConfigError: vLLM cannot load the model so, or torch.distributed joins processes here.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        rank: int,
        length: int,
        rows: int,
        temperature: float = 1.0,
        filters: bool = False,
        eager: bool = False,
        share: float = 0.3,
        sleeps: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._temperature, self._sleeps, self._number = temperature, sleeps, 0
        self._llm: Any = None
        self._adapter: Any = None
        for other in list(_OPEN):
            other.close()
        if distributed.is_available() and distributed.is_initialized():
            raise ConfigError("vLLM joins processes by itself, and torch.distributed has done so here already.")
        with _apart():
            from vllm import LLM
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            register()  # which vLLM does by itself where it finds the entry point
            try:
                self._llm = LLM(
                    model,
                    revision=revision,
                    trust_remote_code=trust_remote_code,
                    load_format="safetensors",
                    model_impl="vllm",
                    skip_tokenizer_init=True,
                    generation_config="vllm",  # nothing of the model's own
                    dtype=dtype,
                    max_model_len=length,
                    max_num_seqs=rows,
                    max_num_batched_tokens=max(_BATCHED_TOKENS, rows),
                    gpu_memory_utilization=share,
                    enforce_eager=eager,
                    enable_sleep_mode=sleeps,
                    use_tqdm_on_load=False,
                    enable_lora=True,
                    max_loras=1,
                    max_lora_rank=next(size for size in RANKS if size >= rank),
                    # Of the model's own logits if they are drawn from as they are; what filters leave is no softmax.
                    logprobs_mode="raw_logprobs" if filters or temperature == 1 else "processed_logprobs",
                )
                if filters and temperature != 1:
                    # Penalty and filters do the same to logits that were divided before, and log-probabilities are
                    # of those.
                    self._llm.apply_model(_Tempered(temperature))
                    self._temperature = 1.0
            except Exception as error:  # of vLLM's: any of them says that it does not go so
                self.close()
                cleanup_dist_env_and_memory()  # what it had begun
                raise ConfigError(
                    f"vLLM does not load {model} in {share:g} of the memory (vllm_gpu_memory_utilization): "
                    f"{_first_line(error)}"
                ) from error
        _OPEN.add(self)
        self._rest()

    def take(self, folder: str) -> None:
        """Draw with this adapter from now on.

        Raises:
            ConfigError: it cannot be served right.
        """
        from vllm.lora.request import LoRARequest

        with _apart():
            if self._sleeps:
                self._llm.wake_up()
            engine = self._llm.llm_engine
            if self._adapter is not None:
                engine.remove_lora(self._adapter.lora_int_id)
            # Another name each time: keys and values of prompts are remembered under it.
            self._number += 1
            self._adapter = LoRARequest(f"policy-{self._number}", self._number, folder)
            try:
                taken = engine.add_lora(self._adapter)
            except Exception as error:
                raise ConfigError(f"vLLM with Theodora's plug-in does not take this adapter: {error}") from error
        if not taken:
            raise ConfigError("vLLM did not take the adapter, and said nothing of it.")

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_tokens: int,
        ends: Sequence[int],
        **how: Any,
    ) -> list[tuple[list[int], list[float]]]:
        """Tokens after each prompt, with the one that ends them, and their log softmax(logits / temperature).

        Args:
            prompts: token ids.
            seeds: one for each, below 2⁶³.
            max_tokens: of each, at most.
            ends: tokens that end it.
            **how: as of vLLM's SamplingParams.
        """
        from vllm import SamplingParams

        with _apart():
            settings = [
                SamplingParams(
                    temperature=self._temperature,
                    max_tokens=max_tokens,
                    stop_token_ids=list(ends),
                    ignore_eos=True,  # those of the model's configuration
                    seed=seed,
                    logprobs=0,
                    detokenize=False,
                    **how,
                )
                for seed in seeds
            ]
            asked: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
            outputs = self._llm.generate(asked, settings, lora_request=self._adapter, use_tqdm=False)
        self._rest()
        drawn: list[tuple[list[int], list[float]]] = []
        for output in outputs:
            (one,) = output.outputs
            tokens = list(one.token_ids)
            logps = [float(step[token].logprob) for token, step in zip(tokens, one.logprobs, strict=True)]
            drawn.append((tokens, logps))
        return drawn

    def _rest(self) -> None:
        """Give the memory back until the next adapter comes, if it was asked for."""
        if self._sleeps:
            with _apart():
                self._llm.sleep(level=1)  # the weights to main memory; keys and values are forgotten

    @property
    def closed(self) -> bool:
        """Whether it can draw no more."""
        return self._llm is None

    def close(self) -> None:
        """Give back all memory."""
        if self._llm is None:
            return
        with _apart():
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = self._adapter = None
            gc.collect()  # its parts hold one another
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


class _Tempered:
    """Lets a model divide its logits by a temperature."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, model: Any) -> None:
        model.logits_processor.scale /= self.temperature


@contextmanager
def _apart() -> Iterator[None]:
    """While it lasts vLLM sees to itself: random numbers, threads, settings and the log are left as they were."""
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: it gets adapters, and nothing is sent
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # cores, which training needs, too
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
    }
    before = {name: os.environ.get(name) for name in settings}
    log, threads = logging.getLogger(_LOG), torch.set_num_threads
    level, python, numpy = log.level, random.getstate(), np.random.get_state()
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = [torch.cuda.current_device()] if cuda else []
    os.environ.update(settings)
    log.setLevel(settings["VLLM_LOGGING_LEVEL"])
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its libraries
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads = threads  # which vLLM puts something else for, on a CPU
        log.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
