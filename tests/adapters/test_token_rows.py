"""Rows of single tokens: on models, beside other adapters, and in files."""

import copy

import pytest
import torch

from theodora import (
    AdapterConfig,
    adapter_disabled,
    combine_adapters,
    inject_adapter,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
    save_mlx,
    set_adapter,
    swap_adapter_weights,
    to_lora,
    unmerge_adapter,
)
from theodora.adapters.check import load_weights
from theodora.adapters.state import trained_tensors
from theodora.adapters.token_rows import own_rows
from theodora.errors import CheckpointError, ConfigError

IDS = torch.tensor([[1, 3, 5, 7, 9, 5]])
FAMILIES = {"llama": "embed_tokens", "gemma": "embed_tokens", "gpt2": "wte"}


def adapted(model, indices=(3, 5), name="default", seed=0, **config):
    """The model with an adapter whose tensors are as if they had been trained."""
    inject_adapter(model, AdapterConfig(rank=2, trainable_token_indices=indices, **config), name)
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in trained_tensors(model, name).values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_their_life(tiny_model, tmp_path, family, tied):
    base = logits(tiny_model(family, tied=tied))
    model = tiny_model(family, tied=tied)
    kind = type(model.get_input_embeddings())
    inject_adapter(model, AdapterConfig(rank=2, trainable_token_indices=[3, 5]))
    fresh = logits(inject_adapter(tiny_model(family, tied=tied), AdapterConfig(rank=2)))
    torch.testing.assert_close(logits(model), fresh, atol=1e-6, rtol=0)  # a tied head's own rows are a smaller product
    remove_adapter(model)
    expected = logits(adapted(model))
    assert not torch.allclose(expected, base, atol=1e-2)
    assert trained_tensors(model).keys() > {f"{path}.token_rows" for path in own_rows(model, "default")}
    with adapter_disabled(model):
        assert torch.equal(logits(model), base)
    merge_adapter(model)
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    unmerge_adapter(model)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(tiny_model(family, tied=tied), tmp_path / "adapter")), expected)
    again = adapted(tiny_model(family, tied=tied), seed=1)
    load_weights(again, tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    again = adapted(tiny_model(family, tied=tied), seed=1)
    swap_adapter_weights(again, "default", tmp_path / "adapter")
    torch.testing.assert_close(logits(again), expected, atol=1e-6, rtol=0)
    remove_adapter(model)
    assert type(model.get_input_embeddings()) is kind
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_only_their_rows_are_trained(tiny_model, tied):
    model = inject_adapter(tiny_model(tied=tied), AdapterConfig(trainable_token_indices=[3, 5]))
    asking = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and "adapters" not in name
    ]
    assert asking == ["model.embed_tokens.token_rows.default.rows"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model.get_input_embeddings().weight.clone()
    model(IDS, labels=IDS).loss.backward()
    rows = own_rows(model, "default")["model.embed_tokens"].rows
    start = rows.detach().clone()
    assert (rows.grad.norm(dim=1) > 0).all()
    optimizer.step()
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert (rows != start).all()


def test_two_adapters_have_rows_of_their_own(tiny_model):
    model = adapted(tiny_model(), [3], "one")
    one = logits(model)
    both = adapted(model, {"embed_tokens": [5, 7], "lm_head": [9]}, "two", seed=1)
    two = logits(both)
    assert not torch.equal(one, two)
    assert torch.equal(logits(set_adapter(model, "one")), one)
    assert torch.equal(logits(set_adapter(model, "two")), two)
    remove_adapter(model, "one")
    assert torch.equal(logits(model), two)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"trainable_token_indices": [272]}, "272 rows, and token 272"),
        ({"trainable_token_indices": {"nowhere": [3]}}, "nowhere: no such module"),
        ({"trainable_token_indices": [3], "modules_to_save": ("embed_tokens",)}, "modules_to_save names it"),
        ({"trainable_token_indices": [3], "targets": ("embed_tokens",)}, "targets name it"),
        ({"trainable_token_indices": {"input_layernorm": [3]}}, "no plain embedding or linear layer"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_is_refused(tiny_model, config, message):
    model = tiny_model()
    with pytest.raises(ConfigError, match=message):
        inject_adapter(model, AdapterConfig(**config))
    assert not any("token_rows" in name for name in model.state_dict())


@pytest.mark.parametrize("indices", [[-1], [True], ["x"], {"embed_tokens": []}, {"embed_tokens": 3}, {"": [3]}])
def test_a_configuration_that_makes_no_sense(indices):
    with pytest.raises(ConfigError, match="trainable_token_indices"):
        AdapterConfig(trainable_token_indices=indices)


def test_ids_of_the_command_line_are_numbers():
    assert AdapterConfig(trainable_token_indices=["3", "5"]).trainable_token_indices == (3, 5)


def test_forms_without_a_place_for_them_say_so(tiny_model, tmp_path):
    model = adapted(tiny_model())
    with pytest.raises(ConfigError, match="rows of single tokens"):
        save_mlx(model, tmp_path / "mlx")
    with pytest.raises(ConfigError, match="rows of single tokens"):
        to_lora(model, None, 2, "other")
    with pytest.raises(ConfigError, match="rows of single tokens"):
        combine_adapters(model, ["default"], [1.0], into="sum")


def test_a_file_for_more_tokens_than_the_model_has_says_what_to_do(tiny_model, tmp_path):
    save_adapter(adapted(tiny_model(vocab_size=288), [280]), tmp_path)
    with pytest.raises(CheckpointError, match=r"token 280.*resize_token_embeddings\(281\)"):
        load_adapter(tiny_model(), tmp_path)
