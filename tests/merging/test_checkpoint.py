"""Merging on disk, held against PEFT's adapted logits; what is written, what is refused, and what it costs."""

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, T5Config, T5ForConditionalGeneration

import dying
import tiny
from apart import apart, merging_grows
from dying import died
from theodora.adapters import inject_adapter, save_adapter
from theodora.errors import CheckpointError, ConfigError, UsageError
from theodora.files import base_model as base_checkpoint
from theodora.files import read_back
from theodora.files.atomic import partial_name
from theodora.files.base_model import BaseCheckpoint
from theodora.files.model_folder import StoredTensor
from theodora.functional import merged_weight
from theodora.merging import merge_checkpoint
from theodora.merging.plan import OutputTensor
from theodora.merging.to_lora import folder_to_lora

MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {**tiny._GROUPED, "head_dim": 8},
    "gemma2": {**tiny._GROUPED, "head_dim": 8, "sliding_window": 16},
    "gemma3_text": {**tiny._GROUPED, "head_dim": 8, "sliding_window": 16},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 512,
    },
    # Experts are stored one by one and loaded fused.
    "mixtral": {**tiny._GROUPED, "num_local_experts": 4},
}
TOKENS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _more_families(monkeypatch):
    for family, config in MORE_FAMILIES.items():
        monkeypatch.setitem(tiny.FAMILIES, family, config)


@pytest.fixture
def make(tmp_path):
    """A base on disk, an adapter on disk made and trained (at random) by PEFT, and PEFT's logits."""

    def make(
        family: str = "llama",
        *,
        tied: bool = False,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        tokens: int | None = None,
        **lora: Any,
    ) -> SimpleNamespace:
        model = tiny.tiny_model(family, tied=tied, dtype=dtype)
        model.save_pretrained(tmp_path / "base", max_shard_size=max_shard_size)
        tiny.tiny_tokenizer().save_pretrained(tmp_path / "base")
        model.name_or_path = str(tmp_path / "base")
        if tokens is not None:
            model.resize_token_embeddings(tokens, mean_resizing=False)
        options = {"target_modules": "all-linear", "use_dora": True, **lora}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
            adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.05 * torch.randn_like(parameter))
            adapted.save_pretrained(tmp_path / "adapter")
            logits = adapted.eval()(TOKENS).logits
        return SimpleNamespace(
            base=tmp_path / "base", adapter=tmp_path / "adapter", output=tmp_path / "merged", logits=logits.detach()
        )

    return make


def load_whole(folder: Path) -> Any:
    """Load a model, and see that its files hold all of its tensors and nothing else."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def assert_same_logits(folder: Path, logits: torch.Tensor) -> None:
    with torch.no_grad():
        difference = (load_whole(folder)(TOKENS).logits - logits).abs().max()
    assert difference < 2e-6 * logits.abs().max() + 5e-6


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


ATTENTION_ONLY = {"mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"]}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", [*tiny.FAMILIES, *MORE_FAMILIES])
def test_the_merged_model_is_the_adapted_model(make, family, tied):
    case = make(family, tied=tied, target_modules=ATTENTION_ONLY.get(family, "all-linear"))
    report = merge_checkpoint(case.adapter, case.output)
    assert_same_logits(case.output, case.logits)
    assert report.changed == sum(kind.tensors for kind in report.kinds) > 0
    assert not report.notes


@pytest.mark.parametrize("method", ["lora", "rslora", "patterns"])
def test_lora_in_all_its_scales(make, method):
    options: dict[str, Any] = {
        "lora": {},
        "rslora": {"use_rslora": True},
        "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    }[method]
    case = make(use_dora=False, **options)
    merge_checkpoint(case.adapter, case.output)
    assert_same_logits(case.output, case.logits)


EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte", "gpt_neox": "embed_in"}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", EMBEDDINGS)
@pytest.mark.parametrize("what", ["head", "embedding", "both", "embedding in full", "head in full"])
def test_embeddings_and_heads(make, family, tied, what):
    embedding, head = EMBEDDINGS[family], "lm_head"
    lora: dict[str, Any] = {
        "head": {"target_modules": [head]},
        "embedding": {"target_modules": [embedding]},
        "both": {"target_modules": [embedding, head]},
        "embedding in full": {"modules_to_save": [embedding]},
        "head in full": {"modules_to_save": [head]},
    }[what]
    case = make(family, tied=tied, **lora)
    report = merge_checkpoint(case.adapter, case.output)
    assert_same_logits(case.output, case.logits)
    # What was one tensor and is no longer must be stored twice, and said.
    assert json.loads((case.output / "config.json").read_text())["tie_word_embeddings"] is False
    assert any("tie_word_embeddings" in note for note in report.notes) is tied
    assert report.tensors == len(load_files(case.base)) + tied


def load_files(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def test_embedding_and_head_replaced_by_the_same_values_stay_tied(make):
    case = make(tied=True, modules_to_save=["embed_tokens", "lm_head"])
    weights = load_file(case.adapter / "adapter_model.safetensors")
    head = next(key for key in weights if key.endswith("lm_head.weight"))
    embedding = next(key for key in weights if key.endswith("embed_tokens.weight"))
    save_file(weights | {head: weights[embedding].clone()}, case.adapter / "adapter_model.safetensors")
    report = merge_checkpoint(case.adapter, case.output)
    assert not report.notes
    merged = load_whole(case.output)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.equal(merged.lm_head.weight, weights[embedding])


FULL = [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head"], None]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("full", FULL)
@pytest.mark.parametrize("tokens", [tiny.VOCAB_SIZE + 8, tiny.VOCAB_SIZE - 8])
def test_peft_saves_resized_embeddings_and_what_it_wraps_around_them(make, tied, full, tokens):
    case = make(tied=tied, tokens=tokens, target_modules=["q_proj"], modules_to_save=full)
    keys = load_file(case.adapter / "adapter_model.safetensors")
    assert any("original_module" in key for key in keys) == any("modules_to_save" in key for key in keys) == bool(full)
    report = merge_checkpoint(case.adapter, case.output)
    assert_same_logits(case.output, case.logits)
    assert any(f"embeddings for {tokens} tokens" in note for note in report.notes)
    folder_to_lora(case.adapter, case.output.with_name("lora"), None)
    merge_checkpoint(case.output.with_name("lora"), case.output.with_name("again"))
    assert_same_logits(case.output.with_name("again"), case.logits)


def test_a_second_copy_of_what_was_trained_in_full_has_to_be_the_same(make):
    case = make(tokens=tiny.VOCAB_SIZE + 8, target_modules=["q_proj"], modules_to_save=["lm_head"])
    file, key = case.adapter / "adapter_model.safetensors", "base_model.model.lm_head.modules_to_save.weight"
    tensors = load_file(file)
    for other in (tensors[key] + 1, tensors[key].half(), tensors[key][1:].clone()):
        save_file(tensors | {key: other}, file)
        with pytest.raises(CheckpointError, match=f"{key}: expected the values of base_model.model.lm_head.weight"):
            merge_checkpoint(case.adapter, case.output)


def test_resized_embeddings_bring_their_vocabulary(make):
    case = make(modules_to_save=["embed_tokens", "lm_head"])
    weights = load_file(case.adapter / "adapter_model.safetensors")
    for key in [key for key in weights if key.endswith(("embed_tokens.weight", "lm_head.weight"))]:
        weights[key] = torch.cat([weights[key], torch.randn(16, 32)])
    save_file(weights, case.adapter / "adapter_model.safetensors")
    report = merge_checkpoint(case.adapter, case.output)
    assert load_whole(case.output).config.vocab_size == tiny.VOCAB_SIZE + 16
    assert any("288 tokens" in note for note in report.notes)

    del weights[next(key for key in weights if key.endswith("lm_head.weight"))]
    edit_json(case.adapter / "adapter_config.json", modules_to_save=["embed_tokens"])
    save_file(weights, case.adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"disagree.*288 rows"):
        merge_checkpoint(case.adapter, case.output, overwrite=True)


@pytest.mark.parametrize("head", [False, True], ids=["body", "head"])
def test_gpt2_files_without_the_prefix(make, head):
    case = make("gpt2", tied=True, target_modules=["lm_head"] if head else "all-linear")
    file = case.base / "model.safetensors"
    weights = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}
    # What old GPT-2 files hold besides: the attention mask, which no model of today loads.
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    save_file(weights | {"h.0.attn.bias": mask}, file, metadata={"format": "pt"})
    merge_checkpoint(case.adapter, case.output, dtype="float32")
    merged = load_files(case.output)
    assert merged.keys() == weights.keys() | {"h.0.attn.bias"} | ({"lm_head.weight"} if head else set())
    assert torch.equal(merged["h.0.attn.bias"], mask)
    model = AutoModelForCausalLM.from_pretrained(case.output).eval()
    assert (model(TOKENS).logits - case.logits).abs().max() < 1e-5


def test_old_names_of_the_head(make):
    case = make("gpt_neox", target_modules=["lm_head"])
    assert "embed_out.weight" in load_files(case.base)
    merge_checkpoint(case.adapter, case.output)
    assert load_files(case.output).keys() == load_files(case.base).keys()
    assert_same_logits(case.output, case.logits)


def test_a_class_of_no_causal_model_is_the_one_it_names(tmp_path):
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert type(BaseCheckpoint(tmp_path).model) is T5ForConditionalGeneration


def test_experts_one_by_one_as_older_transformers_had_them(make):
    case = make("mixtral", target_modules=["q_proj"])
    module = "model.layers.1.block_sparse_moe.experts.2.w2"
    a, b, m = torch.randn(4, 48), torch.randn(32, 4), torch.rand(32)
    file = case.adapter / "adapter_model.safetensors"
    parts = {"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": m}
    save_file(load_file(file) | {f"base_model.model.{module}.{part}": t for part, t in parts.items()}, file)
    assert BaseCheckpoint(case.base).key_of(f"{module}.weight") == f"{module}.weight"
    report = merge_checkpoint(case.adapter, case.output, dtype="fp32")
    before, after = load_files(case.base), load_files(case.output)
    assert torch.equal(after.pop(f"{module}.weight"), merged_weight(before[f"{module}.weight"], a, b, 2.0, m))
    assert {kind.kind: kind.tensors for kind in report.kinds} == {"q_proj": 2, "w2": 1}
    assert [key for key in after if not torch.equal(before[key], after[key])] == [k for k in after if "q_proj" in k]
    load_whole(case.output)


def test_a_changed_base_weight_beside_the_adapter_goes_before_the_bases(make):
    case = make(target_modules=["embed_tokens", "q_proj"], use_dora=False)
    file, name = case.adapter / "adapter_model.safetensors", "model.embed_tokens"
    tensors, copy = load_file(file), torch.randn(tiny.VOCAB_SIZE, 32)
    save_file(tensors | {f"base_model.model.{name}.base_layer.weight": copy}, file)
    merge_checkpoint(case.adapter, case.output)
    a, b = (tensors[f"base_model.model.{name}.lora_embedding_{part}"] for part in "AB")
    assert torch.equal(load_files(case.output)[f"{name}.weight"], merged_weight(copy.T, a, b, 2.0).T)
    folder_to_lora(case.adapter, case.output.with_name("lora"), None)
    merge_checkpoint(case.output.with_name("lora"), case.output.with_name("again"))
    torch.testing.assert_close(*(load_files(case.output.with_name(n))[f"{name}.weight"] for n in ("again", "merged")))


@pytest.mark.parametrize(("dtype", "size"), [("F8_E4M3", 3), ("BOOL", 3), ("BF16", 6), ("I64", 24)])
def test_sizes_of_tensors_that_stay_as_they_are(dtype, size):
    stored = StoredTensor("ids", Path("model.safetensors"), (3,), dtype)
    assert OutputTensor("ids", stored, None, None, False, None).nbytes() == size


def test_many_shards_in_many_shards_out(make):
    case = make(max_shard_size="20KB")
    report = merge_checkpoint(case.adapter, case.output, max_shard_size="30KB")
    index = json.loads((case.output / "model.safetensors.index.json").read_text())
    assert len(list(case.base.glob("*.safetensors"))) > report.files > 1
    for key, name in index["weight_map"].items():
        with safe_open(case.output / name, framework="pt") as file:
            assert key in file.keys()  # noqa: SIM118
    assert index["metadata"]["total_size"] == report.bytes == sum(t.nbytes for t in load_files(case.output).values())
    assert max(file.stat().st_size for file in case.output.glob("*.safetensors")) < 35_000
    assert_same_logits(case.output, case.logits)


@pytest.mark.parametrize(("asked", "dtype"), [("bf16", torch.bfloat16), (torch.float16, torch.float16)])
def test_rounding_is_to_the_nearest_and_reported(make, asked, dtype):
    case = make()
    exact = merge_checkpoint(case.adapter, case.output.with_name("exact"))
    report = merge_checkpoint(case.adapter, case.output, dtype=asked)
    wide, narrow = load_files(exact.output), load_files(case.output)
    assert all(torch.equal(narrow[key], wide[key].to(dtype)) for key in wide)
    assert all(kind.rounding_max == kind.rounding_max_abs == 0 for kind in exact.kinds)

    kind = next(kind for kind in report.kinds if kind.kind == "q_proj")
    keys = [key for key in wide if "q_proj" in key]
    errors = [float((narrow[key].float() - wide[key]).norm() / wide[key].norm()) for key in keys]
    assert kind.tensors == len(keys) == 2
    assert kind.rounding_mean == pytest.approx(sum(errors) / 2, rel=1e-4)
    assert kind.rounding_max == pytest.approx(max(errors), rel=1e-4)
    assert kind.rounding_max_abs == max(float((narrow[key].float() - wide[key]).abs().max()) for key in keys)
    base = load_files(case.base)
    changes = [float((wide[key] - base[key]).norm() / base[key].norm()) for key in keys]
    assert kind.change == pytest.approx(sum(changes) / 2, rel=1e-4)
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert json.loads((case.output / "config.json").read_text())["dtype"] == report.dtype
    assert load_whole(case.output).dtype == dtype


def test_a_base_keeps_its_dtype_unless_asked(make):
    case = make(dtype=torch.bfloat16)
    report = merge_checkpoint(case.adapter, case.output)
    assert {tensor.dtype for tensor in load_files(case.output).values()} == {torch.bfloat16}
    assert report.dtype == "bfloat16"


def test_a_float64_base_is_merged_in_float64(make):
    case = make(dtype=torch.float64)
    merge_checkpoint(case.adapter, case.output)
    assert {tensor.dtype for tensor in load_files(case.output).values()} == {torch.float64}


def test_values_beyond_float16_are_refused(make):
    case = make(use_dora=False)
    weights = load_file(case.base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, case.base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.*float16.*bf16"):
        merge_checkpoint(case.adapter, case.output, dtype="fp16")
    assert not case.output.exists()


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_base_of_no_numbers_is_refused(make, name):
    case = make()
    weights = load_file(case.base / "model.safetensors")
    weights[name].flatten()[-1] = torch.nan
    save_file(weights, case.base / "model.safetensors", metadata={"format": "pt"})
    for dtype in (None, "bf16"):
        assert f"{name}: the base model's own weight holds NaN" in refused(case, dtype=dtype)


def test_a_base_in_float16_that_the_adapter_takes_beyond_it_is_refused(make):
    case = make(dtype=torch.float16, use_dora=False)
    file = case.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {name: torch.full_like(tensors[name], 1e6)}, file, {"format": "pt"})
    assert "beyond the range of float16" in refused(case)
    save_file({key: torch.full_like(tensor, 3e30) for key, tensor in tensors.items()}, file, {"format": "pt"})
    assert "the base's own does not: the adapter overflows" in refused(case)


def test_a_buffer_that_is_infinite_by_intent_is_copied(make):
    case = make()
    path = case.base / "model.safetensors"
    mask = torch.tensor([0.0, -torch.inf])
    save_file(load_file(path) | {"model.mask": mask}, path, {"format": "pt"})
    merge_checkpoint(case.adapter, case.output)
    assert torch.equal(load_file(case.output / "model.safetensors")["model.mask"], mask)
    save_file(load_file(path) | {"model.mask": mask * 0}, path, {"format": "pt"})
    shutil.rmtree(case.output)
    assert "model.mask: the base model's own weight" in refused(case)


def test_a_base_trained_further_is_noted(make):
    case = make()
    save_adapter(inject_adapter(tiny.tiny_model()), case.adapter)
    weights = load_file(case.base / "model.safetensors")
    save_file({k: t * 1.1 for k, t in weights.items()}, case.base / "model.safetensors", metadata={"format": "pt"})
    (note,) = merge_checkpoint(case.adapter, case.output, base_model=case.base).notes
    assert "10.0% away from those the adapter was trained on" in note


def test_what_lies_beside_the_weights(make):
    case = make()
    (case.base / "LICENSE").write_text("Apache-2.0")
    (case.base / "notes.json").write_text("{}")
    (case.base / "README.md").write_text("the base's own card")
    merge_checkpoint(case.adapter, case.output)
    names = {path.name for path in case.output.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md", "LICENSE"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "theodora_files.json"),
    }
    tokenizer = AutoTokenizer.from_pretrained(case.output)
    assert tokenizer.chat_template == tiny.CHATML
    card = (case.output / "README.md").read_text()
    assert "DoRA adapter (rank 4, alpha 8)" in card
    assert "q_proj" in card
    assert str(case.base.parent) not in card


def test_the_adapters_own_tokenizer_goes_before_the_bases(make):
    case = make()
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(case.adapter)
    merge_checkpoint(case.adapter, case.output)
    assert AutoTokenizer.from_pretrained(case.output).chat_template == "{{ messages[0]['content'] }}"
    assert not any("adapter" in path.name for path in case.output.iterdir())


def test_progress_counts_the_bytes(make):
    case = make()
    seen: list[tuple[int, int, str]] = []
    report = merge_checkpoint(case.adapter, case.output, progress=lambda *step: seen.append(step))
    told = json.loads(json.dumps(report.to_dict()))
    assert (told["output"], told["adapter"], told["bytes"]) == (str(case.output), str(case.adapter), report.bytes)
    assert [key for _, _, key in seen] == list(load_files(case.output))
    assert seen[-1][:2] == (report.bytes, report.bytes)


def test_an_interrupted_merge_leaves_nothing(make):
    case = make()

    def interrupt(done: int, total: int, key: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(case.adapter, case.output, progress=interrupt)
    assert sorted(path.name for path in case.output.parent.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors | {next(iter(tensors)): next(iter(tensors.values())) * 2}, "other values in"),
        (lambda tensors: {key: t.bfloat16() for key, t in tensors.items()}, "other values in"),
        (lambda tensors: {key: t[:-1] for key, t in tensors.items()}, "other values in"),
        (lambda tensors: dict(list(tensors.items())[1:]), "it holds other tensors"),
    ],
    ids=["values", "dtype", "shape", "names"],
)
def test_what_a_disk_gives_back_otherwise_is_refused(make, damage, message, monkeypatch):
    case, write = make(max_shard_size="20KB"), read_back.save_file
    monkeypatch.setattr(read_back, "save_file", lambda tensors, *others: write(damage(tensors), *others))
    said = refused(case, max_shard_size="20KB")
    assert "does not read back as it was written" in said
    assert message in said


# Bad input: told before anything is written.


def refused(case: SimpleNamespace, error: type[Exception] = CheckpointError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        merge_checkpoint(case.adapter, case.output, **options)
    assert not case.output.exists()
    assert not list(case.output.parent.glob(partial_name(case.output) + "*"))
    return str(caught.value)


def test_another_base_model_is_refused_with_every_miss(make, tmp_path):
    case = make()
    tiny.tiny_model(hidden_size=48).save_pretrained(tmp_path / "wide")
    message = refused(case, base_model=tmp_path / "wide")
    assert message.count("q_proj") == 2
    assert "(32, 32) in the adapter, (48, 48) in the base" in message
    tiny.tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "short")
    message = refused(case, base_model=tmp_path / "short")
    assert message.count("layers.1.") == 7
    assert "--base-model" in message


def test_parameters_without_a_place_are_refused_with_the_mend(make):
    case = make("mixtral", target_modules=["q_proj"])
    file, fused = case.adapter / "adapter_model.safetensors", "model.layers.0.mlp.experts.down_proj"
    others = {fused: torch.randn(4, 32, 48), "model.normal.weight": torch.randn(32)}
    others["model.hed.base_layer.weight"] = torch.randn(8, 32)
    save_file(load_file(file) | {f"base_model.model.{name}": tensor for name, tensor in others.items()}, file)
    edit_json(case.adapter / "adapter_config.json", modules_to_save=["experts", "normal"])
    message = refused(case)
    assert f"{fused}: stored in other pieces (" in message
    assert "model.normal.weight: no such parameter in the base (the nearest is model.norm.weight)" in message
    assert "model.hed.weight: no such parameter in the base" in message


def test_names_that_a_rule_of_renaming_would_take_away(make):
    model = tiny.tiny_model()
    model.model.LayerNorm = torch.nn.ParameterDict({"gamma": torch.nn.Parameter(torch.ones(32))})
    stored = {name: StoredTensor(name, Path(), tuple(t.shape), "F32") for name, t in model.state_dict().items()}
    _, keys, _, _ = base_checkpoint._map_names(model, stored)
    assert keys == {name: name for name in model.state_dict()}


def test_a_quantised_base_is_refused_with_the_mend(make):
    case = make()
    edit_json(case.base / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    message = refused(case)
    assert "bitsandbytes" in message
    assert "--base-model" in message


def test_a_pickled_base_is_refused_with_the_mend(make):
    case = make()
    (case.base / "model.safetensors").rename(case.base / "pytorch_model.bin")
    assert "save_pretrained" in refused(case)


def test_a_base_with_missing_and_damaged_files(make):
    case = make(max_shard_size="40KB")
    first, second, *_ = sorted(case.base.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-100])
    message = refused(case)
    assert f"{first.name} is missing" in message
    assert f"{second.name} is damaged" in message


def test_a_base_that_is_not_at_hand(make):
    case = make()
    shutil.move(case.base, case.base.with_name("elsewhere"))
    assert "--base-model" in refused(case)
    edit_json(case.adapter / "adapter_config.json", base_model_name_or_path="nobody/nothing-of-that-name")
    assert "nobody/nothing-of-that-name" in refused(case)
    edit_json(case.adapter / "adapter_config.json", base_model_name_or_path=None)
    assert "--base-model" in refused(case)
    assert "is an adapter, not a model" in refused(case, base_model=case.adapter)


def test_nonsense_is_refused(make):
    case = make()
    assert "fp32" in refused(case, ConfigError, dtype="int8")
    assert "5GB" in refused(case, ConfigError, max_shard_size="a lot")


def test_no_space_is_told_before_the_work(make, monkeypatch):
    case = make()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "GB free" in refused(case)


def test_the_output_never_costs_the_inputs(make, tmp_path):
    case = make()
    for place, what in [(case.base, "base"), (case.adapter, "adapter"), (tmp_path, "contains")]:
        with pytest.raises(UsageError, match=what):
            merge_checkpoint(case.adapter, place, overwrite=True)
    assert (case.base / "model.safetensors").is_file()

    case.output.mkdir()
    (case.output / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError):
            merge_checkpoint(case.adapter, case.output, overwrite=overwrite)
    assert (case.output / "thesis.tex").exists()
    (case.output / "config.json").write_text("{}")  # a model's, but no merge's
    with pytest.raises(UsageError, match=r"no earlier merge \(it has no theodora_files\.json"):
        merge_checkpoint(case.adapter, case.output, overwrite=True)
    assert (case.output / "thesis.tex").exists()


def test_overwriting_replaces_an_earlier_merge(make):
    case = make()
    merge_checkpoint(case.adapter, case.output, max_shard_size="30KB")
    with pytest.raises(UsageError, match="--overwrite"):
        merge_checkpoint(case.adapter, case.output)
    merge_checkpoint(case.adapter, case.output, overwrite=True)
    assert len(list(case.output.glob("*.safetensors"))) == 1
    (case.output / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"no earlier merge \(it also holds 'thesis\.tex'\)"):
        merge_checkpoint(case.adapter, case.output, overwrite=True)


# Size: a model of 8 × 16 MB, merged in a process of its own.

HIDDEN, INNER, LAYERS = 512, 2048, 8
SHARD = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Eight decoder layers of 16 MB, each in a file of its own, and a DoRA adapter on two kinds of their layers."""
    folder = tmp_path_factory.mktemp("large")
    base, adapter = folder / "base", folder / "adapter"
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, vocab_size=64, tie_word_embeddings=True
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    weight_map: dict[str, str] = {}
    for layer in [*(f"layers.{i}." for i in range(LAYERS)), ""]:
        names = [name for name in shapes if (layer and layer in name) or not (layer or "layers" in name)]
        file = f"model-{layer.rstrip('.') or 'rest'}.safetensors"
        save_file({name: torch.rand(shapes[name]) - 0.5 for name in names}, base / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    adapter.mkdir()
    tensors = {}
    for name in shapes:
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            key, (out, inner) = "base_model.model." + name.removesuffix(".weight"), shapes[name]
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, inner)
            tensors[f"{key}.lora_B.weight"] = 0.01 * torch.randn(out, 4)
            tensors[f"{key}.lora_magnitude_vector"] = torch.rand(out) + 1
    save_file(tensors, adapter / "adapter_model.safetensors")
    lora = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps({**lora, "base_model_name_or_path": str(base)}))
    yield SimpleNamespace(base=base, adapter=adapter, folder=folder)
    shutil.rmtree(folder)


def test_memory_is_bounded_by_a_shard_and_a_layer(large, make):
    case = make()
    grown = apart(merging_grows, (case.adapter, case.output), (large.adapter, large.folder / "merged"), 17_500_000)
    # One output shard, one input file mapped into memory, and a few float32 copies of the largest layer (4 MB).
    assert grown < 2 * SHARD + 8 * 4 * HIDDEN * INNER < LAYERS * SHARD / 1.9
    shutil.rmtree(large.folder / "merged")


def test_a_killed_merge_leaves_nothing_under_the_final_name(large):
    output = large.folder / "killed"
    assert died(dying.merge, large.adapter, output, 30)  # well into the second output file
    assert not output.exists()
    leftovers = list(large.folder.glob(partial_name(output) + "*"))
    assert leftovers  # so it was in the midst of writing
    for leftover in leftovers:
        shutil.rmtree(leftover)
