"""The methods of a comparison: what each trains, by the adapters there are. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from theodora.config import AdapterConfig, is_int, is_number
from theodora.errors import ConfigError, shown
from theodora.naming import alike, name_problem, path_problem

_RATIO = 16.0  # of LoRA+, as its paper recommends (arXiv 2402.12354)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a name stands for."""

    title: str
    adapter: Mapping[str, Any] | None
    """Fields of `AdapterConfig`; None trains all weights and needs no adapter."""
    trains: tuple[str, ...] = ()
    """Parts of the adapter that are trained, the others keeping their start; empty: all."""
    b_ratio: float = 1.0
    has_rank: bool = True


METHODS: dict[str, Method] = {
    "full": Method(title="full fine-tuning", adapter=None, has_rank=False),
    "lora": Method(title="LoRA", adapter={"method": "lora"}),
    # alpha stays as it is whatever the rank: that is the point of dividing it by the root of the rank.
    "rslora": Method(title="rsLoRA", adapter={"method": "lora", "rslora": True, "alpha": 16.0}),
    "pissa": Method(title="PiSSA", adapter={"method": "lora", "init": "pissa"}),
    "olora": Method(title="OLoRA", adapter={"method": "lora", "init": "olora"}),
    "lora+": Method(title="LoRA+", adapter={"method": "lora"}, b_ratio=_RATIO),
    "dora": Method(title="DoRA", adapter={"method": "dora"}),
    "dora+": Method(title="DoRA+", adapter={"method": "dora"}, b_ratio=_RATIO),
    # B is zero and stays so: W' = m ⊙ W / ‖W‖, and the rank does nothing.
    "magnitude": Method(
        title="magnitude only", adapter={"method": "dora", "rank": 1}, trains=("magnitude",), has_rank=False
    ),
    # m stays ‖W‖: the rows turn, and keep their lengths.
    "direction": Method(title="direction only", adapter={"method": "dora"}, trains=("lora_A", "lora_B")),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A method with one rank: what one row of the result table is about."""

    name: str
    """Of the method, as the file calls it."""
    method: str
    """A key of `METHODS`."""
    rank: int | None
    replay: float = 0.0
    b_ratio: float = 1.0
    objective: str = "sft"
    """sft learns the better answers of pairs; the others what is better about them."""
    beta: float | None = None
    """Of the objective. Default: as in `theodora train`."""
    reward_weights: tuple[float, ...] = ()
    """Of the comparison's rewards in the sum that grpo learns from. Default: the comparison's own."""
    from_adapter: str | None = None
    """Folder of an adapter to go on from, which says what is adapted, with which rank; objectives that compare with a
    reference compare with it."""
    learning_rates: tuple[float, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Other fields of the adapter."""
    policy: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Options of grpo (`POLICY`)."""

    @property
    def key(self) -> str:
        """Short and unique, fit for a file name."""
        return self.name + ("" if self.rank is None else f"-r{self.rank}")

    @property
    def title(self) -> str:
        """For people."""
        own = METHODS[self.method].title if self.name == self.method else self.name
        return own + ("" if self.rank is None else f", rank {self.rank}")

    @property
    def adapter(self) -> AdapterConfig | None:
        """The adapter; None trains all weights."""
        base = METHODS[self.method].adapter
        if base is None:
            return None
        fields_given: dict[str, Any] = {**base, **({} if self.rank is None else {"rank": self.rank}), **self.options}
        return AdapterConfig(**fields_given)

    @property
    def trains(self) -> tuple[str, ...]:
        """Parts of the adapter that are trained; empty: all."""
        return METHODS[self.method].trains


_OWN = (
    *("method", "name", "ranks", "learning_rates", "replay", "b_ratio", "objective", "beta", "reward_weights"),
    "from_adapter",
)
OBJECTIVES = ("sft", "dpo", "ipo", "orpo", "simpo", "grpo")
POLICY = (
    *("num_generations", "max_completion_length", "num_iterations", "steps_per_generation", "generation_batch_size"),
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "epsilon", "epsilon_high", "delta", "loss_type"),
    *("importance_sampling_level", "scale_rewards", "multi_objective_aggregation", "mask_truncated_completions"),
    "use_bias_correction_kl",
)
"""Options of grpo, by TRL's names, that an entry may have; `theodora.train` says what they may be."""
_ADAPTER = {f.name for f in fields(AdapterConfig)} - {"method", "rank"}


def variants(methods: tuple[Any, ...], ranks: tuple[int, ...], rates: Any) -> list[Variant]:
    """Every method with each of its ranks.

    Raises:
        ConfigError: naming everything that makes no sense, a line for each.
    """
    chosen: list[Variant] = []
    problems: list[str] = []
    for given in methods:
        options: Mapping[Any, Any] = {"method": given} if isinstance(given, str) else given
        wrong = list(_wrong(given, options))
        if wrong:
            problems += wrong
            continue
        method = METHODS[options["method"]]
        replay = float(options.get("replay") or 0.0)
        name = options["name"] if options.get("name") is not None else options["method"] + _suffix(options, replay)
        begun = options.get("from_adapter") is not None
        wanted = _as_tuple(options.get("ranks", ranks)) if method.has_rank and not begun else (None,)
        others = {key: value for key, value in options.items() if key not in _OWN}
        own = {key: tuple(v) if isinstance(v, list) else v for key, v in others.items() if key not in POLICY}
        for rank in wanted:
            variant = Variant(
                name=name,
                method=options["method"],
                rank=rank,
                replay=replay,
                b_ratio=float(options.get("b_ratio", method.b_ratio)),
                objective=options.get("objective", "sft"),
                beta=None if options.get("beta") is None else float(options["beta"]),
                reward_weights=tuple(map(float, options.get("reward_weights") or ())),
                from_adapter=options.get("from_adapter"),
                learning_rates=_rates(options.get("learning_rates"), rates, name, options["method"], problems),
                options=own,
                policy={key: value for key, value in others.items() if key in POLICY},
            )
            try:
                _ = variant.adapter
            except ConfigError as error:
                problems += [f"methods: {name}: {line.strip()}" for line in str(error).splitlines()[1:]]
            chosen.append(variant)
    for one, other in alike(variant.key for variant in chosen):
        told = f"there are two of {one}" if one == other else f"{one} and {other} differ in capitals alone"
        problems.append(f"methods: {told}; give one of them another name")
    if isinstance(rates, Mapping):
        known = {"default", *METHODS, *(variant.name for variant in chosen)}
        problems += [f"learning_rates: there is no method {name!r}" for name in rates if name not in known]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return chosen


def _suffix(options: Mapping[str, Any], replay: float) -> str:
    objective = options.get("objective", "sft")
    begun = "+from-adapter" if options.get("from_adapter") is not None else ""
    return begun + (f"-{objective}" if objective != "sft" else "") + (f"+replay{100 * replay:g}" if replay else "")


def _wrong(given: Any, options: Any) -> Iterator[str]:
    if not isinstance(options, Mapping) or options.get("method") not in METHODS:
        name = options.get("method") if isinstance(options, Mapping) else given
        yield f"methods: {name!r} is no method; expected one of {', '.join(METHODS)}, or a mapping with one as `method`"
        return
    method = METHODS[options["method"]]
    for key in options.keys() - {*_OWN, *_ADAPTER, *POLICY}:
        yield f"methods: {options['method']}: there is no option {key}"
    of_grpo = [key for key in options if key in (*POLICY, "reward_weights")]
    if of_grpo and options.get("objective") != "grpo":
        yield f"methods: {options['method']}: {', '.join(of_grpo)}: of objective grpo alone"
    yield from _wrong_beginning(options, method)
    weights = options.get("reward_weights") or ()
    if not isinstance(weights, list | tuple) or not all(map(is_number, weights)):
        yield f"methods: reward_weights is {weights!r}; expected a list of numbers"
    if method.adapter is None and (extra := sorted(options.keys() & {*_ADAPTER, "ranks", "b_ratio"})):
        yield f"methods: full fine-tuning has no adapter, and so no {', '.join(extra)}"
    replay = options.get("replay") or 0
    if not is_number(replay) or not 0 <= replay < 1:
        yield f"methods: replay is {replay!r}; expected a share of at least 0 and below 1"
    if (name := options.get("name")) is not None:
        if problem := name_problem(name):
            yield f"methods: name: {problem}"
        elif name in METHODS and name != options["method"]:
            yield f"methods: {options['method']} is named {name}, which is another method; give it another name"
    objective, beta = options.get("objective", "sft"), options.get("beta")
    if objective not in OBJECTIVES:
        yield f"methods: objective is {objective!r}; expected one of {', '.join(OBJECTIVES)}"
    elif objective != "sft" and method.adapter is None:
        yield f"methods: full fine-tuning has no adapter to switch off, which {objective} is compared with"
    elif objective != "sft" and replay:
        yield f"methods: replay is of sft; {objective} learns no plain text"
    none = objective == "grpo" and beta == 0  # which is its default
    if beta is not None and not none and (objective == "sft" or not is_number(beta) or beta <= 0):
        yield f"methods: beta is {beta!r}; expected a positive number, of an objective other than sft"
    ratio = options.get("b_ratio", 1)
    if not is_number(ratio) or ratio <= 0:
        yield f"methods: b_ratio is {ratio!r}; expected a positive number"
    ranks = _as_tuple(options.get("ranks", (1,)))
    if not ranks or not all(is_int(rank) and rank > 0 for rank in ranks):
        yield f"methods: ranks are {options.get('ranks')!r}; expected whole numbers of at least 1"


def _wrong_beginning(options: Mapping[Any, Any], method: Method) -> Iterator[str]:
    place = options.get("from_adapter")
    if place is None:
        return
    if problem := path_problem(place) if isinstance(place, str) and place else "expected the folder of an adapter":
        yield f"methods: from_adapter is {shown(place)}: {problem}"
    if options["method"] not in ("lora", "dora"):
        yield f"methods: {options['method']}: from_adapter goes on from an adapter of lora or dora; name that"
    if chosen := sorted(options.keys() & {*_ADAPTER, "ranks"}):
        yield f"methods: {options['method']}: {', '.join(chosen)}: the adapter in {shown(place)} says that already"


def _rates(own: Any, shared: Any, name: str, method: str, problems: list[str]) -> tuple[float, ...]:
    """Those of the entry itself, of its name, of its method, or the default ones."""
    if own is None and isinstance(shared, Mapping):
        own = shared.get(name, shared.get(method, shared.get("default")))
    elif own is None:
        own = shared
    rates: list[float] = []
    for rate in _as_tuple(own) if own is not None else ():
        try:
            rates.append(float(rate))  # YAML reads 1e-3 as text
        except (TypeError, ValueError):
            rates.append(0.0)
    if not rates or not all(is_number(rate) and rate > 0 for rate in rates):
        problems.append(f"learning_rates of {name} are {own!r}; expected positive numbers")
    return tuple(sorted(set(rates)))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
