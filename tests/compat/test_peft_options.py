"""PEFT's options that change what a file means: biases, starts from the weights, names that wrappers left; read, or a
true reason why not."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from theodora import (
    AdapterConfig,
    CheckpointError,
    ConfigError,
    accelerate,
    combine_adapters,
    inject_adapter,
    load_adapter,
    merge_adapter,
    merge_checkpoint,
    remove_adapter,
    save_adapter,
)
from theodora.adapters.models import load_model
from theodora.adapters.state import trained_tensors
from theodora.files.adapter import read_adapter
from theodora.merging.to_lora import folder_to_lora
from tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(3))
CLOSE = {"rtol": 0, "atol": 2e-5}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def moved(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def peft_file(folder, family="llama", **config):
    theirs = moved(get_peft_model(tiny_model(family), LoraConfig(r=4, **config)))
    theirs.save_pretrained(folder)
    return logits(theirs)


TARGETS = {"qwen2": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "phi": ["q_proj", "fc1"]}


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_trained_biases(family, bias, method, tmp_path):
    expected = peft_file(tmp_path / "p", family, target_modules=TARGETS[family], bias=bias, use_dora=method == "dora")
    ours = load_adapter(tiny_model(family), tmp_path / "p", trainable=True)
    torch.testing.assert_close(logits(ours), expected, **CLOSE)
    torch.testing.assert_close(logits(accelerate(ours)), expected, **CLOSE)
    assert any(path.endswith(".bias") for path in trained_tensors(ours))

    save_adapter(ours, tmp_path / "again")
    theirs = PeftModel.from_pretrained(tiny_model(family), tmp_path / "again")
    torch.testing.assert_close(logits(theirs), expected, **CLOSE)
    torch.testing.assert_close(logits(load_adapter(tiny_model(family), tmp_path / "again")), expected, **CLOSE)

    torch.testing.assert_close(logits(merge_adapter(ours)), expected, **CLOSE)
    assert torch.equal(logits(remove_adapter(ours)), logits(tiny_model(family)))


def test_trained_biases_are_merged_on_disk(tiny_model_dir, tmp_path):
    expected = peft_file(tmp_path / "p", "qwen2", target_modules=TARGETS["qwen2"], bias="all")
    merge_checkpoint(tmp_path / "p", tmp_path / "m", base_model=tiny_model_dir("qwen2"))
    torch.testing.assert_close(logits(load_model(tmp_path / "m")), expected, **CLOSE)


def test_trained_biases_stay_in_combinations_and_plain_loras(tiny_model_dir, tmp_path):
    expected = peft_file(tmp_path / "p", "qwen2", target_modules=TARGETS["qwen2"], bias="all", use_dora=True)
    folder_to_lora(tmp_path / "p", tmp_path / "lora", None, base_model=tiny_model_dir("qwen2"))
    base = tiny_model("qwen2")
    torch.testing.assert_close(logits(load_adapter(base, tmp_path / "lora")), expected, rtol=0, atol=2e-4)
    theirs = PeftModel.from_pretrained(tiny_model("qwen2"), tmp_path / "lora")
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=2e-4)

    combine_adapters(base, ["default"], [1.0], into="one")
    torch.testing.assert_close(logits(base), expected, rtol=0, atol=2e-4)
    save_adapter(base, tmp_path / "one", "one")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny_model("qwen2"), tmp_path / "one")), expected, rtol=0, atol=2e-4
    )


def test_biases_that_an_adapter_adds(tmp_path):
    expected = peft_file(tmp_path / "p", "gpt2", target_modules=TARGETS["gpt2"], lora_bias=True, lora_alpha=3)
    ours = load_adapter(tiny_model("gpt2"), tmp_path / "p")
    torch.testing.assert_close(logits(ours), expected, **CLOSE)
    save_adapter(ours, tmp_path / "plain")
    torch.testing.assert_close(logits(load_adapter(tiny_model("gpt2"), tmp_path / "plain")), expected, **CLOSE)
    with pytest.raises(CheckpointError, match=r"lora_bias(.|\n)*load_adapter"):
        read_adapter(tmp_path / "p")


def test_a_bias_that_has_nothing_to_add_to(tmp_path):
    peft_file(tmp_path / "p", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(CheckpointError, match="none to add to"):
        load_adapter(tiny_model("llama"), tmp_path / "p")


@pytest.mark.parametrize(("init", "family"), [("pissa", "llama"), ("olora", "llama"), ("pissa", "gpt2")])
def test_starts_that_peft_computes_from_the_plain_base(init, family, tmp_path):
    names = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn"]}[family]
    expected = peft_file(
        tmp_path / "p", family, target_modules=names, init_lora_weights=init, rank_pattern={names[0]: 2}
    )
    ours = load_adapter(tiny_model(family), tmp_path / "p")
    torch.testing.assert_close(logits(ours), expected, **CLOSE)
    assert not torch.allclose(expected, logits(tiny_model(family)), atol=1e-2)

    save_adapter(ours, tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / CONFIG).read_text())["init_lora_weights"] is True
    theirs = PeftModel.from_pretrained(tiny_model(family), tmp_path / "plain")
    torch.testing.assert_close(logits(theirs), expected, **CLOSE)
    with pytest.raises(CheckpointError, match="save_adapter makes it plain"):
        read_adapter(tmp_path / "p")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "only PEFT runs it"),
    ],
)
def test_what_cannot_be_read_says_what_to_do(config, said, tmp_path):
    peft_file(tmp_path / "p", target_modules=["q_proj"], **config)
    with pytest.raises(CheckpointError, match=said):
        load_adapter(tiny_model("llama"), tmp_path / "p")


class Odd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.attn = torch.nn.Conv2d(3, 4, 3), torch.nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return x


@pytest.mark.parametrize(("name", "kind"), [("attn", "MultiheadAttention")])
def test_modules_of_other_kinds_are_called_what_they_are(name, kind, tmp_path):
    get_peft_model(Odd(), LoraConfig(target_modules=[name])).save_pretrained(tmp_path / "p")
    with pytest.raises(CheckpointError, match=f"{kind}(.|\n)*merge_and_unload"):
        load_adapter(Odd(), tmp_path / "p")
    with pytest.raises(ConfigError, match=f"{kind}.*modules_to_save"):
        inject_adapter(Odd(), AdapterConfig(targets=(name,)))


def in_layers(key, name):
    return key.replace(".self_attn.", f".{name}.self_attn.").replace(".mlp.", f".{name}.mlp.")


WRAPPED = {
    "compile": lambda key: in_layers(key, "_orig_mod"),
    "compile_whole": lambda key: "_orig_mod." + key,
    "fsdp": lambda key: "_fsdp_wrapped_module." + in_layers(key, "_fsdp_wrapped_module"),
    "checkpointing": lambda key: in_layers(key, "_checkpoint_wrapped_module"),
    "ddp": lambda key: "module." + key,
    "deepspeed_compile": lambda key: "module._orig_mod." + key,
}


@pytest.fixture
def plain(tmp_path):
    config = {
        "target_modules": ["q_proj", "down_proj", "embed_tokens"],
        "use_dora": True,
        "modules_to_save": ["lm_head"],
    }
    return peft_file(tmp_path / "p", **config), tmp_path / "p", config


def rewritten(folder, key_of):
    tensors = load_file(folder / WEIGHTS)
    save_file({key_of(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_names_of_wrappers_are_taken_off(wrapper, plain):
    expected, folder, _ = plain
    rewritten(folder, WRAPPED[wrapper])
    torch.testing.assert_close(logits(load_adapter(tiny_model("llama"), folder)), expected, **CLOSE)


@pytest.mark.parametrize("name", ["default", "mine"])
def test_pefts_own_state_dict_is_read(name, plain):
    """What FSDP's and other savers write, which know nothing of PEFT's files."""
    _, folder, config = plain
    model = moved(get_peft_model(tiny_model("llama"), LoraConfig(r=4, **config), adapter_name=name))
    state = {key: t.clone() for key, t in model.state_dict().items() if "lora_" in key or "modules_to_save" in key}
    save_file(state, folder / WEIGHTS)
    torch.testing.assert_close(logits(load_adapter(tiny_model("llama"), folder)), logits(model), **CLOSE)


def test_several_adapters_or_one_twice_are_refused(plain):
    _, folder, _ = plain
    tensors = load_file(folder / WEIGHTS)
    two = {
        key.replace("lora_A.", f"lora_A.{name}.").replace("lora_B.", f"lora_B.{name}."): t.clone()
        for name in ("one", "two")
        for key, t in tensors.items()
    }
    save_file(two, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"several adapters \('one', 'two'\)"):
        load_adapter(tiny_model("llama"), folder)
    save_file(tensors | {"_orig_mod." + key: t.clone() for key, t in tensors.items()}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="twice"):
        load_adapter(tiny_model("llama"), folder)


def test_what_zero_3_left_empty_says_so(plain):
    _, folder, _ = plain
    save_file({key: torch.empty(0, 4) for key in load_file(folder / WEIGHTS)}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="ZeRO-3"):
        load_adapter(tiny_model("llama"), folder)
