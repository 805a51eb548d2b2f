"""What PEFT saves of the base beside an adapter (embeddings resized, tied ones trained): loaded as PEFT loads it."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from theodora import (
    AdapterConfig,
    CheckpointError,
    ConfigError,
    inject_adapter,
    load_adapter,
    remove_adapter,
    save_adapter,
    save_mlx,
)
from theodora.adapters import adapter_disabled, merge_adapter
from theodora.adapters.check import check_fit
from theodora.adapters.load import load_report
from theodora.files.adapter import read_adapter
from theodora.merging import merge_checkpoint
from tiny import VOCAB_SIZE, tiny_model

TOKENS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(0))
RESIZED = VOCAB_SIZE + 8, VOCAB_SIZE - 8
KINDS = {
    "plain": {},
    "both in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding in full": {"modules_to_save": ["embed_tokens"]},
    "embedding in full, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "embedding adapted": {"target_modules": ["q_proj", "embed_tokens"]},
}


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.fixture
def saved(tmp_path):
    """An adapter that PEFT has made and, at random, trained; and PEFT's logits, of all tokens there are."""

    def save(kind="plain", *, tied=False, tokens=VOCAB_SIZE):
        model = tiny_model(tied=tied)
        model.save_pretrained(tmp_path / "base")  # PEFT looks there how many tokens it has
        model.name_or_path = str(tmp_path / "base")
        if tokens != VOCAB_SIZE:
            model.resize_token_embeddings(tokens, mean_resizing=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
            warnings.filterwarnings("ignore", message="You have requested `ensure_weight_tying`")
            config = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **KINDS[kind]}
            adapted = get_peft_model(model, LoraConfig(**config))
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            adapted.save_pretrained(tmp_path / "peft")
        return tmp_path / "peft", logits(adapted)

    return save


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [VOCAB_SIZE, *RESIZED])
def test_the_loaded_model_is_pefts(saved, tmp_path, tied, kind, tokens):
    folder, expected = saved(kind, tied=tied, tokens=tokens)
    if kind == "embedding adapted" and tokens != VOCAB_SIZE and not tied:
        # PEFT leaves out the head, whose new rows nobody knows then.
        unchanged_and_refused(tiny_model(), folder, "in the file, .272, 32. in the model")
        return
    base, model = tiny_model(tied=tied), tiny_model(tied=tied)
    load_adapter(model, folder)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert load_report(model).tokens == (tokens if tokens != VOCAB_SIZE else None)
    assert model.config.vocab_size == tokens

    save_adapter(model, tmp_path / "ours")
    again = load_adapter(tiny_model(tied=tied), tmp_path / "ours")
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-5)
    merge_checkpoint(tmp_path / "ours", tmp_path / "streamed", base_model=tmp_path / "base")
    merged = type(model).from_pretrained(tmp_path / "streamed")
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    merge_adapter(again).save_pretrained(tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)

    with adapter_disabled(model):
        shown = min(tokens, VOCAB_SIZE)
        torch.testing.assert_close(logits(model)[..., :shown], logits(base)[..., :shown])
    remove_adapter(model)
    for key, parameter in base.named_parameters():
        found = model.get_parameter(key)
        assert torch.equal(found[: len(parameter)], parameter[: len(found)])


def test_what_was_tied_is_trained_as_one(saved):
    folder, _ = saved("embedding in full, tied", tied=True)
    model = load_adapter(tiny_model(tied=True), folder, trainable=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad


def test_rows_of_new_tokens_are_the_files(saved):
    folder, _ = saved(tokens=RESIZED[0])
    copies = load_file(folder / "adapter_model.safetensors")
    model = remove_adapter(load_adapter(tiny_model(), folder))
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(model.get_parameter(name)[VOCAB_SIZE:], copies[f"base_model.model.{name}"][VOCAB_SIZE:])


def test_resizing_is_said(saved, caplog):
    folder, _ = saved(tokens=RESIZED[0])
    load_adapter(tiny_model(), folder)
    assert [record.levelname for record in caplog.records if "resized to 280 tokens" in record.message] == ["WARNING"]


def test_mlx_has_no_place_for_new_tokens(saved, tmp_path):
    folder, _ = saved(tokens=RESIZED[0])
    with pytest.raises(ConfigError, match="embeddings were resized"):
        save_mlx(load_adapter(tiny_model(), folder), tmp_path / "mlx")


def edit(folder, **tensors):
    file = folder / "adapter_model.safetensors"
    kept = {k: t for k, t in load_file(file).items() if not any(k.endswith(name) for name in tensors)}
    save_file(kept | {f"base_model.model.{k}": t for k, t in tensors.items() if t is not None}, file)


def unchanged_and_refused(model, folder, match):
    before = {key: parameter.shape for key, parameter in model.named_parameters()}
    with pytest.raises(CheckpointError, match=match):
        load_adapter(model, folder, "second")
    assert {key: parameter.shape for key, parameter in model.named_parameters()} == before


def test_what_cannot_be_resized_is_left_alone(saved):
    folder, _ = saved(tokens=RESIZED[0])
    resize = r"\(280, 32\) in the file, \(272, 32\) in the model \(with other numbers of tokens merge it"
    adapted = inject_adapter(tiny_model(), AdapterConfig(rank=2))
    unchanged_and_refused(adapted, folder, resize)
    with pytest.raises(CheckpointError, match=resize):
        check_fit(tiny_model(), read_adapter(folder))  # what a server asks
    half = tiny_model()
    half.lm_head.weight = torch.nn.Parameter(half.lm_head.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    unchanged_and_refused(half, folder, resize)
    unchanged_and_refused(tiny_model(seed=1), folder, resize)  # another model
    edit(folder, **{"lm_head.weight": None})
    unchanged_and_refused(tiny_model(), folder, resize)
    edit(folder, **{"lm_head.weight": torch.zeros(279, 32)})
    unchanged_and_refused(tiny_model(), folder, resize)
    edit(folder, **{"lm_head.weight": torch.zeros(0, 32)})
    unchanged_and_refused(tiny_model(), folder, resize)
    edit(folder, **{"lm_head.weight": torch.zeros(280, 31)})
    unchanged_and_refused(tiny_model(), folder, r"lm_head.weight: \(280, 31\) in the file")


def test_a_changed_copy_under_a_low_rank_update_is_for_merging(saved):
    folder, _ = saved("embedding adapted")
    edit(folder, **{"model.embed_tokens.base_layer.weight": torch.randn(VOCAB_SIZE, 32)})
    unchanged_and_refused(tiny_model(), folder, r"embed_tokens.weight: the file carries a changed .*theodora merge")
