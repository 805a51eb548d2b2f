"""Whoever moves to another version of transformers or TRL reads in each override what it relies on."""

import re
from types import FunctionType

import pytest
from trl.trainer.sft_trainer import SFTTrainer

from theodora.train.trainer import AdapterTrainer

OVERRIDES = [
    (kind, name)
    for kind in AdapterTrainer.__mro__
    if kind.__module__.startswith("theodora.")
    for name, value in vars(kind).items()
    if isinstance(value, FunctionType) and name in dir(SFTTrainer) and name != "__init__"
]


@pytest.mark.parametrize(("kind", "name"), OVERRIDES, ids=lambda value: getattr(value, "__name__", value))
def test_an_override_says_of_what_and_for_which_version(kind, name):
    owner = next(base for base in SFTTrainer.__mro__ if name in vars(base))
    library = owner.__module__.partition(".")[0]
    told = " ".join((vars(kind)[name].__doc__ or "").split())
    assert re.match(rf"Overrides {library} [\d. to]+'s `{owner.__name__}\.{name}`", told, re.IGNORECASE)


def test_groups_of_overrides_do_not_hide_one_another():
    """A method of two groups calls the other's, as only `super()` does."""
    names = [name for _, name in OVERRIDES]
    for name in {name for name in names if names.count(name) > 1}:
        kinds = [kind for kind, other in OVERRIDES if other == name]
        assert all("__class__" in vars(kind)[name].__code__.co_freevars for kind in kinds), name
