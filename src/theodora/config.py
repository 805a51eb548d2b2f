"""What can be chosen, and what holds if nothing is: frozen, keyword-only, checked as a whole.

The docstring under each field is also its help on the command line. This module imports no torch, so that
`theodora --help` is instant.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from theodora.adapter_config import (
    LARGEST_NUMBER,
    METHOD_NAMES,
    AdapterConfig,
    AdapterDtype,
    is_int,
    is_number,
)
from theodora.coerce import coerce, coerce_all
from theodora.errors import ConfigError, bullet_list, shown
from theodora.naming import path_problem
from theodora.other_words import advice, called
from theodora.trust import check_granted

__all__ = [
    "METHOD_NAMES",
    "OPTION_NAMES",
    "AdapterConfig",
    "AdapterDtype",
    "BaseDtype",
    "Objective",
    "QuantizeTo",
    "TrainConfig",
    "is_int",
    "is_number",
]

BaseDtype = Literal["auto", "fp8"]
Objective = Literal["sft", "dpo", "ipo", "kto", "orpo", "simpo", "reward", "grpo"]
WITH_REFERENCE = ("dpo", "ipo", "kto", "grpo")
"""Objectives that compare the model with what it was."""
QuantizeTo = Literal["none", "nf4", "int8", "int4", "fp8"]
GENERAL_ROWS, GENERAL_LENGTH = 64, 256
"""Texts, and tokens of each, that the loss on general text is measured on: 16,384 tokens at most."""
_RATE, _RATE_OF_SCORES, _RATE_OF_PREFERENCES = 5e-4, 1e-4, 5e-5
_RATE_OF_FULL = 0.04
"""Of the other rate: 2e-5, 4e-6 of scores, 2e-6 of preferences. What moves all weights at once forgets at an adapter's
rate."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: what is trained on what, how, and where it is kept.

    Fields that exist in TRL or transformers bear their names. Every other field of `trl.SFTConfig` goes into `trainer`.
    In a YAML file and on the command line all of them, the adapter's included, stand side by side: `from_options`.

    Example:
        `TrainConfig(model="gpt2", data="train.jsonl", output="runs/first", adapter=AdapterConfig(rank=16))`

    Raises:
        ConfigError: naming every field that makes no sense.
    """

    model: str = ""
    """Folder or hub name of the causal language model to fine-tune. Default: from_adapter's base."""
    from_adapter: str | None = None
    """Folder of an adapter (a run's, one of its checkpoints, PEFT's or MLX's) to go on from with these data. Its base,
    method, rank and targets are taken over, its optimizer is not."""
    data: str
    """Rows to train on: a .jsonl, .json, .csv or .parquet file, or a datasets folder. The format (prompt/completion,
    messages, ShareGPT, Alpaca, text) is recognised."""
    output: str
    """Folder for the adapter, the model card, metrics, loss curve, configuration and checkpoints."""
    objective: Objective = "sft"
    """What is learned: sft (the answers), dpo, ipo, orpo, simpo (which of two answers is the better one: prompt,
    chosen, rejected), kto (whether an answer is good: prompt, completion, label), reward (a score for answers), grpo
    (what functions reward in answers of its own: prompt, and what the functions need)."""
    reference: str | None = None
    """What dpo, ipo, kto and grpo compare the model with: base, or the folder of an adapter of it. Default:
    what training starts from. A folder alone is gone on from, too."""
    reward: tuple[str, ...] = ()
    """What grpo rewards: exact_match, token_f1, format:REGEX, length:TOKENS, the folder of a reward model, or
    path/to/file.py:function, several with reward_weights. A recipe cannot name a file: the flag can, and Python."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward in their sum. Default: 1 each."""
    reward_timeout: float = 60.0
    """Seconds after which a reward that has not returned, for one batch, ends the run."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Method, rank, targets and the rest of the adapter."""

    eval_data: str | None = None
    """File with the held-out rows. Default: a part of data is held out."""
    held_out: int | float | None = None
    """Rows of data to hold out (a whole number) or their share (below 1); 0 holds out none. Default: 5 %, at most 200
    rows."""
    replay: str | None = None
    """File with general text to mix into the rows, so that less is forgotten."""
    replay_share: float = 0.1
    """Share of the rows trained on that are general text, if there is any (replay)."""
    general: str | None = None
    """File with general text: the loss on 64 of its texts, 256 tokens of each, before and after training is reported,
    and on a GPU at every evaluation. It tells what was forgotten."""
    train_on: Literal["completion", "all"] = "completion"
    """Tokens that count in the loss: those of completions and assistant turns, or all."""
    resize_embeddings: bool = False
    """Give tokens of the tokenizer that the model has no row for new rows in its embedding and output head, and train
    these. They are saved with the adapter."""
    use_chat_template: bool | None = None
    """Whether prompts and completions are wrapped in the tokenizer's chat template. Default: if it has one."""
    max_length: int = 1024
    """Tokens after which a row is cut, and the length of a packed row."""
    packing: bool = False
    """Put several rows into one sequence of max_length tokens; attention stays within each row."""

    num_train_epochs: float = 3.0
    """Passes over the data."""
    max_steps: int | None = None
    """Optimizer steps; overrides num_train_epochs."""
    per_device_train_batch_size: int = 8
    """Rows in a forward pass, on each device."""
    gradient_accumulation_steps: int = 1
    """Forward and backward passes in one optimizer step."""
    learning_rate: float | None = None
    """Peak learning rate. Default: 0.0005; with the objective reward 0.0001, with another than sft 0.00005; with
    method full a twenty-fifth of that."""
    lr_scheduler_type: str = "cosine"
    """Course of the learning rate: cosine, linear, constant_with_warmup, or another of transformers' schedules."""
    warmup_steps: float = 0.03
    """Steps over which the learning rate rises from 0; below 1 a share of all steps."""
    weight_decay: float = 0.0
    """AdamW's weight decay. DoRA's magnitudes, biases and norms are exempt."""
    max_grad_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it; 0 turns that off."""
    bf16: bool | None = None
    """Hold the base model in bfloat16 (adapters stay in adapter_dtype). Default: where the hardware computes in it."""
    base_dtype: BaseDtype = "auto"
    """Storage of the frozen weights of linear layers: auto (as bf16 says), or fp8: float8 with a scale for each row and
    float8 products, half the memory of bfloat16, faster from Hopper GPUs on, emulated elsewhere."""
    quantize: QuantizeTo | None = None
    """Quantise the frozen weights of linear layers as they load: nf4 (bitsandbytes, double-quantised, a quarter of
    bfloat16's memory), int8 (bitsandbytes), int4 (torchao), fp8 (as base_dtype), none. Default: as from_adapter has."""
    kernels: Literal["auto", "reference"] = "auto"
    """Code that runs: auto (fused kernels where there is a GPU), or reference (the plain formulas, slower)."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, a third slower. Default: from 3 billion parameters."""
    sharding: Literal["auto", "none", "fsdp2", "hsdp"] = "auto"
    """How several processes hold the frozen weights: each a part (fsdp2), the processes of each machine a part (hsdp),
    each all of them (none), or as accelerate was told to, else what fits a GPU (auto). The adapter is whole in each."""
    cpu_offload: bool = False
    """Keep the parts of sharded weights in main memory while they are not computed with: slower."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do about a step whose loss or gradient is not finite, or whose loss exceeds max_loss: stop the run, or
    skip the step. Its batch is written to bad_batches.jsonl either way, and the adapter is not touched."""
    max_loss: float | None = None
    """Loss of a step that counts as exploded. Default: three times that of guessing, 3·ln(vocabulary)."""
    seed: int = 0
    """Seed of the adapter's start, the data's order, dropout and the held-out split."""

    logging_steps: float = 1
    """Steps between two lines of metrics.jsonl; below 1 a share of all steps."""
    eval_steps: float = 0.1
    """Steps between two evaluations of the held-out rows; below 1 a share of all steps."""
    per_device_eval_batch_size: int | None = None
    """Rows in a pass of an evaluation, on each device. Default: 8, on a GPU twice as many as in training if more."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations without a better held-out loss, and keep the best adapter."""
    save_steps: float = 0.1
    """Steps between two checkpoints; below 1 a share of all steps."""
    save_total_limit: int = 2
    """Checkpoints to keep: the newest, and the best one with early stopping."""
    report_to: tuple[str, ...] = ()
    """Also log to: tensorboard, wandb, trackio, or another of transformers' integrations. In a recipe only those that
    write files here (tensorboard): what sends is said by the flag, or in Python."""

    push_to_hub: str | None = None
    """Repository on the Hugging Face hub (owner/name, or a name under your own account) to push the result to: weights,
    tokenizer, model card. It is made private if it is not there. A recipe cannot say it: the flag can, and Python."""

    resume: bool | str | None = None
    """Go on from a checkpoint: true for the newest whole one in the output folder, auto for the same if there is one
    (else the run begins), or a checkpoint's folder."""
    grace_period: float = 25.0
    """Seconds after SIGTERM (preemption) within which a run saves a checkpoint and exits with 0."""
    overwrite: bool = False
    """Delete the run that the output folder holds."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. A recipe cannot say it: the flag can, and Python."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    trainer: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Any other fields of trl.SFTConfig, by name, and those that the objective's own configuration in TRL has."""

    # Names of the adapter's options that `from_options` was given: what is by default gives way to from_adapter's.
    chosen: ClassVar[frozenset[str] | None] = None

    def __post_init__(self) -> None:
        values, problems = coerce_all({f.name: getattr(self, f.name) for f in fields(self)}, TrainConfig)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if self.learning_rate is None:
            rate = {"sft": _RATE, "reward": _RATE_OF_SCORES}.get(self.objective, _RATE_OF_PREFERENCES)
            object.__setattr__(self, "learning_rate", rate * (_RATE_OF_FULL if self.trains_all else 1))
        object.__setattr__(self, "reward_weights", tuple(map(_as_number, self.reward_weights)))
        if self.max_steps == -1:  # what transformers writes for "not set"
            object.__setattr__(self, "max_steps", None)
        if isinstance(self.resume, str) and self.resume.lower() in ("true", "false"):
            object.__setattr__(self, "resume", self.resume.lower() == "true")
        if self.quantize == "fp8":  # one mechanism under two names, of which base_dtype is the one in records
            object.__setattr__(self, "base_dtype", "fp8")
            object.__setattr__(self, "quantize", None)
        if self.resume is False:
            object.__setattr__(self, "resume", None)
        if self.report_to in (("none",), ("",)):
            object.__setattr__(self, "report_to", ())
        # Ranges and combinations can only be judged once every value has the right type.
        if problems or (problems := list(self._problems())):
            raise ConfigError("The training configuration makes no sense:" + bullet_list(problems))

    def _problems(self) -> Iterator[str]:
        for name in _needed(vars(self)):
            if not str(getattr(self, name)).strip():
                yield f"{name} is empty"
        for name in ("model", "from_adapter", "reference", "data", "output", "eval_data", "replay", "general"):
            value = getattr(self, name)
            if isinstance(value, str) and (problem := path_problem(value, written=name == "output")):
                yield f"{name} is {shown(value)}: {problem}"
        for name, (least, inclusive) in TRAIN_BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not (value > least or (inclusive and value == least)):
                yield f"{name} is {shown(value)}; expected {'at least' if inclusive else 'more than'} {least}"
            elif value and is_int(value) and value > (most := _LARGEST_SEED if name == "seed" else LARGEST_NUMBER):
                yield f"{name} is {shown(value)}; expected at most {most:,}"
            elif value is not None and not math.isfinite(value):
                yield f"{name} is {value}; expected a finite number"
        if isinstance(self.held_out, float) and self.held_out >= 1:
            yield f"held_out is {self.held_out}; expected a share below 1, or a whole number of rows"
        if self.eval_data is not None and self.held_out:
            yield f"eval_data and held_out={self.held_out} are both given; expected one of them"
        if not 0 <= self.replay_share < 1:
            yield f"replay_share is {self.replay_share}; expected at least 0 and below 1"
        if self.early_stopping_patience is not None and self.eval_data is None and self.held_out == 0:
            yield "early_stopping_patience needs held-out rows; expected eval_data, or held_out above 0"
        yield from self._problems_of_rewards()
        if self.objective != "sft":
            yield from self._problems_of_preferences()
        elif self.reference is not None:
            yield f"reference is {shown(self.reference)}, and the objective is sft, which compares with nothing"
        if self.trains_all:
            yield from self._problems_of_full()
        if self.resume is not None and self.overwrite:
            yield "resume and overwrite are both given; expected one of them"
        if self.bf16 and self.trainer.get("fp16"):
            yield "bf16 and fp16 are both on; expected one of them"
        if self.base_dtype != "auto" and self.quantize is not None:
            yield f"base_dtype={self.base_dtype} and quantize={self.quantize} are both given; expected one of them"
        odd = [key for key in list[Any](self.trainer) if not isinstance(key, str)]
        if odd:
            yield f"trainer has the key {shown(odd[0])}; expected names of options"
        for name in sorted(self.trainer.keys() & OPTION_NAMES):
            yield f"trainer holds {name}, which is an option of its own; expected it outside trainer"

    def _problems_of_rewards(self) -> Iterator[str]:
        if self.objective == "grpo" and not self.reward:
            yield (
                "reward is missing, and the objective is grpo; expected some of exact_match, token_f1, format:REGEX, "
                "length:TOKENS, the folder of a reward model, path/to/file.py:function"
            )
        if self.objective != "grpo":
            for name in ("reward", "reward_weights"):
                if value := getattr(self, name):
                    yield f"{name} is {shown(value)}, and the objective is {self.objective}; only grpo has rewards"
        odd = [name for name in list[Any](self.reward) if not isinstance(name, str) or not name.strip()]
        if odd:
            yield f"reward holds {shown(odd[0])}; expected names of rewards"
        wrong = [weight for weight in list[Any](self.reward_weights) if not is_number(weight)]
        if wrong:
            yield f"reward_weights holds {shown(wrong[0])}; expected finite numbers"
        if self.reward and self.reward_weights and len(self.reward_weights) != len(self.reward):
            yield f"reward_weights holds {len(self.reward_weights)} numbers for {len(self.reward)} rewards"

    def _problems_of_preferences(self) -> Iterator[str]:
        what = f"the objective is {self.objective}, which"
        if self.packing:
            yield f"packing is on, and {what} needs each answer by itself"
        if self.train_on == "all":
            yield f"train_on is all, and {what} is about answers alone"
        if self.replay is not None:
            yield f"replay is given, and {what} learns no plain text"
        if self.objective == "reward" and self.general is not None:
            yield f"general is given, and {what} has a head for scores alone: it predicts no text to measure a loss on"
        if self.reference is not None and self.objective not in WITH_REFERENCE:
            yield f"reference is {shown(self.reference)}, and {what} compares with nothing"

    @property
    def trains_all(self) -> bool:
        """Whether all weights are trained, and no adapter is there."""
        return self.adapter.method == "full"

    def _problems_of_full(self) -> Iterator[str]:
        what = "method is full, which trains all weights themselves"
        if self.from_adapter is not None:
            yield (
                f"from_adapter is {shown(self.from_adapter)}, and {what}: merge the adapter (theodora merge), and name "
                "the merged folder as model"
            )
        if self.quantize not in (None, "none") or self.base_dtype != "auto":
            given = f"quantize is {self.quantize}" if self.quantize else f"base_dtype is {self.base_dtype}"
            yield f"{given}, and {what}: weights of few bits cannot take small steps; leave it out, or train an adapter"
        if self.objective in WITH_REFERENCE:
            yield (
                f"the objective is {self.objective}, and {what}: what it compares with would be a second model in "
                "memory; expected sft, orpo or simpo, or an adapter, which is switched off for that"
            )
        if self.sharding in ("fsdp2", "hsdp"):
            yield f"sharding is {self.sharding}, which cuts frozen weights, and {what}; expected none"

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, granted: Collection[str] = ()) -> TrainConfig:
        """Build the configuration from options that stand side by side, as in a YAML file.

        Names that are neither fields here nor of `AdapterConfig` join `trainer`.

        Args:
            options: by name.
            granted: names of options that you vouch for, such as trust_remote_code: a file cannot grant them.

        Raises:
            ConfigError: naming every option that is missing or makes no sense, or that is not granted.
        """
        options, problems = _current_names(options)
        check_granted(options, granted)
        if options.get("push_to_hub") is False:  # as TRL's recipes say no
            options = {**options, "push_to_hub": None}
        extra = {name: options[name] for name in options if name not in OPTION_NAMES}
        trainer = options.get("trainer") or {}
        if not isinstance(trainer, Mapping):
            problems.append(f"trainer is {shown(trainer)}; expected a mapping of names to values")
            trainer = {}
        problems += [
            f"{name} is {shown(extra[name])}, and trainer says {shown(trainer[name])}; expected one of them"
            for name in sorted(extra.keys() & trainer.keys())
        ]
        missing = [name for name in _needed(options) if options.get(name) is None]
        told = {name: text for name, value in options.items() if (text := _foreign(name, value)) is not None}
        if missing or told.keys() & OPTION_NAMES:  # else TRL's fields are asked too, and all are told at once
            problems = [*(f"{name}: {text}" for name, text in told.items()), *problems]
            renamed = {called(name) for name in told}
            problems += [f"{name} is missing" for name in missing if name not in renamed]
            options = {name: value for name, value in options.items() if name not in told}
        adapter, wrong = coerce_all({k: v for k, v in options.items() if k in _ADAPTER_NAMES}, AdapterConfig)
        own, also_wrong = coerce_all({k: v for k, v in options.items() if k in _OWN_NAMES}, cls)
        problems += wrong + also_wrong
        for name in ("targets", "exclude"):
            # One bare word is a name. AdapterConfig takes text that is not a tuple for a regular expression.
            if isinstance(word := adapter.get(name), str) and word != "all-linear" and re.fullmatch(r"[\w.]*", word):
                adapter[name] = (word,) if word else ()
        if adapter.get("method") == "full":
            said = [name for name, value in adapter.items() if value is not None and name != "method"]
            problems += [f"{name} belongs to an adapter, and method full has none; leave it out" for name in said]
        if problems:
            raise ConfigError("The options make no sense:" + bullet_list(problems))
        own |= {"adapter": AdapterConfig(**adapter), "trainer": {**trainer, **extra}}
        config = cls(**own)
        object.__setattr__(config, "chosen", frozenset(name for name, value in adapter.items() if value is not None))
        return config

    def to_options(self) -> dict[str, Any]:
        """All options side by side, such that `from_options` gives this configuration again (with what it was
        granted); fit for YAML and JSON."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("adapter", "trainer")}
        names = ["method"] if self.trains_all else [f.name for f in fields(AdapterConfig)]
        adapter = {name: getattr(self.adapter, name) for name in names}
        first = {"model": own.pop("model"), "from_adapter": own.pop("from_adapter")}
        options = {**first, "data": own.pop("data"), "output": own.pop("output"), **adapter, **own}
        options = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in {**options, "trainer": self.trainer}.items()}


_ADAPTER_NAMES = frozenset(f.name for f in fields(AdapterConfig))
_OWN_NAMES = frozenset(f.name for f in fields(TrainConfig)) - {"adapter"}
OPTION_NAMES = _ADAPTER_NAMES | _OWN_NAMES
"""Every option of a training run but those that go through to `trl.SFTConfig`."""

SAME_AS: dict[str, tuple[str, dict[Any, Any]]] = {
    "output_dir": ("output", {}),
    "resume_from_checkpoint": ("resume", {}),
    "activation_checkpointing": ("gradient_checkpointing", {}),
    "warmup_ratio": ("warmup_steps", {}),
    "completion_only_loss": ("train_on", {True: "completion", False: "all"}),
    "assistant_only_loss": ("train_on", {True: "completion", False: "all"}),
}
"""Fields of transformers and TRL that are options here under another name: the name, and its word for each value."""


def _as_number(given: Any) -> Any:
    """A number, which a command line gives as text."""
    try:
        return coerce(given, float)
    except ValueError:
        return given


def _needed(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The options that a run cannot be without."""
    starts = options.get("from_adapter") or options.get("reference") not in (None, "base")
    return ("data", "output") if starts else ("model", "data", "output")


def _foreign(name: str, value: Any) -> str | None:
    """What to write instead of an option of another tool, or of one of ours with another tool's value."""
    return (
        None if name in OPTION_NAMES and not (name == "model" and isinstance(value, Mapping)) else advice(name, value)
    )


def _current_names(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Translate other spellings of our options; also complaints about options that are given twice."""
    renamed: dict[str, Any] = {}
    problems: list[str] = []
    for given, value in options.items():
        name, values = SAME_AS.get(given, (given, {}))
        if given == "bf16" and value == "auto":  # Axolotl's word for what holds by default
            value = None
        if name != given and value is None:  # "not set" in transformers and TRL
            continue
        if name != given and name in options:
            problems.append(f"{given} and {name} are both given; expected {name} alone")
        renamed[name] = values[value] if isinstance(value, bool) and value in values else value
    return renamed, problems


TRAIN_BOUNDS: dict[str, tuple[int, bool]] = {
    "max_length": (2, True),
    "num_train_epochs": (0, False),
    "max_steps": (1, True),
    "per_device_train_batch_size": (1, True),
    "per_device_eval_batch_size": (1, True),
    "gradient_accumulation_steps": (1, True),
    "learning_rate": (0, False),
    "warmup_steps": (0, True),
    "weight_decay": (0, True),
    "max_grad_norm": (0, True),
    "held_out": (0, True),
    "logging_steps": (0, False),
    "eval_steps": (0, False),
    "save_steps": (0, False),
    "save_total_limit": (1, True),
    "early_stopping_patience": (1, True),
    "grace_period": (0, False),
    "reward_timeout": (0, False),
    "max_loss": (0, False),
    "seed": (0, True),
}
"""Field -> smallest value, and whether that value itself is allowed."""
_LARGEST_SEED = 2**32 - 1
"""numpy takes no larger one."""
