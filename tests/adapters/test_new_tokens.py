"""New tokens: a resize before or after injection is trained, saved and loaded again."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from theodora import (
    AdapterConfig,
    inject_adapter,
    load_adapter,
    merge_adapter,
    merge_checkpoint,
    save_adapter,
)
from theodora.adapters.state import trained_tensors
from theodora.adapters.token_rows import own_rows
from theodora.errors import ConfigError

IDS = torch.tensor([[1, 3, 5, 272, 9, 273]])


def trained(model):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_new_tokens_are_trained_and_saved(tiny_model_dir, tmp_path, tied, when):
    folder = tiny_model_dir(tied=tied)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if when == "before":
        model.resize_token_embeddings(274, mean_resizing=False)
    inject_adapter(model, AdapterConfig(rank=2))
    if when == "after":
        model.resize_token_embeddings(274, mean_resizing=False)
    ends = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    rows = own_rows(model, "default")
    assert sorted(rows) == sorted(ends)
    before = {path: own.rows.detach().clone() for path, own in rows.items()}
    expected = trained(model)(IDS).logits.detach()
    assert all((own.rows != before[path]).any(dim=1).all() for path, own in own_rows(model, "default").items())
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        loaded = load_adapter(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
        assert torch.equal(loaded(IDS).logits, expected)
        save_adapter(loaded, tmp_path / "again")
        loaded = load_adapter(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "again")
        assert torch.equal(loaded(IDS).logits, expected)
        merge_checkpoint(tmp_path / "adapter", tmp_path / "merged", base_model=folder)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(IDS).logits, expected, atol=2e-5, rtol=0)


def test_a_model_that_stands_nowhere_tells_by_its_backbone(tiny_model, tmp_path):
    model = tiny_model()
    model.resize_token_embeddings(274, mean_resizing=False)
    expected = trained(inject_adapter(model, AdapterConfig(rank=2)))(IDS).logits.detach()
    with torch.no_grad():
        save_adapter(model, tmp_path)
        assert torch.equal(load_adapter(tiny_model(), tmp_path)(IDS).logits, expected)


def test_rows_that_something_else_trains_are_left_to_it(tiny_model):
    model = tiny_model()
    model.resize_token_embeddings(274, mean_resizing=False)
    inject_adapter(model, AdapterConfig(rank=2, modules_to_save=("embed_tokens", "lm_head")))
    assert not own_rows(model, "default")
    assert "model.embed_tokens.weight" in trained_tensors(model)


def test_rows_that_were_there_stay_when_more_come(tiny_model):
    model = inject_adapter(tiny_model(), AdapterConfig(rank=2, trainable_token_indices=[3]))
    with torch.no_grad():
        own_rows(model, "default")["model.embed_tokens"].rows.fill_(0.5)
    model.resize_token_embeddings(274, mean_resizing=False)
    rows = own_rows(model, "default")["model.embed_tokens"]
    assert rows.ids.tolist() == [3, 272, 273]
    assert (rows.rows[0] == 0.5).all()
    model.resize_token_embeddings(273, mean_resizing=False)
    assert own_rows(model, "default")["model.embed_tokens"].ids.tolist() == [3, 272]


def test_a_resize_under_an_adapter_of_that_size_is_refused(tiny_model):
    model = inject_adapter(tiny_model(), AdapterConfig(rank=2, targets=("embed_tokens", "q_proj")))
    with pytest.raises(ConfigError, match="Resize the embeddings before"):
        model.resize_token_embeddings(274)
    model = merge_adapter(inject_adapter(tiny_model(), AdapterConfig(rank=2)))
    with pytest.raises(ConfigError, match="merged"):
        model.resize_token_embeddings(274)


def test_a_base_that_was_resized_before_loading_is_still_brought_along(tiny_model_dir, tmp_path):
    folder = tiny_model_dir()
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(274, mean_resizing=False)
    expected = trained(inject_adapter(model, AdapterConfig(rank=2)))(IDS).logits.detach()
    save_adapter(model, tmp_path / "first")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(274, mean_resizing=False)
    save_adapter(load_adapter(model, tmp_path / "first"), tmp_path / "second")
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "second")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, expected)
