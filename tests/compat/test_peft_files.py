"""PEFT's files both ways, held on logits, for every model family, layer kind and option."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from theodora import AdapterConfig, ConfigError, inject_adapter, load_adapter, save_adapter
from theodora.files.adapter import read_adapter
from theodora.files.names import KEY_PREFIX
from tiny import FAMILIES, tiny_model

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(3))
CLOSE = {"rtol": 0, "atol": 1e-5}

# PEFT warns of what it does by itself: fan_in_fan_out for Conv1D, saving embeddings, tied weights.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def perturb(model, share=0.3):
    """Move every trained tensor away from its start, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += (
                    share
                    * parameter.std().nan_to_num(1).clamp_min(0.1)
                    * torch.randn(parameter.shape, generator=generator)
                )


def names_of(family):
    """A kind of linear layer that the family has."""
    linear = {
        path.rpartition(".")[2]
        for path, module in tiny_model(family).named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and "lm_head" not in path
    }
    return sorted(linear)


def ours_into_peft(family, config, tmp_path, tied=False):
    model = inject_adapter(tiny_model(family, tied=tied), config)
    perturb(model)
    expected = logits(model)
    save_adapter(model, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(tiny_model(family, tied=tied), tmp_path / "a")
    torch.testing.assert_close(logits(theirs), expected, **CLOSE)
    assert not torch.allclose(expected, logits(tiny_model(family, tied=tied)), atol=1e-3)


def peft_into_ours(family, config, tmp_path, tied=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(tiny_model(family, tied=tied), config)
        perturb(theirs)
        expected = logits(theirs)
        theirs.save_pretrained(tmp_path / "p")
    ours = load_adapter(tiny_model(family, tied=tied), tmp_path / "p")
    torch.testing.assert_close(logits(ours), expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("tied", [False, True])
def test_all_linear(family, method, tied, tmp_path):
    ours_into_peft(family, AdapterConfig(method=method, rank=4), tmp_path, tied)
    peft_into_ours(family, LoraConfig(r=4, target_modules="all-linear", use_dora=method == "dora"), tmp_path, tied)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_patterns_and_rslora(family, method, tmp_path):
    one, *others = names_of(family)
    patterns = {
        "rank_pattern": {one: 2, f"1\\..*{others[0]}": 6},
        "alpha_pattern": {others[0]: 12.0},
    }
    ours_into_peft(
        family, AdapterConfig(method=method, rank=4, alpha=7, rslora=True, targets=(one, *others), **patterns), tmp_path
    )
    peft_into_ours(
        family,
        LoraConfig(
            r=4, lora_alpha=7, use_rslora=True, use_dora=method == "dora", target_modules=[one, *others], **patterns
        ),
        tmp_path,
    )


EMBEDDINGS = {"gpt2": "wte", "gpt_neox": "embed_in"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings(family, method, tied, tmp_path):
    embedding = EMBEDDINGS.get(family, "embed_tokens")
    targets = [embedding, names_of(family)[0]]
    ours_into_peft(family, AdapterConfig(method=method, rank=4, targets=tuple(targets)), tmp_path, tied)
    peft_into_ours(family, LoraConfig(r=4, target_modules=targets, use_dora=method == "dora"), tmp_path, tied)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_modules_to_save(family, tied, tmp_path):
    target = names_of(family)[0]
    ours_into_peft(family, AdapterConfig(rank=4, targets=(target,), modules_to_save=("lm_head",)), tmp_path, tied)
    peft_into_ours(
        family, LoraConfig(r=4, target_modules=[target], use_dora=True, modules_to_save=["lm_head"]), tmp_path, tied
    )


@pytest.mark.parametrize("tied", [False, True])
def test_adapted_head(tied, tmp_path):
    ours_into_peft("llama", AdapterConfig(rank=4, targets=("lm_head", "q_proj")), tmp_path, tied)
    peft_into_ours("llama", LoraConfig(r=4, target_modules=["lm_head", "q_proj"], use_dora=True), tmp_path, tied)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "gaussian"])
@pytest.mark.parametrize("rslora", [False, True])
def test_starts_become_plain_files(init, rslora, tmp_path):
    config = AdapterConfig(
        rank=4, alpha=6, init=init, rslora=rslora, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5}
    )
    ours_into_peft("llama", config, tmp_path)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["init_lora_weights"] is True


def test_keys_and_fields(tmp_path):
    model = inject_adapter(tiny_model("llama"), AdapterConfig(rank=3, alpha=5, targets=("q_proj",)))
    save_adapter(model, tmp_path / "a")
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert fields["r"] == 3
    assert fields["lora_alpha"] == 5
    assert fields["use_dora"] is True
    assert fields["target_modules"] == ["q_proj"]
    file = read_adapter(tmp_path / "a")
    assert set(file.modules) == {f"model.layers.{i}.self_attn.q_proj" for i in range(len(model.model.layers))}
    from safetensors import safe_open

    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as f:
        assert f"{KEY_PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector" in f.keys()  # noqa: SIM118


def test_endings_within_a_name(tmp_path):
    """PEFT's modules_to_save=["norm"] also means input_layernorm; ours means the module called norm."""
    peft_into_ours("llama", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]), tmp_path)
    ours_into_peft("llama", AdapterConfig(rank=4, targets=("q_proj",), modules_to_save=("norm",)), tmp_path)
    again = load_adapter(tiny_model("llama"), tmp_path / "p")
    save_adapter(again, tmp_path / "again")
    theirs = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "again")
    torch.testing.assert_close(logits(theirs), logits(again), **CLOSE)


def test_adapters_on_pefts_adapters_are_refused():
    with pytest.raises(ConfigError, match="PEFT's adapters already"):
        inject_adapter(get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj"])))
