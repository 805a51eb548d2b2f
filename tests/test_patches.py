"""Functions of other libraries, replaced while there are users, for a block, or for good."""

import functools
import gc
import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from transformers.utils.generic import GeneralInterface

import theodora
from theodora.patches import Attribute, Patch, Registered, replaced, wrap_once


class Registry(GeneralInterface):
    _global_mapping: ClassVar = {"greet": lambda: "theirs"}


def library():
    return SimpleNamespace(greet=lambda: "theirs")


def shouting(original, patch):
    return lambda: original().upper() if patch.on else original()


def attribute():
    owner = library()
    return Attribute(owner, "greet"), lambda: owner.greet()


def registered():
    registry = Registry()
    return Registered(registry, "greet"), lambda: registry["greet"]()


@pytest.mark.parametrize("place", [attribute, registered])
@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
def test_the_last_user_to_leave_puts_the_original_back(place, order):
    place, call = place()
    original = place.get()
    patch = Patch(place, shouting)
    uses = {number: patch.use() for number in range(3)}
    for number in order:
        assert call() == "THEIRS"
        assert patch.on
        del uses[number]
    assert place.get() is original
    assert not patch.on
    assert call() == "theirs"


def test_each_original_has_one_replacement():
    """For another one torch.compile would compile anew."""
    place, _ = attribute()
    patch, seen = Patch(place, shouting), set()
    for _ in range(2):
        use = patch.use()
        seen.add(place.get())
        del use
    assert len(seen) == 1


def test_a_user_that_is_garbage_does_not_count():
    place, call = attribute()
    patch = Patch(place, shouting)
    user = SimpleNamespace(use=patch.use())
    user.itself = user
    del user
    gc.collect(1)  # the young are enough
    assert call() == "theirs"


def test_what_somebody_else_has_put_on_top_stays():
    place, call = attribute()
    original = place.get()
    patch = Patch(place, shouting)
    use = patch.use()
    ours = place.get()
    place.put(lambda: f"<{ours()}>")
    assert call() == "<THEIRS>"
    theirs = place.get()
    del use
    assert place.get() is theirs
    assert call() == "<theirs>"  # through ours, which does nothing now
    use = patch.use()
    assert patch.original() is theirs
    assert call() == "<THEIRS>".upper()
    del use
    assert place.get() is theirs
    place.put(ours)  # as it was when they came
    use = patch.use()
    assert (call(), patch.original()) == ("THEIRS", original)
    del use
    assert place.get() is original


def test_what_calls_ours_and_says_so_is_not_wrapped_again():
    place, call = attribute()
    patch = Patch(place, shouting)
    first = patch.use()
    ours = place.get()
    place.put(theirs := functools.wraps(ours)(lambda: f"<{ours()}>"))
    second = patch.use()
    assert place.get() is theirs
    del first, second
    assert call() == "<theirs>"
    third = patch.use()
    assert place.get() is theirs
    assert call() == "<THEIRS>"
    del third


def test_a_registry_shows_what_its_library_registers_afterwards():
    place, call = registered()
    patch = Patch(place, shouting)
    use = patch.use()
    del use
    assert "greet" not in place.registry._local_mapping
    place.registry["greet"] = own = lambda: "of this file"
    use = patch.use()
    assert call() == "OF THIS FILE"
    del use
    assert place.registry["greet"] is own


def test_replaced_for_a_block():
    owner = library()
    original = owner.greet
    with pytest.raises(ZeroDivisionError), replaced(owner, greet=lambda: 1 / 0):
        owner.greet()
    assert owner.greet is original


def test_wrapped_once():
    owner = library()
    for _ in range(2):
        wrap_once(owner, "greet", lambda original: lambda: f"<{original()}>")
    assert owner.greet() == "<theirs>"


def test_the_list_names_every_file_that_replaces_something():
    source = Path(theodora.__file__).parent
    text = (source.parents[1] / "docs" / "design.md").read_text(encoding="utf-8")
    table = text.split("| replaced | where |")[1].split("\n\n")[0]
    listed = {path for row in table.splitlines() for path in re.findall(r"`([\w/]+)`", row.split("|")[2:3].pop())}
    assert [path for path in listed if not (source / f"{path}.py").is_file()] == []
    replacing = {
        str(file.relative_to(source).with_suffix(""))
        for file in source.rglob("*.py")
        if "from theodora.patches import" in file.read_text(encoding="utf-8")
    }
    assert replacing <= listed
