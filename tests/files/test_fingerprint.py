"""The fingerprint of a base model: adapters on disk carry it, so it must stay the same numbers."""

import math
from pathlib import Path

import pytest
import torch

from theodora import AdapterConfig, CheckpointError
from theodora.files.adapter import AdapterFile
from theodora.files.fingerprint import base_fingerprint, check_fingerprint, weight_fingerprint


def trained_on(fingerprint, base="some/base"):
    return AdapterFile(Path("adapter"), AdapterConfig(), base, {}, fingerprint=fingerprint)


def test_sixteen_values_of_a_weight():
    rows, columns = 40, 300
    weight = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    assert weight_fingerprint(weight) == [i * 7919 % rows * columns + i * 104729 % columns for i in range(16)]


@pytest.mark.parametrize(
    ("count", "chosen"), [(0, []), (1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (7, [0, 2, 4, 6]), (24, [0, 7, 15, 23])]
)
def test_four_weights_from_all_over_a_model(count, chosen):
    paths = [f"{i:02}" for i in range(count)]
    assert base_fingerprint(paths, lambda path: [float(path)]) == {paths[i]: [float(i)] for i in chosen}


def test_the_distance_is_relative_and_over_all_weights():
    file = trained_on({"a": [3.0, 0.0], "b": [0.0, 4.0]})
    assert check_fingerprint(file, {"a": [3.0, 0.0], "b": [0.0, 4.0]}.get) == 0
    assert check_fingerprint(file, {"a": [3.0, 0.3], "b": [0.4, 4.0]}.get) == pytest.approx(0.1)
    assert check_fingerprint(file, {"a": [3.0, 1.5], "b": [2.0, 4.0]}.get) == pytest.approx(0.5)
    with pytest.raises(CheckpointError, match=r"another base model \(some/base\): the weights here are 52% away"):
        check_fingerprint(file, {"a": [3.0, 1.5], "b": [2.1, 4.0]}.get)


def test_a_weight_of_zeros():
    file = trained_on({"a": [0.0, 0.0]}, base=None)
    assert check_fingerprint(file, {"a": [0.0, 0.0]}.get) == 0
    with pytest.raises(CheckpointError, match=r"another base model: the weights here"):
        check_fingerprint(file, {"a": [0.0, 1e-9]}.get)
    assert check_fingerprint(trained_on(None), lambda path: [math.nan]) == 0


@pytest.mark.parametrize(("base", "named"), [("some/base", r" \(some/base\)"), (None, "")])
def test_a_weight_of_another_shape_or_none(base, named):
    for here in ([1.0], None):
        with pytest.raises(
            CheckpointError, match=f"adapter was trained on another base model: b has another shape there{named}\\.$"
        ):
            check_fingerprint(trained_on({"a": [1.0], "b": [1.0, 2.0]}, base), {"a": [1.0], "b": here}.get)
