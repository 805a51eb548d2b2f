"""Other people's trainers with an injected model.

`transformers.Trainer` resumes from an adapter's checkpoints and finds its best one again. It knows two kinds of model,
PEFT's and whole ones, and offers no hook for a third, so its two loading methods are wrapped; for all other models the
wrappers pass the call on. PEFT puts no second adapter on ours.

TRL's trainers get a reference: the policy as it was when they began. DPO, KTO, GRPO, RLOO and self-distillation load
the policy's folder once more for it. For a model with a loaded adapter that is the base, not what training starts
from; for any other adapter it is all weights twice. So the policy's own frozen twin (`reference_model`) is given to
them, and what cannot be right is refused before a step is taken.

On a quantised base both ask for PEFT's model, and TRL turns whatever is trained into bfloat16, without a word: an
adapter's factors and DoRA's magnitudes alike. While a trainer is made, such a model passes for PEFT's.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from theodora.adapters.check import load_weights
from theodora.adapters.reference import reference_model, shares_training
from theodora.adapters.state import find_state, require_state
from theodora.adapters.trainer_hooks import refuse_pefts
from theodora.errors import ConfigError
from theodora.patches import replaced, wrap_once

_MAKE = "create_model_from_path"
# Trainers that make their reference (or teacher) in any case; the others take a `ref_model`.
_MAKE_THEIR_OWN = ("GRPOTrainer", "RLOOTrainer", "SDFTTrainer", "SDPOTrainer")
_USE = "Pass ref_model=theodora.reference_model(model, ADAPTER), a frozen twin on the same weights."


def _teach_trl(trainer: Any) -> None:
    """Let TRL's trainers be met when the first of them is made: they all are `trainer`s of transformers."""

    def meeting_trl(own: Any) -> Any:
        def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
            for parent in cls.__mro__:
                if parent.__module__.startswith("trl.") and "__init__" in vars(parent):
                    wrap_once(parent, "__init__", _with_reference)
            return object.__new__(cls) if own is object.__new__ else own(cls, *args, **kwargs)

        return new

    wrap_once(trainer, "__new__", meeting_trl)


def _with_reference(make: Any) -> Any:
    """The `__init__` of a trainer, which gets an injected model's own reference."""
    signature = inspect.signature(make)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(self, *args, **kwargs)
        except TypeError:  # which the trainer says better
            return make(self, *args, **kwargs)
        policy = given.arguments.get("model")
        if not isinstance(policy, nn.Module) or find_state(policy) is None:
            return make(self, *args, **kwargs)
        _check(type(self).__name__, policy, given.arguments)
        takes_one = "ref_model" in signature.parameters
        if takes_one and given.arguments.get("ref_model") is None and _own_reference_pays(type(self)):
            given.arguments["ref_model"] = _reference(policy, given.arguments.get("args"))
        with _loading_reference(type(self), policy, given.arguments.get("args")), as_adapted(policy):
            make(*given.args, **given.kwargs)
        _check_reference(self, given.arguments)

    return init


def _of_adapted(make: Any) -> Any:
    """The `__init__` of transformers' trainer, which wants a quantised model to carry PEFT's adapter."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        with as_adapted(model):
            make(self, *args, **kwargs)

    return init


@contextmanager
def as_adapted(model: Any) -> Iterator[None]:
    """Within the block a quantised model that carries our adapter says that it has one, and nothing of its bits."""
    if not isinstance(model, PreTrainedModel) or find_state(model) is None or not getattr(model, "is_quantized", False):
        yield
        return
    said = {"_hf_peft_config_loaded": True, "is_loaded_in_4bit": False, "is_loaded_in_8bit": False}
    before = {name: vars(model)[name] for name in said if name in vars(model)}
    vars(model).update(said)
    try:
        yield
    finally:
        for name in said:
            vars(model).pop(name, None)
        vars(model).update(before)


def _check(name: str, policy: nn.Module, given: dict[str, Any]) -> None:
    """Raise a ConfigError for what a trainer cannot do with an injected model."""
    args, reference = given.get("args"), given.get("ref_model")
    if given.get("peft_config") is not None:
        raise ConfigError(
            f"{name} got a peft_config and a model that carries Theodora's adapter, which would be left out of what "
            "PEFT saves. Leave peft_config out to train that adapter, or call remove_adapter(model) first."
        )
    if getattr(args, "sync_ref_model", False):
        raise ConfigError(
            "sync_ref_model mixes all weights of the policy into a second model; a policy with an adapter has no "
            "second model. Set sync_ref_model=False."
        )
    if getattr(args, "teacher_model_kind", None) == "ema":
        raise ConfigError(
            "teacher_model_kind='ema' averages all weights of a second model; a model with an adapter has none. Choose "
            "'base' (as the model was at the start) or 'live'."
        )
    if reference is not None and isinstance(reference, nn.Module) and shares_training(policy, reference):
        raise ConfigError(
            f"The ref_model given to {name} holds the very tensors that it trains, so that it would follow the policy. "
            + _USE
        )


def _own_reference_pays(trainer: type) -> bool:
    """Whether a trainer that takes a `ref_model` would load one otherwise; the online ones copy the policy rightly."""
    return _MAKE in vars(sys.modules[_maker(trainer).__module__])


def _maker(trainer: type) -> type:
    """The class of TRL among a trainer's parents that makes the reference."""
    parents = [
        parent for parent in trainer.__mro__ if parent.__module__.startswith("trl.") and "__init__" in vars(parent)
    ]
    makers = [parent for parent in parents if _MAKE in vars(sys.modules[parent.__module__])]
    return (makers or parents)[0]


@contextmanager
def _loading_reference(trainer: type, policy: nn.Module, args: Any) -> Iterator[None]:
    """Hand the policy's reference to a trainer that loads the policy's folder for one."""
    module: Any = sys.modules[_maker(trainer).__module__]
    if not any(parent.__name__ in _MAKE_THEIR_OWN for parent in trainer.__mro__) or not hasattr(module, _MAKE):
        yield
        return
    load_model = getattr(module, _MAKE)
    folder = getattr(policy.config, "_name_or_path", "")

    def load(model_id: str, *more: Any, **kwargs: Any) -> Any:
        return load_model(model_id, *more, **kwargs) if model_id != folder or more else _reference(policy, args)

    with replaced(module, **{_MAKE: load}):
        yield


def _reference(policy: nn.Module, args: Any) -> nn.Module:
    """The policy as it is now, frozen."""
    twin = reference_model(policy, require_state(policy).active)
    # These cut up weights where they lie, each model's by itself.
    cuts_weights = bool(getattr(args, "deepspeed", None) or getattr(args, "fsdp", None))
    return copy.deepcopy(twin) if cuts_weights else twin


def _check_reference(trainer: Any, given: dict[str, Any]) -> None:
    """Raise a ConfigError if a trainer that is not known here has loaded the base as its reference after all."""
    reference = getattr(trainer, "ref_model", None)
    reference = getattr(reference, "module", reference)
    if reference is None or given.get("ref_model") is not None or find_state(reference) is not None:
        return
    if find_state(given["model"]).active is not None:  # pyright: ignore[reportOptionalMemberAccess]
        raise ConfigError(
            f"{type(trainer).__name__} has loaded the base model as its reference, which is not where the training of "
            "this adapter begins. " + _USE
        )


def teach_trainers(model: nn.Module) -> None:
    """Wrap, once and for good, what trainers of transformers and TRL and PEFT's tuners do with an injected model."""
    if not isinstance(model, PreTrainedModel) or importlib.util.find_spec("accelerate") is None:
        return
    trainer_module = sys.modules.get("transformers.trainer") or importlib.import_module("transformers.trainer")
    trainer: Any = trainer_module.Trainer
    wrap_once(trainer, "__init__", _of_adapted)
    wrap_once(trainer, "_load_from_checkpoint", _loading_adapters(lambda self, folder, *_: folder))
    wrap_once(trainer, "_load_best_model", _loading_adapters(lambda self: self.state.best_model_checkpoint))
    _teach_trl(trainer)
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")  # transformers' trainer has imported it, if it is there
    if tuners is not None:
        wrap_once(tuners.BaseTuner, "inject_adapter", _refusing_ours)


def _refusing_ours(original: Any) -> Any:
    """PEFT's way to put layers on a model, which takes no model with adapters of ours."""

    def inject_adapter(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if find_state(model) is not None:
            refuse_pefts()
        return original(self, model, *args, **kwargs)

    return inject_adapter


def _loading_adapters(find_folder: Callable[..., Any]) -> Callable[[Any], Any]:
    """A trainer's way to load weights, which loads an injected model's from the adapter in the folder that is found."""

    def wrap(original: Any) -> Any:
        def load(self: Any, *args: Any, **kwargs: Any) -> Any:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            if find_state(model) is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
                return original(self, *args, **kwargs)
            return load_weights(model, find_folder(self, *args, *kwargs.values()))

        return load

    return wrap
