"""Merging onto quantised bases in all shapes that folders and adapters have, held against the formula in float64."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from fuzz.fuzzing import files_under
from quantised import FORMATS, logits_of, save_adapted, save_plain
from theodora.errors import UsageError
from theodora.export import verify
from theodora.files.adapter import read_adapter
from theodora.files.base_model import BaseCheckpoint
from theodora.functional import merged_weight
from theodora.merging import merge_checkpoint

ADAPTERS: dict[str, dict[str, Any]] = {
    "patterns": {
        "method": "dora",
        "rank_pattern": {"down_proj": 2, r"layers\.0\.self_attn\.q_proj": 6},
        "alpha_pattern": {"o_proj": 3.0, r"layers\.1\.mlp\..*": 24.0},
    },
    "rank-stabilised": {"method": "lora", "rslora": True},
    "saved in full": {"method": "dora", "modules_to_save": ["lm_head", "norm"]},
    "head too": {"method": "dora", "targets": ("q_proj", "lm_head")},
    "tokens too": {"method": "dora", "trainable_token_indices": (3, 5)},
    "embeddings too": {"method": "lora", "targets": ("v_proj", "embed_tokens")},
}
EXACT = {"nf4": 2e-7, "int8": 2e-7, "torchao int8": 2e-7}


# Every adapter in every format, and either of these with tied embeddings and without.
SHAPES = [
    pytest.param(adapter, form, (i + j) % 2 == 1, id=f"{adapter}-{form}-{'tied' if (i + j) % 2 else 'untied'}")
    for i, adapter in enumerate(ADAPTERS)
    for j, form in enumerate(EXACT)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A plain model and the same quantised, in several files. Treat them as read-only."""

    @cache
    def make(form: str, tied: bool) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("folders")
        plain = save_plain(folder / "plain", tie_word_embeddings=tied)
        model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=FORMATS[form](), dtype=torch.float32)
        model.save_pretrained(folder / "quantised", max_shard_size="40KB")
        tiny.tiny_tokenizer().save_pretrained(folder / "quantised")
        assert len(list((folder / "quantised").glob("*.safetensors"))) > 2
        return plain, folder / "quantised"

    return make


def worst(merged: Path, base: BaseCheckpoint, adapter: Path) -> float:
    """Largest relative distance of a merged weight from the formula on the base's dequantised one."""
    file, there, found = read_adapter(adapter), BaseCheckpoint(merged, dequantise=True), [0.0]
    for path, tensors in file.modules.items():
        name = f"{path}.weight"
        key = base.key_of(name)
        assert key is not None
        w = base.read(key).double()
        turned = base.is_transposed(name)
        m = None if tensors.magnitude is None else tensors.magnitude.double()
        exact = merged_weight(w.T if turned else w, tensors.a.double(), tensors.b.double(), tensors.scale, m)
        exact = exact.T if turned else exact
        written_key = there.key_of(name)
        assert written_key is not None
        found.append(float((there.read(written_key).double() - exact).norm() / exact.norm()))
    return max(found)


@pytest.mark.parametrize(("adapter", "form", "tied"), SHAPES)
def test_every_shape_of_adapter_is_exact(folders, tmp_path, adapter, form, tied):
    plain, base = folders(form, tied)
    logits = save_adapted(base, tmp_path / "adapter", **ADAPTERS[adapter])
    opened = BaseCheckpoint(base, dequantise=True)
    for onto in ("dequantised", "original", "quantised"):
        output = tmp_path / "merged" / onto
        merge_checkpoint(
            tmp_path / "adapter",
            output,
            base_model=plain if onto == "original" else None,
            onto=onto,
            max_error=1,
            max_loss=10,
            max_shard_size="40KB",
        )
        reference = BaseCheckpoint(plain) if onto == "original" else opened
        assert worst(output, reference, tmp_path / "adapter") < (0.12 if onto == "quantised" else EXACT[form])
        full = read_adapter(tmp_path / "adapter").full
        there = BaseCheckpoint(output, dequantise=True)
        for name, tensor in full.items():
            assert torch.equal(there.read(there.key_of(name)), tensor), name
    got = logits_of(tmp_path / "merged" / "dequantised")
    # (LLM.int8() rounds what goes into its products, too)
    assert (got - logits).norm() < (0.1 if form == "int8" else 2e-5) * logits.norm()
    assert verify(str(tmp_path / "adapter"), str(tmp_path / "merged" / "dequantised")).passed


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_output_is_no_input_and_within_one_leaves_it_as_it_is(folders, tmp_path, tied):
    base = Path(shutil.copytree(folders("nf4", tied)[1], tmp_path / "quantised"))
    save_adapted(base, tmp_path / "adapter")
    before = files_under(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(base)
    for output in (link, base, tmp_path):
        for onto in ("dequantised", "quantised"):
            with pytest.raises(UsageError, match="is, or contains"):
                merge_checkpoint(tmp_path / "adapter", output, onto=onto, overwrite=True)
    link.unlink()
    for output in (base / "merged", tmp_path / "adapter" / "merged"):
        for onto in ("dequantised", "quantised"):
            merge_checkpoint(tmp_path / "adapter", output, onto=onto, overwrite=True, max_loss=2)
            assert logits_of(output).isfinite().all()
        shutil.rmtree(output)
    assert files_under(tmp_path) == before
