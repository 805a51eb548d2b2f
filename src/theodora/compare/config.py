"""What a comparison asks: one YAML file -> `CompareConfig`, checked as a whole. Imports no torch.

The docstring under each field is its documentation (`theodora compare --help` prints them).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

from theodora.coerce import coerce, type_hints
from theodora.compare.methods import Variant, variants
from theodora.config import GENERAL_LENGTH, GENERAL_ROWS, QuantizeTo, is_number
from theodora.errors import ConfigError, bullet_list, shown
from theodora.naming import alike, name_problem, path_problem
from theodora.trust import check_code_granted, check_granted, rewards_not_allowed

SCORES = ("labels", "exact-match", "f1", "loss")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One data set: where its rows are, and how answers to it are scored."""

    train: str
    """Rows to train on: any source that `theodora train` reads."""
    validation: str | int | float = 0.1
    """Rows on which learning rates are chosen: a file, or how many (or which share) of train to hold out."""
    test: str | int | float = 0.2
    """Rows for the final scores: a file, or how many (or which share) of train to hold out."""
    score: str = "exact-match"
    """labels (share of rows whose right label is the likeliest), exact-match, f1 (words in common), loss (the loss
    alone), or a function of your own: path/to/file.py:function, called with (answer, reference). That file runs, so it
    has to be allowed by hand, too: --allow-code path/to/file.py."""
    labels: tuple[str, ...] | Literal["auto"] = "auto"
    """The closed set of labels. auto: the answers that occur in the rows."""
    max_new_tokens: int = 64
    """Tokens of the longest answer to generate."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A comparison of methods: every method × rank × learning rate on validation rows, then the seeds on test rows.

    Raises:
        ConfigError: naming every field that makes no sense.
    """

    model: str
    """Folder or hub name of the base model."""
    output: str
    """Folder for the cells, results.parquet and report.html."""
    data: Mapping[str, DataConfig]
    """Data sets by name: a file, or a mapping (train, validation, test, score, labels, max_new_tokens)."""
    general: str | None = None
    """General text, to see what is forgotten; replay takes other texts of it."""
    general_rows: int = GENERAL_ROWS
    """Texts that the loss on general text is measured on."""
    general_length: int = GENERAL_LENGTH
    """Tokens after which a general text is cut."""
    methods: tuple[Any, ...] = ("full", "lora", "dora")
    """Names (full, lora, rslora, pissa, olora, lora+, dora, dora+, magnitude, direction), or mappings: method (one of
    these names), and any of name, ranks, learning_rates, replay (share of training rows that are general text),
    b_ratio, objective (sft; dpo, ipo, orpo, simpo, for which rows are pairs; grpo) with its beta, of grpo
    reward_weights and TRL's options (num_generations, max_completion_length, temperature, …), from_adapter (the folder
    of an adapter to go on from), and the fields of an adapter (alpha, targets, init, dropout, …)."""
    ranks: tuple[int, ...] = (8,)
    """Ranks that each method with a rank is run with."""
    learning_rates: tuple[Any, ...] | Mapping[str, Any] = (1e-4, 3e-4, 1e-3, 3e-3)
    """Peak learning rates to choose from: a list, or a mapping of method names (and default) to lists."""
    seeds: int | tuple[int, ...] = 5
    """Seeds of the final runs: how many, or which."""
    tuning_seeds: int | tuple[int, ...] = 1
    """Seeds of the runs that choose the learning rate; a number counts from 1000 on, so that they are others."""
    select: Literal["score", "loss"] = "score"
    """What chooses the learning rate on the validation rows: the score (the loss decides ties), or the loss."""
    reference: tuple[str, ...] = ("lora",)
    """Methods that the others are tested against."""
    reward: tuple[str, ...] = ()
    """What grpo learns from, as in `theodora train`: exact_match, token_f1, format:REGEX, length:TOKENS or
    path/to/file.py:function. Answers that any model draws to test prompts are measured by it, too. A file that this one
    names runs only if it is allowed by hand: --allow-code path/to/file.py, or --reward."""
    reward_weights: tuple[float, ...] = ()
    """Of each in their sum. Default: 1 each."""
    reward_timeout: float = 60.0
    """Seconds that a function may take for the answers of a step, or of all test prompts."""

    steps: int = 200
    """Optimizer steps of each run."""
    batch_size: int = 16
    """Rows in a step."""
    max_length: int = 512
    """Tokens after which a training row is cut."""
    lr_scheduler_type: str = "cosine"
    """Course of the learning rate, as in `theodora train`."""
    warmup_steps: float = 0.05
    """Steps over which the learning rate rises from 0; below 1 a share of all steps."""
    weight_decay: float = 0.0
    """AdamW's weight decay; vectors are exempt."""
    max_grad_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it; 0 turns that off."""
    use_chat_template: bool | None = None
    """Whether rows are wrapped in the tokenizer's chat template. Default: if it has one."""
    bf16: bool | None = None
    """Hold the base model in bfloat16; full fine-tuning trains float32 weights under autocast then. Default: where the
    hardware computes in it."""

    quantize: QuantizeTo | None = None
    """Quantise the frozen weights of the base as they are loaded: nf4, int8, int4, fp8, as in `theodora train`. Methods
    that train all weights (full) cannot stand on it."""

    validation_rows: int | None = None
    """Score at most so many validation rows."""
    test_rows: int | None = None
    """Score at most so many test rows."""
    other_rows: int = 200
    """Test rows of every other data set, to see what training on one does to the others; 0: none."""
    eval_batch_size: int = 32
    """Rows in a forward pass of an evaluation."""
    curve_points: int = 6
    """Times that a final run is measured on validation rows along its way; 0: never."""
    curve_rows: int = 64
    """Validation rows it is measured on."""
    split_seed: int = 0
    """Seed of held-out splits."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. The file cannot say it: the flag can, and Python."""
    workers_per_gpu: int = 1
    """Processes on each GPU: more keep it busy where the model is small. Each holds the model once."""
    keep_adapters: bool = False
    """Keep the adapters of the final runs, in output/adapters."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        for f in fields(self):
            try:
                object.__setattr__(self, f.name, coerce(getattr(self, f.name), type_hints(CompareConfig)[f.name]))
            except ValueError as error:
                problems.append(f"{f.name} is {getattr(self, f.name)!r}; expected {error}")
        if problems or (problems := list(self._problems())):
            raise ConfigError("The comparison makes no sense:" + bullet_list(problems))

    def _problems(self) -> Iterator[str]:
        for name in ("model", "output", "data", "methods"):
            value = getattr(self, name)
            if not (value.strip() if isinstance(value, str) else value):
                yield f"{name} is empty"
        for name, value in (("model", self.model), ("output", self.output), ("general", self.general)):
            if value is not None and (problem := path_problem(value, written=name == "output")):
                yield f"{name} is {shown(value)}: {problem}"
        yield from (f"data: {problem}" for problem in map(name_problem, self.data) if problem)
        yield from (f"data: {one} and {other} differ in capitals alone" for one, other in alike(self.data))
        for name, least in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and value < least:
                yield f"{name} is {value}; expected at least {least}"
        for name in ("seeds", "tuning_seeds"):
            value = getattr(self, name)
            if (
                (isinstance(value, int) and value < 1)
                or value == ()
                or (
                    isinstance(value, tuple)
                    and (len(set(value)) < len(value) or not all(isinstance(s, int) for s in value))
                )
            ):
                yield f"{name} is {value!r}; expected a number of at least 1, or different whole numbers"
        chosen: list[Variant] = []
        try:
            chosen = variants(self.methods, self.ranks, self.learning_rates)
        except ConfigError as error:
            yield from str(error).splitlines()
        whole = [v.name for v in chosen if v.adapter is None]
        if self.quantize not in (None, "none") and whole:
            yield f"quantize is {self.quantize}, and {', '.join(whole)} trains the weights themselves: leave one out"
        yield from self._reward_problems(chosen)
        if any(v.replay for v in chosen) and self.general is None:
            yield "a method has replay, and general is missing; expected a file with general text"
        names = {v.name for v in chosen}
        strange = [name for name in self.reference if name not in names]
        if chosen and strange and self.reference != ("lora",):
            yield f"reference is {', '.join(strange)}; the methods are {', '.join(sorted(names))}"
        for name, data in self.data.items():
            yield from (f"data.{name}: {problem}" for problem in _data_problems(data))

    def _reward_problems(self, chosen: list[Variant]) -> Iterator[str]:
        learning = [variant for variant in chosen if variant.objective == "grpo"]
        if learning and not self.reward:
            yield f"reward is missing, which {learning[0].name} learns from; expected some of exact_match, token_f1, …"
        weights = (self.reward_weights, *(variant.reward_weights for variant in learning))
        if self.reward and any(each and len(each) != len(self.reward) for each in weights):
            yield f"reward_weights: expected {len(self.reward)}, one for each of reward"
        if not all(map(is_number, self.reward_weights)):
            yield f"reward_weights holds {self.reward_weights!r}; expected finite numbers"
        if not self.reward_timeout > 0:
            yield f"reward_timeout is {self.reward_timeout:g}; expected more than 0 seconds"

    @cached_property
    def variants(self) -> list[Variant]:
        """Every method with each of its ranks."""
        return variants(self.methods, self.ranks, self.learning_rates)

    @property
    def learns_pairs(self) -> bool:
        """Whether rows are pairs of a better and a worse answer: sft learns the better one then, and scores ask it."""
        return any(variant.objective not in ("sft", "grpo") for variant in self.variants)

    @property
    def final_seeds(self) -> tuple[int, ...]:
        """The seeds of the final runs."""
        return self.seeds if isinstance(self.seeds, tuple) else tuple(range(self.seeds))

    @property
    def choosing_seeds(self) -> tuple[int, ...]:
        """The seeds of the runs that choose the learning rate."""
        return (
            self.tuning_seeds if isinstance(self.tuning_seeds, tuple) else tuple(range(1000, 1000 + self.tuning_seeds))
        )

    @classmethod
    def from_options(
        cls, options: Mapping[str, Any], *, granted: Collection[str] = (), allow_code: Collection[str] = ()
    ) -> CompareConfig:
        """Build the configuration from what a YAML file holds.

        Args:
            options: by name.
            granted: names of options that you vouch for (trust_remote_code, reward): a file cannot grant them.
            allow_code: Python files that may run as scores or rewards: what the file names runs only if it is among
                these.

        Raises:
            ConfigError: naming every option that is unknown, missing or makes no sense, and files that may not run.
        """
        asked = {name: options[name] for name in options if name == "trust_remote_code"}
        check_granted({**asked, "reward": rewards_not_allowed(options.get("reward"), allow_code)}, granted)
        known = {f.name for f in fields(cls)}
        problems = [
            f"there is no option {name}; there are {', '.join(sorted(known))}" for name in options.keys() - known
        ]
        problems += [f"{name} is missing" for name in ("model", "output", "data") if options.get(name) is None]
        data: dict[str, DataConfig] = {}
        given = options.get("data")
        if given is not None and not isinstance(given, Mapping):
            problems.append(f"data is {given!r}; expected names with a file, or with a mapping")
        for name, value in (given if isinstance(given, Mapping) else {}).items():
            if problem := None if isinstance(name, str) else name_problem(name):
                problems.append(f"data: {problem}")
                continue
            try:
                data[name] = _data_config(value)
            except ConfigError as error:
                problems += [f"data.{name}: {line}" for line in str(error).splitlines()]
        if problems:
            raise ConfigError("The comparison makes no sense:" + bullet_list(problems))
        check_code_granted({name: part.score for name, part in data.items() if is_code(part.score)}, allow_code)
        return cls(**{name: value for name, value in options.items() if name != "data"}, data=data)

    def to_options(self) -> dict[str, Any]:
        """All options, such that `from_options` gives this configuration again (with the code it may run); fit for
        YAML."""
        plain = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "data"}
        data = {name: {f.name: _plain(getattr(d, f.name)) for f in fields(d)} for name, d in self.data.items()}
        return {"model": plain.pop("model"), "output": plain.pop("output"), "data": data, **plain}


def is_code(score: str) -> bool:
    """Whether a score is a function of somebody's own: path/to/file.py:function."""
    return ".py:" in score


def _data_config(value: Any) -> DataConfig:
    options = {"train": value} if isinstance(value, str) else value
    if not isinstance(options, Mapping):
        raise ConfigError(f"{value!r}; expected a file or a mapping")
    hints = type_hints(DataConfig)
    problems = [f"there is no option {name}; there are {', '.join(hints)}" for name in options.keys() - hints.keys()]
    if options.get("train") is None:
        problems.append("train is missing")
    coerced: dict[str, Any] = {}
    for name in options.keys() & hints.keys():
        try:
            coerced[name] = options[name] if name in ("validation", "test") else coerce(options[name], hints[name])
        except ValueError as error:
            problems.append(f"{name} is {options[name]!r}; expected {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return DataConfig(**coerced)


def _data_problems(data: DataConfig) -> Iterator[str]:
    for name in ("train", "validation", "test"):
        value = getattr(data, name)
        if isinstance(value, str) and (problem := path_problem(value)):
            yield f"{name} is {shown(value)}: {problem}"
    for name in ("validation", "test"):
        value = getattr(data, name)
        if not isinstance(value, str) and not (is_number(value) and value > 0):
            yield f"{name} is {value!r}; expected a file, a number of rows, or a share below 1"
    if data.score not in SCORES and not is_code(data.score):
        yield f"score is {data.score!r}; expected one of {', '.join(SCORES)}, or path/to/file.py:function"
    if data.max_new_tokens < 1:
        yield f"max_new_tokens is {data.max_new_tokens}; expected at least 1"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


BOUNDS = {
    "steps": 1,
    "batch_size": 1,
    "max_length": 2,
    "general_rows": 1,
    "general_length": 2,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "validation_rows": 1,
    "test_rows": 1,
    "other_rows": 0,
    "eval_batch_size": 1,
    "curve_points": 0,
    "curve_rows": 1,
    "workers_per_gpu": 1,
}
