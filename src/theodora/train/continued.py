"""Going on from an adapter with other data: what is taken over from it, and what may not say otherwise."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from transformers import PreTrainedModel

from theodora.adapters.load import load_to_train, original_config
from theodora.adapters.targets import find_targets
from theodora.config import WITH_REFERENCE, AdapterConfig, TrainConfig
from theodora.errors import ConfigError, bullet_list, shown
from theodora.files.adapter import AdapterFile, read_adapter
from theodora.files.model_folder import base_model_of
from theodora.train.reference import BASE

_TAKEN = ("method", "rank", "alpha", "rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "init")
"""Fields of an adapter that its file decides; its targets are compared on the model."""
_WHERE = ("targets", "exclude")


def continued(config: TrainConfig) -> TrainConfig:
    """The configuration of a run that goes on from `from_adapter`, with what the adapter decides.

    Args:
        config: the run; one that begins anew is given back as it is. Options of the adapter count as chosen that
            `from_options` was given, or, in Python, that are not as they are by default.

    Raises:
        CheckpointError: the adapter cannot be read, or names no base model and none is given.
        ConfigError: an option says otherwise than the adapter.
    """
    config = compared(config)
    if config.from_adapter is None:
        return config
    file = read_adapter(config.from_adapter, for_model=True)
    theirs, mine, default = original_config(file), config.adapter, AdapterConfig()
    chosen = config.chosen
    if chosen is None:
        chosen = [f.name for f in fields(mine) if getattr(mine, f.name) != getattr(default, f.name)]
    conflicts = [
        f"{name} is {shown(getattr(mine, name))}; the adapter has {shown(getattr(theirs, name))}"
        for name in _TAKEN
        if name in chosen and not _alike(name, mine, theirs)
    ]
    if conflicts:
        raise ConfigError(
            f"These options say otherwise than the adapter in {config.from_adapter}, which training goes on from. "
            "Leave them out, or begin a new adapter without from_adapter:" + bullet_list(conflicts)
        )
    taken = {name: getattr(theirs, name) for name in _TAKEN}
    where = {} if any(name in chosen for name in _WHERE) else {"targets": theirs.targets, "exclude": ()}
    dropout = mine.dropout if "dropout" in chosen else theirs.dropout
    on, quantize, base_dtype = file.trained_on, config.quantize, config.base_dtype
    if quantize is None and base_dtype == "auto" and on is not None:  # the base as the adapter knows it
        quantize = on.quantize  # pyright: ignore[reportAssignmentType]
    return replace(
        config,
        quantize=quantize,
        model=config.model or base_model_of(file.path),
        revision=config.revision or (None if config.model else file.base_revision),
        adapter=replace(mine, **taken, **where, dropout=dropout),
    )


def compared(config: TrainConfig) -> TrainConfig:
    """The configuration with what the model is compared with: by default what training starts from, which a reference
    alone names, too."""
    if config.objective not in WITH_REFERENCE:
        return config
    if config.reference not in (None, BASE) and config.from_adapter is None:
        return replace(config, from_adapter=config.reference)
    return replace(config, reference=config.reference or config.from_adapter or BASE)


def load_continued(model: PreTrainedModel, config: TrainConfig) -> TrainConfig:
    """Put the adapter on the model, to be trained on; the configuration names the modules that it has from then on.

    Raises:
        CheckpointError: it was made for another model.
        ConfigError: targets or exclude name other modules than it has.
    """
    assert config.from_adapter is not None
    file, adapter = read_adapter(config.from_adapter, for_model=True), config.adapter
    if adapter.exclude or adapter.targets != original_config(file).targets:
        _check_targets(model, config, file)
    loaded = load_to_train(model, config.from_adapter, dropout=adapter.dropout, dtype=adapter.adapter_dtype)
    return replace(config, adapter=replace(adapter, targets=loaded.targets, exclude=()))


def _check_targets(model: PreTrainedModel, config: TrainConfig, file: AdapterFile) -> None:
    wanted, held = find_targets(model, config.adapter), list(file.modules)
    if set(wanted) != set(held):
        raise ConfigError(
            f"targets and exclude name {len(wanted)} modules, and the adapter in {config.from_adapter}, which training "
            f"goes on from, has {len(held)}: {', '.join(sorted({path.rpartition('.')[2] for path in held}))}. Leave "
            "them out, or begin a new adapter without from_adapter."
        )


def _alike(name: str, mine: AdapterConfig, theirs: AdapterConfig) -> bool:
    """Whether a field that was chosen says what the adapter has."""
    one, other = getattr(mine, name), getattr(theirs, name)
    if name == "init":  # where training began is past, unless the file is relative to it
        return theirs.init == "default" or one == other
    if name == "modules_to_save":
        return {path.rpartition(".")[2] for path in one} == {path.rpartition(".")[2] for path in other}
    return dict(one) == dict(other) if isinstance(one, dict) else one == other


def described(config: TrainConfig) -> str | None:
    """What a run began from, for the panel and the card; None for a new adapter."""
    return None if config.from_adapter is None else f"goes on from the adapter in {Path(config.from_adapter)}"
