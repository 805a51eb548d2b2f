"""What cannot be adapted is said, all at once, and nothing is changed."""

import pytest
import torch
from torch import nn

from formula import DEVICE
from theodora import AdapterConfig, ConfigError, inject_adapter, load_adapter, save_adapter, set_adapter
from theodora.adapters.state import adapter_layers, trained_tensors
from tiny import FAMILIES, tiny_model


def untouched(model):
    return not adapter_layers(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_linear_layer_but_the_head(family):
    model = tiny_model(family)
    linear = [p for p, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    inject_adapter(model)
    assert [*adapter_layers(model), "lm_head"] == linear


def test_unknown_targets_are_all_listed_with_the_nearest_names():
    model = tiny_model("llama")
    with pytest.raises(ConfigError) as caught:
        inject_adapter(
            model, AdapterConfig(targets=("q_porj", "down"), exclude=("vproj",), modules_to_save=("lmhead",))
        )
    message = str(caught.value)
    for part in ("q_porj", "q_proj", "'down'", "down_proj", "vproj", "v_proj", "lmhead"):
        assert part in message
    assert untouched(model)


def test_expression_without_a_match():
    with pytest.raises(ConfigError, match="matches no module path"):
        inject_adapter(tiny_model("llama"), AdapterConfig(targets=r".*\.qq_proj"))


def test_nothing_left_to_adapt():
    with pytest.raises(ConfigError, match=r"nothing is left to adapt \(targets=\('q_proj',\), left out: q_proj\)"):
        inject_adapter(tiny_model("llama"), AdapterConfig(targets=("q_proj",), exclude=("q_proj",)))


def test_pattern_without_a_match():
    with pytest.raises(ConfigError, match="rank_pattern"):
        inject_adapter(tiny_model("llama"), AdapterConfig(rank_pattern={"c_attn": 2}))


def test_expressions_and_exclusions():
    model = inject_adapter(
        tiny_model("llama"), AdapterConfig(targets=r"model\.layers\.1\..*_proj", exclude=("o_proj", "gate_proj"))
    )
    assert {path.rpartition(".")[2] for path in adapter_layers(model)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "up_proj",
        "down_proj",
    }
    assert all(path.startswith("model.layers.1.") for path in adapter_layers(model))


def test_patterns_set_rank_and_scale():
    model = inject_adapter(
        tiny_model("llama"),
        AdapterConfig(
            rank=4, alpha=4, rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8}, alpha_pattern={"v_proj": 12}
        ),
    )
    found = {
        path: (layer.adapters["default"].rank, layer.adapters["default"].scale)
        for path, layer in adapter_layers(model).items()
    }
    assert found["model.layers.0.self_attn.q_proj"] == (2, 2.0)
    assert found["model.layers.1.mlp.up_proj"] == (8, 0.5)
    assert found["model.layers.0.mlp.up_proj"] == (4, 1.0)
    assert found["model.layers.0.self_attn.v_proj"] == (4, 3.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.5}, "whole number"),
        ({"alpha": -1}, "alpha is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"method": "drora"}, "dora, lora"),
        ({"targets": "("}, "no regular expression"),
        ({"init": "orthogonal", "rank": 3}, "even ranks"),
        ({"rank": 0, "dropout": 2}, "dropout is 2"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] is 0"),
    ],
)
def test_bad_configurations(values, words):
    with pytest.raises(ConfigError) as caught:
        AdapterConfig(**values)
    assert words in str(caught.value)


def test_multihead_attention_is_refused_by_name_and_skipped_otherwise():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 8)})
    with pytest.raises(ConfigError, match=r"out_proj: .*(without calling|bypass)"):
        inject_adapter(model, AdapterConfig(targets=("out_proj",)))
    assert list(adapter_layers(inject_adapter(model, AdapterConfig(rank=2)))) == ["head"]


def test_own_forward_meta_and_quantised_weights_are_refused():
    class Own(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    model = nn.ModuleDict({"own": Own(4, 4), "meta": nn.Linear(4, 4, device="meta"), "int8": nn.Linear(4, 4)})
    model["int8"].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError) as caught:
        inject_adapter(model, AdapterConfig(rank=2, targets=("own", "meta", "int8")))
    assert all(word in str(caught.value) for word in ("forward pass of its own", "not loaded yet", "quantised"))


def test_rank_too_large_for_pissa_changes_nothing():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="needs a rank of at most 16"):
        inject_adapter(model, AdapterConfig(rank=20, init="pissa"))
    assert untouched(model)


def test_names(tmp_path):
    model = inject_adapter(tiny_model("llama"))
    for wrong in ("default", "a.b", "", "a/b"):
        with pytest.raises(ConfigError):
            inject_adapter(model, name=wrong)
    with pytest.raises(ConfigError, match="no adapter 'other'; the model carries default"):
        set_adapter(model, "other")
    with pytest.raises(ConfigError, match="carries no adapter"):
        set_adapter(tiny_model("llama"), "default")
    with pytest.raises(ConfigError, match="already carries"):
        load_adapter(model, tmp_path)


def test_fused_experts_are_named():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts_gate = nn.Parameter(torch.zeros(2, 3, 4))
            self.out = nn.Linear(4, 4)

    with pytest.warns(UserWarning, match="1 weights of fused experts"):
        inject_adapter(Experts(), AdapterConfig(rank=2))


def test_modules_to_save_switch_with_their_adapter():
    ids = torch.arange(3, 9)[None]
    model = tiny_model("llama", tied=True)
    base = model(ids).logits
    inject_adapter(model, AdapterConfig(rank=2, targets=("q_proj",), modules_to_save=("lm_head",)))
    assert "lm_head.weight" in trained_tensors(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    torch.testing.assert_close(model(ids).logits, 2 * base)
    inject_adapter(model, AdapterConfig(rank=2, targets=("q_proj",)), name="plain")
    assert torch.equal(model(ids).logits, base)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(set_adapter(model, "default")(ids).logits, 2 * base)
    assert model.lm_head.weight.requires_grad
    assert not model.model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize(("target", "zero"), [("embed_tokens", "lora_A"), ("q_proj", "lora_B")])
def test_the_factor_that_starts_at_zero_is_pefts(target, zero):
    """An embedding's gradient reaches the rows of a batch only: there it is B that must differ from zero."""
    model = inject_adapter(tiny_model("llama"), AdapterConfig(method="lora", rank=2, targets=(target,)))
    for name, tensor in trained_tensors(model).items():
        assert tensor.any() == (not name.endswith(zero))


@pytest.mark.parametrize("where", [torch.float64, DEVICE], ids=str)
def test_modules_to_save_that_were_not_in_place_follow_the_model(where):
    model = inject_adapter(tiny_model("llama"), AdapterConfig(rank=2, modules_to_save=("lm_head",)))
    embedding = set_adapter(model, None).to(where).model.embed_tokens.weight
    head = set_adapter(model, "default").lm_head.weight
    assert (head.device, head.dtype) == (embedding.device, embedding.dtype)


@pytest.mark.parametrize("name", ["train", "keys", "forward"])
def test_names_that_torch_uses_change_nothing(name):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="cannot name an adapter"):
        inject_adapter(model, name=name)
    assert untouched(model)


def test_weights_read_past_their_module_are_left_out():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("mamba", vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match="dt_proj: MambaMixer reads its weight without calling it"):
        inject_adapter(model, AdapterConfig(rank=2, targets=("dt_proj",)))
    with pytest.warns(UserWarning, match="leaves out"):
        inject_adapter(model, AdapterConfig(rank=2))
    assert "backbone.layers.0.mixer.in_proj" in adapter_layers(model)
    assert "backbone.layers.0.mixer.dt_proj" not in adapter_layers(model)


def test_falcons_own_linear_layer():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "falcon",
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    base = model(torch.arange(3, 9)[None]).logits
    assert len(adapter_layers(inject_adapter(model, AdapterConfig(rank=2)))) == 4
    torch.testing.assert_close(model(torch.arange(3, 9)[None]).logits, base)


def test_another_adapters_own_head_is_not_the_base(tmp_path):
    ids = torch.arange(3, 9)[None]
    model = inject_adapter(tiny_model("llama"), AdapterConfig(rank=2, targets=("lm_head",)), name="head")
    inject_adapter(model, AdapterConfig(rank=2, targets=("q_proj",), modules_to_save=("lm_head",)), name="full")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    save_adapter(model, tmp_path / "a", "head")
    base = tiny_model("llama")(ids).logits
    torch.testing.assert_close(load_adapter(tiny_model("llama"), tmp_path / "a")(ids).logits, base)
    torch.testing.assert_close(load_adapter(model, tmp_path / "a", "again")(ids).logits, base)
    inject_adapter(set_adapter(model, "full"), AdapterConfig(rank=2, targets=("lm_head",)), name="new")
    torch.testing.assert_close(model(ids).logits, base)


def test_nothing_left_to_adapt_is_said():
    with pytest.raises(ConfigError, match=r"nothing is left to adapt \(targets=\('q_proj',\), left out: "):
        inject_adapter(tiny_model(), AdapterConfig(targets=("q_proj",), exclude=("q_proj",)))


def test_expressions_that_cannot_be_used(monkeypatch):
    with pytest.raises(ConfigError, match=r"'\(q_proj' is no regular expression"):
        inject_adapter(tiny_model(), AdapterConfig(rank_pattern={"(q_proj": 4}))

    monkeypatch.setattr("theodora.paths.PATIENCE", 0.2)
    with pytest.raises(ConfigError, match=r"take more than 0.2 s together .* without nested repetitions"):
        inject_adapter(tiny_model(), AdapterConfig(rank_pattern={"(?:.{1,9}){1,30}[!#]": 4}))


def test_an_adapter_that_no_machine_can_hold_is_refused():
    model = tiny_model()
    with pytest.raises(
        ConfigError, match=r"rank 1,000,000,000 on 14 modules takes .* GB; this machine has .*own \(48|32"
    ):
        inject_adapter(model, AdapterConfig(rank=10**9))
    assert not adapter_layers(model)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_layer_is_printed_with_its_adapter(method):
    model = inject_adapter(tiny_model(), AdapterConfig(method=method, rank=4, dropout=0.1))
    name = {"lora": "LoRA", "dora": "DoRA"}[method]
    shown = str(model.model.layers[0].self_attn.q_proj)
    assert f"{name}, rank=4, scale=2" in shown
    assert "Dropout(p=0.1" in shown
