"""What stored tensors hold of experts' parameters, against transformers' own conversions as it loads them."""

from types import SimpleNamespace

import pytest
import torch
from transformers.core_model_loading import Concatenate, Interleave, MergeModulelist, Transpose, WeightConverter

from theodora.files.pieces import pieces_of

E, O, I = 12, 6, 4
NAME = "experts.gate_up_proj"
GATE, UP = "experts.*.gate.weight", "experts.*.up.weight"
LAYOUTS = {
    "one by one": ([GATE, UP], [MergeModulelist(0), Concatenate(1)], (O // 2, I)),
    "one each": ([GATE], [MergeModulelist(0)], (O, I)),
    "side by side": (["experts.gate", "experts.up"], [Concatenate(1)], (E, O // 2, I)),
    "turned": (["experts.turned"], [Transpose(1, 2)], (E, I, O)),
    "turned if need be": (["experts.turned"], [Transpose(1, 2, check_dims=True)], (E, I, O)),
    "as it is": (["experts.turned"], [Transpose(1, 2, check_dims=True)], (E, O, I)),
    "in turns": (["experts.woven"], [Interleave(1)], (E, O, I)),
    "in turns, the other way": (["experts.woven"], [Interleave(1, inverse=True)], (E, O, I)),
}


def stored_as(patterns, shape):
    """Key → pattern and tensor, in an order in which no file is read."""
    keys = [(pattern.replace("*", str(e)), pattern) for e in range(E) for pattern in patterns if "*" in pattern]
    keys += [(pattern, pattern) for pattern in patterns if "*" not in pattern]
    return {key: (pattern, torch.randn(shape)) for key, pattern in sorted(keys, reverse=True)}


def loaded(stored, converter):
    """The parameter as transformers makes it."""
    numbered = sorted(stored, key=lambda key: [int(part) if part.isdigit() else 0 for part in key.split(".")])
    tensors = {
        pattern: [stored[key][1] for key in numbered if stored[key][0] == pattern] for pattern, _ in stored.values()
    }
    model = SimpleNamespace(get_parameter=lambda name: torch.empty(E, O, I))
    for op in converter.operations:
        tensors = op.convert(
            tensors,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=NAME,
            model=model,
        )
    (whole,) = tensors.values()
    return whole


def pieces(stored, converter, whole=(E, O, I)):
    return pieces_of(NAME, whole, {key: (p, tuple(t.shape)) for key, (p, t) in stored.items()}, converter)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pieces_make_up_what_transformers_loads(layout):
    patterns, operations, shape = LAYOUTS[layout]
    converter = WeightConverter(list(patterns), NAME, operations)
    stored = stored_as(patterns, shape)
    expected, whole = loaded(stored, converter), torch.full((E, O, I), torch.nan)
    found = pieces(stored, converter)
    assert found.keys() == stored.keys()
    for key, piece in found.items():
        piece.put_into(whole, stored[key][1])
    assert torch.equal(whole, expected)
    for e in range(E):
        for row in range(O):
            places = {key: place for key, piece in found.items() if (place := piece.row(e, row)) is not None}
            ((key, place),) = places.items()
            tensor = stored[key][1]
            assert torch.equal((tensor.mT if found[key].transposed else tensor)[place], expected[e, row])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_does_not_make_up_the_parameter_is_none_of_it(layout):
    patterns, operations, shape = LAYOUTS[layout]
    converter, stored = WeightConverter(list(patterns), NAME, operations), stored_as(patterns, shape)
    key = next(iter(stored))
    assert not pieces(stored, converter, (E + 1, O, I))
    assert not pieces(stored, converter, (E, O, I + 1))
    assert not pieces(stored, converter, (O, I))
    assert not pieces(
        {k: held for k, held in stored.items() if k != key} or {key: (patterns[0], torch.ones(2))}, converter
    )
    assert not pieces(stored | {key: (stored[key][0], torch.randn(2, 2))}, converter)


def test_conversions_that_are_not_known_are_left_to_transformers():
    converter = WeightConverter(["experts.turned"], NAME, [Transpose(0, 1)])
    assert not pieces({"experts.turned": ("experts.turned", torch.randn(O, E, I))}, converter)
