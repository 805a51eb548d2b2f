"""Which modules of a model an adapter is put on. Names and patterns match as in PEFT, so that files mean the same."""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from torch import nn

from theodora.adapters.parts import parts_of
from theodora.config import AdapterConfig
from theodora.errors import ConfigError, bullet_list
from theodora.layers import AdapterLayer, cannot_adapt
from theodora.layers.base_weights import CONVOLUTION
from theodora.layers.experts import ExpertParameter, expert_parameters, named_places
from theodora.layers.kinds import is_conv1d, is_linear
from theodora.layers.libraries import prepare
from theodora.layers.packed import refused
from theodora.paths import PathPattern, endings, matches, nearest

_ROUTER = "it chooses experts, and stays frozen unless targets names it"
_TOLD = 20  # unknown names that an error tells


def find_targets(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Paths of the modules that `config` adapts in `model`, in the model's order.

    Raises:
        ConfigError: listing every target that matches nothing (with the nearest real names) and every module that
            cannot be adapted (with the reason).
    """
    prepare(model)
    modules = named_places(model)
    problems: list[str] = []
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ConfigError(
            "The model carries PEFT's adapters already, and adapters on adapters are not supported. Call its "
            "merge_and_unload() or unload() first; PEFT's saved adapters load with load_adapter."
        )
    for what in ("targets", "exclude", "modules_to_save"):
        wanted = getattr(config, what)
        if isinstance(wanted, tuple):
            problems += [f"{what}: {told}" for told in _unknown_of(wanted, modules)]
    if config.targets == "all-linear":
        parts = parts_of(model)
        paths = [path for path in _all_linear(model, modules, bool(config.experts)) if parts.reached(path)]
        if config.experts and not any(isinstance(modules[path], ExpertParameter) for path in paths):
            problems.append("experts: this model has no fused experts; leave the option out, or name targets")
    else:
        paths = _selected(config, modules)
        if isinstance(config.targets, str) and not paths:
            problems.append(f"targets: the expression {config.targets!r} matches no module path of this model")
    skipped = (*((config.exclude,) if isinstance(config.exclude, str) else config.exclude), *config.modules_to_save)
    paths = [
        path
        for path in paths
        if not _excluded(config, path, modules) and not _inside(path, config.modules_to_save, modules)
    ]
    unfit = {path: reason for path in paths if (reason := _unfit(path, modules[path], model)) is not None}
    if config.targets == "all-linear":
        unfit |= {path: _ROUTER for path in _of_routers(paths, modules) if path not in unfit}
    if config.targets == "all-linear" and len(unfit) < len(paths):
        wanted, paths = paths, [path for path in paths if path not in unfit]
        if config.experts and not any(isinstance(modules[path], ExpertParameter) for path in paths):
            problems += [f"{path}: {unfit[path]}" for path in wanted if isinstance(modules[path], ExpertParameter)]
        else:
            _warn_of_left_out(unfit)
    else:
        problems += [f"{path}: {reason}" for path, reason in unfit.items()]
    for what in ("rank_pattern", "alpha_pattern"):
        problems += [
            f"{what}: {key!r} matches none of the adapted modules"
            for key in PathPattern(getattr(config, what), config.expressions).idle(paths)
        ]
    if not paths and not config.modules_to_save and not problems:
        problems.append(f"nothing is left to adapt (targets={config.targets!r}, left out: {', '.join(skipped) or '-'})")
    if problems:
        raise ConfigError("The adapter does not fit this model:" + bullet_list(problems))
    return paths


def for_text(model: nn.Module, config: AdapterConfig) -> tuple[AdapterConfig, list[str]]:
    """The configuration with targets that text reaches, and what to say of those that it does not.

    Args:
        model: without this adapter.
        config: what was asked for; names such as q_proj, or an expression, may select modules of a vision tower, too.

    Raises:
        ConfigError: nothing that text reaches is selected.
    """
    parts = parts_of(model)
    if not parts.others or config.targets == "all-linear":
        return config, []
    modules = named_places(model)
    selected = _selected(config, modules)
    beyond = [path for path in selected if not parts.reached(path) and not _excluded(config, path, modules)]
    if not beyond:
        return config, []
    counts = Counter(parts.of(path) for path in beyond)
    told = [f"{part}: {count} modules" for part, count in counts.items()]
    within = tuple(path for path in selected if parts.reached(path))
    if not within:
        raise ConfigError(
            f"The targets {config.targets!r} select only modules that text does not reach, so that they would never be "
            "trained:" + bullet_list(told) + f"\nThe language model is {parts.language_model or 'the rest'}."
        )
    note = (
        f"the targets select {len(beyond)} modules that text does not reach ({'; '.join(told)}): they stay frozen, and "
        f"{len(within)} in {parts.language_model or 'the language model'} are adapted"
    )
    return replace(config, targets=within), [note]


def frozen_linear(model: nn.Module, left_out: tuple[str, ...]) -> list[str]:
    """Paths of the linear layers that a model calls, without the output head and what `left_out` names."""
    modules = {path: module for path, module in model.named_modules() if path}
    return [
        path
        for path in _all_linear(model, modules, experts=True)
        if not _inside(path, left_out, modules) and _unfit(path, modules[path], model) is None
    ]


def find_modules_to_save(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Paths of the modules that are trained in full."""
    return [path for path, _ in model.named_modules() if path and names and matches(names, path)]


def target_names(model: nn.Module, paths: list[str]) -> list[str]:
    """The shortest list of names that, read by PEFT, selects just the modules `paths` in `model`."""
    # PEFT takes the names of the experts' linear siblings for the experts' own.
    if any(expert_parameters(module, path) for path, module in model.named_modules()):
        return sorted(paths)
    last = {path.rpartition(".")[2] for path in paths}
    selected = [path for path, _ in model.named_modules() if path and matches(tuple(last), path)]
    return sorted(last) if set(selected) == set(paths) else sorted(paths)


def parameter_names(paths: list[str]) -> list[str]:
    """The shortest names that, read by PEFT as `target_parameters`, mean just these parameters of experts."""
    return sorted({".".join(path.rsplit(".", 2)[-2:]) for path in paths})


def saved_names(model: nn.Module, modules_to_save: tuple[str, ...]) -> list[str]:
    """Names that, read by PEFT, select the modules trained in full: PEFT compares endings, also within a name."""
    paths = find_modules_to_save(model, modules_to_save)
    selected = [path for path, _ in model.named_modules() if path.endswith(modules_to_save)] if modules_to_save else []
    return list(modules_to_save) if selected == paths else paths


def _unfit(path: str, module: nn.Module, model: nn.Module) -> str | None:
    """Why the module cannot take an adapter, if it cannot."""
    parent, _, name = path.rpartition(".")
    if isinstance(module, ExpertParameter):
        return cannot_adapt(module) or _why_bypassed(parent.rpartition(".")[0], model)
    if name in _read_past(type(model.get_submodule(parent))):
        return f"{type(model.get_submodule(parent)).__name__} reads its weight without calling it"
    return cannot_adapt(module)


def _why_bypassed(block: str, model: nn.Module) -> str | None:
    """Why the experts of a block would not be called: a kernel in the block's place reads their weights itself."""
    module = model.get_submodule(block)
    # (accelerate's hooks keep the forward that they wrap, and call it)
    if "forward" not in module.__dict__ or "_old_forward" in module.__dict__:
        return None
    return (
        f"the forward of the {type(module).__name__} around it was replaced (by a fused kernel: use_kernels, "
        "kernelize, MegaBlocks), which reads the experts' weights past the adapter; load the model without it"
    )


@cache
def _read_past(parent: type[nn.Module]) -> frozenset[str]:
    """Names of submodules whose weight the parent's code computes with, past their forward (as Mamba does)."""
    used, asked_of = r"self\.(\w+)\.weight\b", r"(?!\.(?:dtype|device|shape|size|data_ptr)\b)"
    assigned = r"(?!\s*=[^=])"
    names: set[str] = set()
    for cls in parent.__mro__:
        for name, method in vars(cls).items():
            if inspect.isfunction(method) and "init" not in name and cls is not nn.Module:
                with contextlib.suppress(OSError):  # functions made at run time have no source
                    names.update(re.findall(used + asked_of + assigned, inspect.getsource(method)))
    return frozenset(names)


def _warn_of_left_out(unfit: Mapping[str, str]) -> None:
    kinds = {path.rpartition(".")[2]: reason for path, reason in unfit.items()}
    if kinds:
        told = "; ".join(f"{name}: {reason}" for name, reason in kinds.items())
        warnings.warn(f"all-linear leaves out {len(unfit)} modules ({told}).", stacklevel=5)


def _selected(config: AdapterConfig, modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths that the names or the expression of `config` match."""
    return [
        path
        for path, module in modules.items()
        if matches(config.targets, path, config.expressions)
        and not (config.experts is False and isinstance(module, ExpertParameter))
    ]


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module], experts: bool) -> list[str]:
    """Every linear layer but the output head and `nn.MultiheadAttention`'s, whose weight is read past its forward.

    Args:
        model: the model.
        modules: its modules and parameters of experts by path.
        experts: whether the latter are wanted, too; else it is said that they stay frozen.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    fused = [path for path, module in modules.items() if isinstance(module, ExpertParameter)]
    if fused and not experts:
        warnings.warn(
            f"{len(fused)} weights of fused experts ({fused[0]}, …) stay frozen; experts=True (--experts) adapts them.",
            stacklevel=5,
        )
    return [
        path
        for path, module in modules.items()
        if module is not head
        and (experts or not isinstance(module, ExpertParameter))
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        and (isinstance(module, nn.Linear | AdapterLayer) or is_linear(module) or is_conv1d(module) or refused(module))
        and not isinstance(module, (nn.Embedding, CONVOLUTION))
    ]


def _of_routers(paths: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Those within the router beside fused experts."""
    experts = {path.rpartition(".")[0] for path, module in modules.items() if isinstance(module, ExpertParameter)}
    blocks = {path.rpartition(".")[0] for path in experts}
    routers = tuple(f"{block}.{name}." for block in blocks for name in ("router", "gate"))
    return [path for path in paths if f"{path}.".startswith(routers)] if routers else []


def _inside(path: str, names: tuple[str, ...], modules: Mapping[str, nn.Module]) -> bool:
    """Whether `path` is, or lies within, a module that `names` selects."""
    parts = path.split(".")
    return any(matches(names, ".".join(parts[: n + 1])) for n in range(len(parts))) if names else False


def _excluded(config: AdapterConfig, path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a path is left out: a name leaves out the module and all within it, an expression what it matches."""
    if isinstance(config.exclude, str):
        return bool(config.exclude) and matches(config.exclude, path, config.expressions)
    return _inside(path, config.exclude, modules)


def _unknown_of(names: tuple[str, ...], modules: Mapping[str, nn.Module]) -> list[str]:
    """What to say of names that no module has. Only the first get suggestions: looking for near names takes time."""
    known = {ending for path in modules for ending in endings(path)}
    unknown = [name for name in names if name not in known]
    more = [f"and {len(unknown) - _TOLD:,} more names that no module has"] if len(unknown) > _TOLD else []
    return [_unknown(name, modules) for name in unknown[:_TOLD]] + more


def _unknown(name: str, modules: Mapping[str, nn.Module]) -> str:
    kinds = [path.rpartition(".")[2] for path, module in modules.items() if cannot_adapt(module) is None]
    close = nearest(name, kinds) or sorted(dict.fromkeys(kinds))[:12]
    return f"no module is called {name!r}; there are {', '.join(close)}"
