"""`theodora combine`: folders in, a folder out that does what `combine_adapters` does."""

from typing import get_args

import pytest
import torch

from theodora import AdapterConfig, inject_adapter, load_adapter, save_adapter
from theodora.adapters.models import load_model
from theodora.cli import main as cli
from theodora.cli.combine import METHODS
from theodora.cli.export import FORMS
from theodora.cli.merge import ONTO
from theodora.export.exporting import WRITERS
from theodora.merging.combine import CombineMethod
from theodora.merging.onto import Onto

IDS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_model_dir):
    """A DoRA and a LoRA of the same base."""
    folders = []
    for seed, method in enumerate(("dora", "lora")):
        torch.manual_seed(seed)
        model = inject_adapter(load_model(tiny_model_dir(), dtype="fp32"), AdapterConfig(rank=2 + seed, method=method))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        folders.append(tmp_path_factory.mktemp("adapters") / method)
        save_adapter(model, folders[-1])
    return [str(folder) for folder in folders]


def test_words_of_commands_are_those_of_the_library():
    assert get_args(CombineMethod) == METHODS
    assert get_args(Onto) == tuple(ONTO)
    assert tuple(WRITERS) == FORMS


def test_it_is_the_sum_of_what_each_changes(adapters, tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "both"
    assert cli.main(["combine", *adapters, "--weights", "0.75", "-0.5", "--output", str(output)]) == 0
    assert "combined: dora of rank" in capsys.readouterr().out
    path = "model.layers.0.self_attn.q_proj"
    weights = []
    for folder in (None, *adapters, str(output)):
        model = load_model(tiny_model_dir(), dtype="fp32")
        if folder is not None:
            load_adapter(model, folder)
        layer = model.get_submodule(path)
        weights.append(layer(torch.eye(layer.in_features)).detach().double())
    base, first, second, both = weights
    expected = base + 0.75 * (first - base) - 0.5 * (second - base)
    assert (both - expected).norm() < 1e-5 * (expected - base).norm()
    assert (output / "tokenizer.json").is_file()


def test_what_makes_no_sense(adapters, tmp_path, capsys):
    free = str(tmp_path / "free")
    (tmp_path / "taken").mkdir()
    for words, told in (
        ([adapters[0], "--output", free], "two or more"),
        ([*adapters, "--weights", "1", "--output", free], "one for each"),
        ([*adapters, "--output", str(tmp_path / "taken")], "there already"),
        ([*adapters, "--method", "ties", "--density", "2", "--output", free], "density"),
    ):
        assert cli.main(["combine", *words]) != 0
        assert told in capsys.readouterr().err
    assert not (tmp_path / "free").exists()
