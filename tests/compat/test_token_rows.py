"""Trainable tokens: PEFT's files here, ours in PEFT, with PEFT's logits."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from theodora import AdapterConfig, inject_adapter, load_adapter, merge_checkpoint, save_adapter
from theodora.adapters.models import load_model
from theodora.adapters.state import trained_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
IDS = torch.tensor([[1, 3, 5, 7, 9, 3]])
INDICES = {
    "a list": [3, 5],
    "both ends": {"embed_tokens": [3, 5], "lm_head": [5, 7]},
    "the head": {"lm_head": [5]},
    "both alike": {"embed_tokens": [5, 3], "lm_head": [5, 3]},
}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES.keys())
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_pefts_files(tiny_model, tiny_model_dir, tmp_path, family, indices, tied):
    settings = LoraConfig(r=2, target_modules=["q_proj"], use_dora=tied, trainable_token_indices=indices)
    theirs = get_peft_model(tiny_model(family, tied=tied), settings)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(tiny_model(family, tied=tied), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=0)
    save_adapter(ours, tmp_path / "ours")
    back = PeftModel.from_pretrained(tiny_model(family, tied=tied), str(tmp_path / "ours"))
    assert torch.equal(logits(back), expected)
    merge_checkpoint(tmp_path / "theirs", tmp_path / "merged", base_model=tiny_model_dir(family, tied=tied))
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_new_tokens_in_peft(tiny_model, tmp_path, tied):
    ours = tiny_model(tied=tied)
    ours.resize_token_embeddings(274, mean_resizing=False)
    inject_adapter(ours, AdapterConfig(rank=2, targets=("q_proj",)))
    with torch.no_grad():
        for tensor in trained_tensors(ours).values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    save_adapter(ours, tmp_path)
    base = tiny_model(tied=tied)
    base.resize_token_embeddings(274, mean_resizing=False)
    ids = torch.tensor([[1, 272, 5, 273]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(base, str(tmp_path)).eval()
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-5, rtol=0)


def test_a_file_with_the_head_trained_in_full_as_trl_makes_it(tiny_model, tmp_path):
    settings = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [3, 5]}
    )
    theirs = get_peft_model(tiny_model(), settings)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_adapter(tiny_model(), tmp_path)), logits(theirs), atol=1e-5, rtol=0)
