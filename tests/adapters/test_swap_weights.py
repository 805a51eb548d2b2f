"""Another adapter's weights in a running model: exact, in place, all or nothing."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from theodora import (
    AdapterConfig,
    CheckpointError,
    ConfigError,
    inject_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
    swap_adapter_weights,
)
from theodora.adapters.load import load_report
from theodora.adapters.state import adapter_layers, trained_tensors
from tiny import tiny_model

IDS = torch.arange(3, 27).view(2, 12)
FOUR = ("q_proj", "v_proj")


def moved(seed, family="llama", dtype=torch.float32, **config):
    model = inject_adapter(tiny_model(family, dtype=dtype), AdapterConfig(**{"rank": 4, "targets": FOUR} | config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained_tensors(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model.eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture
def saved(tmp_path):
    def save(seed=7, **config):
        model = moved(seed, **config)
        save_adapter(model, tmp_path / "other")
        return tmp_path / "other", logits(model)

    return save


@pytest.mark.parametrize(
    "theirs",
    [
        {},
        {"rank": 2},
        {"rank": 2, "rslora": True, "alpha": 3},
        {"method": "lora", "rank": 3},
        {"init": "pissa", "rank": 2},
        {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"v_proj": 5}},
    ],
)
@pytest.mark.parametrize("mine", [{}, {"init": "olora"}])
def test_the_other_adapter_in_the_same_memory(saved, theirs, mine):
    folder, expected = saved(**theirs)
    model = moved(1, **mine)
    before = {name: tensor.data_ptr() for name, tensor in trained_tensors(model).items()}
    logits(model), logits(model, IDS[:, :1])  # fills what is kept
    report = swap_adapter_weights(model, "default", folder)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-6 * expected.abs().max())
    assert {name: tensor.data_ptr() for name, tensor in trained_tensors(model).items()} == before
    assert load_report(model) is report
    one = logits(model, IDS[:, :1])
    exact = logits(load_adapter(tiny_model(), folder).eval(), IDS[:, :1])
    torch.testing.assert_close(one, exact, rtol=0, atol=1e-5)
    save_adapter(model, folder.parent / "again")
    again = load_adapter(tiny_model(), folder.parent / "again").eval()
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=2e-6 * expected.abs().max())


@pytest.mark.parametrize("prefix", [True, False])
def test_tensors_instead_of_a_folder(saved, prefix):
    folder, expected = saved()
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = tensors if prefix else {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    tensors = {key: torch.nn.Parameter(value) for key, value in tensors.items()}  # as another model has them
    model = moved(1)
    swap_adapter_weights(model, "default", tensors)
    assert torch.equal(logits(model), expected)


def test_tensors_with_a_scale_of_their_own(saved):
    folder, expected = saved(rank=2, alpha=9)
    model = moved(1)
    config = AdapterConfig(rank=2, alpha=9)
    swap_adapter_weights(model, "default", load_file(folder / "adapter_model.safetensors"), config=config)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_float32_factors_stay_so_on_a_base_of_fewer_bits(saved):
    folder, _ = saved(rank=3, alpha=7, method="lora")
    theirs = load_file(folder / "adapter_model.safetensors")
    model = moved(1, method="lora", dtype=torch.bfloat16)
    report = swap_adapter_weights(model, "default", folder)
    for path, layer in adapter_layers(model).items():
        adapter, key = layer.adapters["default"], f"base_model.model.{path}.lora_{{}}.weight"
        assert torch.equal(adapter.lora_A[:3], theirs[key.format("A")])
        torch.testing.assert_close(
            adapter.scale * adapter.lora_B[:, :3], 7 / 3 * theirs[key.format("B")], rtol=1e-6, atol=0
        )
    assert 0 < report.base_distance < 0.01  # bfloat16's rounding


def test_fewer_modules_only_if_asked(saved):
    folder, expected = saved(targets=("q_proj",))
    model = moved(1)
    before = logits(model)
    with pytest.raises(CheckpointError, match="v_proj: in this adapter, not in the other"):
        swap_adapter_weights(model, "default", folder)
    assert torch.equal(logits(model), before)
    swap_adapter_weights(model, "default", folder, fewer_modules=True)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "mine", "words"),
    [
        ({"rank": 5}, {}, ["rank 5", "room for 4", "q_proj", "v_proj"]),
        ({}, {"method": "lora"}, ["has magnitudes", "plain LoRA"]),
        ({"targets": ("q_proj", "k_proj")}, {}, ["k_proj: in the other", "v_proj: in this"]),
        ({"modules_to_save": ("lm_head",)}, {}, ["lm_head.weight: trained in full in the other"]),
        ({}, {"modules_to_save": ("lm_head",)}, ["lm_head.weight: trained in full in this"]),
    ],
)
def test_what_does_not_fit_changes_nothing(saved, theirs, mine, words):
    folder, _ = saved(**theirs)
    model = moved(1, **mine)
    before = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
    with pytest.raises(CheckpointError) as caught:
        swap_adapter_weights(model, "default", folder)
    assert all(word in str(caught.value) for word in words)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained_tensors(model).items())


@pytest.mark.parametrize("lost", ["magnitude", "lora_B", "layers.1"])
def test_lost_tensors_are_errors(saved, lost):
    tensors = load_file(saved()[0] / "adapter_model.safetensors")
    model = moved(1)
    before = logits(model)
    with pytest.raises(CheckpointError):
        swap_adapter_weights(model, "default", {key: t for key, t in tensors.items() if lost not in key})
    tensors[next(iter(tensors))].fill_(float("nan"))
    with pytest.raises(CheckpointError, match="NaN"):
        swap_adapter_weights(model, "default", tensors)
    assert torch.equal(logits(model), before)


def test_merged_and_unknown_are_refused(saved):
    folder, _ = saved()
    model = moved(1)
    with pytest.raises(ConfigError, match="There is no adapter"):
        swap_adapter_weights(model, "other", folder)
    merge_adapter(model)
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        swap_adapter_weights(model, "default", folder)


def test_of_several_and_those_trained_in_full(saved):
    config = {"modules_to_save": ("lm_head",)}
    folder, expected = saved(**config)
    model = moved(1, **config)
    first = logits(model)
    inject_adapter(model, AdapterConfig(rank=2), name="second")
    swap_adapter_weights(model, "default", folder)
    set_adapter(model, "default")
    assert torch.equal(logits(model.eval()), expected)
    assert not torch.equal(first, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("tokens", [1, 12])
def test_a_compiled_model_is_not_compiled_again(saved, tokens):
    folder, _ = saved(rank=3)
    model = moved(1)
    ids = IDS[:, :tokens]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    logits(model)  # a prompt, whose norms the steps after it read
    first = logits(compiled, ids)
    logits(compiled, ids)
    with torch.compiler.set_stance("fail_on_recompile"):
        swap_adapter_weights(compiled, "default", folder)
        found = logits(compiled, ids)
    expected = logits(load_adapter(tiny_model(), folder).eval(), ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(first, expected, atol=1e-2)


def norm_now(layer):
    """As a step of one token reads it."""
    with torch.no_grad():
        return layer.norm(layer.active, one_token=True)


def test_what_is_kept_stays_where_it_lies(saved):
    folder, _ = saved()
    model = moved(1)
    logits(model)
    layers = adapter_layers(model)
    norms = {path: norm_now(layer) for path, layer in layers.items()}
    swap_adapter_weights(model, "default", folder)
    for path, layer in layers.items():
        assert norm_now(layer) is norms[path]
        fresh = copy.deepcopy(layer)
        with torch.no_grad():
            torch.testing.assert_close(norm_now(layer), fresh.norm(fresh.active), rtol=1e-6, atol=0)
