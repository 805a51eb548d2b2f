"""The whole answer of `theodora plan`: every setting with what it takes, and the one to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theodora.config import TrainConfig
from theodora.data import load_examples, tokenize
from theodora.files.tokenizer import load_tokenizer
from theodora.plan.devices import Machine, machine
from theodora.plan.estimate import Estimate, Models, Setting, candidates, estimate, largest_batch, recommend
from theodora.plan.fits import (
    models_of,
    optimizer_of,
    read_config,
    setting_of,
    shardings,
    stores_of,
    with_default,
)
from theodora.plan.measured import read_measured, speed
from theodora.plan.paper import PaperModel

_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Row:
    """One setting."""

    estimate: Estimate
    fits: bool
    largest_batch: int
    """Rows that fit into a pass at most."""
    tokens_per_second: float | None
    """Of all processes, as measured for such a setting; None if it was not."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was found."""

    config: TrainConfig
    machine: Machine
    parameters: int
    """Of the base."""
    trained: int
    family: str
    layers: int
    plain: str
    """The dtype of plain weights."""
    asked: Setting
    """The run as it was asked for."""
    rows: list[Row]
    recommended: Estimate | None
    notes: list[str]
    models: Models

    def model_of(self, setting: Setting) -> PaperModel:
        """The model on paper, as the setting stores it."""
        return self.models(setting.stored)

    def name_of(self, setting: Setting) -> str:
        """A setting in few words."""
        words = [_SHORT.get(self.plain, self.plain) if setting.stored == "plain" else setting.stored]
        words += ["recomputed"] if setting.recomputes else []
        words += ["sharded"] if setting.sharding != "none" else []
        return ", ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; sizes in bytes."""
        return {
            "model": self.config.model,
            "family": self.family,
            "parameters": self.parameters,
            "trained": self.trained,
            "dtype": self.plain,
            "machine": vars(self.machine),
            "asked": vars(self.asked),
            "settings": [
                row.estimate.to_dict()
                | {"fits": row.fits, "largest_batch": row.largest_batch, "tokens_per_second": row.tokens_per_second}
                for row in self.rows
            ],
            "recommended": None if self.recommended is None else self.recommended.to_dict(),
            "notes": self.notes,
        }


def survey(
    config: TrainConfig,
    *,
    gpus: int | None = None,
    memory: str | None = None,
    device: str | None = None,
    measured: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Survey:
    """Look at every setting that the configuration leaves open.

    Args:
        config: the run; `data` may name a file that is not there.
        gpus: as in `plan.machine`.
        memory: likewise.
        device: likewise.
        measured: files of `theodora bench --output`.
        say: is told what is being counted.

    Raises:
        ConfigError: a size, a number or a file makes no sense, or the adapter does not fit the model.
        CheckpointError: the model has no configuration that can be read.
    """
    where, speeds = machine(gpus, memory, device), read_measured(measured)
    model_config = read_config(config)
    length, notes = _longest(config)
    models = models_of(config, model_config, where)
    asked = setting_of(config, model_config, length)
    first = models(asked.stored)
    asked = with_default(asked, config, first)
    optimizer, stores = optimizer_of(config), stores_of(config, model_config, where)
    again = (False, True) if config.gradient_checkpointing is None else (config.gradient_checkpointing,)
    settings = list(candidates(asked, where, stores=stores, recomputes=again, shardings=shardings(where, config)))
    rows: list[Row] = []
    for number, setting in enumerate(settings, 1):
        say(f"counting what a step holds, {number} of {len(settings)}")
        found = estimate(models(setting.stored), setting, where.gpus, optimizer)
        most = largest_batch(models(setting.stored), setting, where, optimizer)
        per_second = speed(speeds, config.model, config.adapter.method, setting)
        rows.append(Row(found, found.fits(where.memory), most, None if per_second is None else per_second * where.gpus))
    text: Any = model_config.get_text_config()
    if any(not row.estimate.traced for row in rows):
        notes.append(
            f"a {type(first.model).__name__} does not run without numbers: activations are a coarse estimate, from the "
            "sizes of its layers"
        )
    if where.gpus > 1:
        notes.append("what sharding takes is computed, not measured")
    return Survey(
        config=config,
        machine=where,
        parameters=first.parameters - first.trained,
        trained=first.trained,
        family=str(text.model_type),
        layers=len(first.blocks or ()),
        plain=str(first.dtype).removeprefix("torch."),
        asked=asked,
        rows=rows,
        recommended=recommend(models, [row.estimate.setting for row in rows], where, optimizer),
        notes=[*notes, *first.notes],
        models=models,
    )


def _longest(config: TrainConfig) -> tuple[int | None, list[str]]:
    """Tokens of the longest row of the data, if they are there to be read; and what to say of them."""
    if config.objective != "sft":
        return None, [f"what is counted is a step of sft, with rows of max_length: {config.objective} takes another"]
    if config.packing or not Path(config.data).exists():
        return None, []
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code, revision=config.revision)
    rows = tokenize(
        load_examples(config.data),
        tokenizer,
        max_length=config.max_length,
        use_chat_template=config.use_chat_template,
        train_on=config.train_on,
    )
    lengths = [len(ids) for ids in rows["input_ids"]]
    mean = sum(lengths) / max(1, len(lengths))
    note = f"{len(lengths):,} rows of {config.data}: the longest has {max(lengths):,} tokens, the mean is {mean:,.0f}"
    if max(lengths) > 2 * mean:
        note += "; --packing fills rows up instead of padding them"
    return max(lengths), [note]
