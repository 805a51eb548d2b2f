"""What a step is made of: whose weights, whose kernels, whose loss."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from theodora.bench import VARIANTS, Workload
from theodora.bench.build import build, compile_blocks, prepare
from theodora.bench.models import decoder_blocks, load_base
from theodora.errors import CheckpointError, ConfigError
from tiny import FAMILIES, VOCAB_SIZE


def workload(model, **changes):
    return Workload(**{"model": str(model), "dtype": "float32", "batch": 2, "length": 8, "rank": 4} | changes)


def bare(family="llama"):
    """A workload of a configuration alone."""
    settings = {
        "model_type": family,
        "vocab_size": VOCAB_SIZE,
        "pad_token_id": 0,
        **FAMILIES.get(family, FAMILIES["llama"]),
    }
    return Workload(model=settings, dtype="float32", batch=2, length=8, rank=4)


def test_a_folders_weights_are_loaded_or_drawn(tiny_model_dir, tiny_model):
    folder, own = tiny_model_dir("qwen2"), tiny_model("qwen2").state_dict()
    loaded = load_base(workload(folder, layers=1)).state_dict()
    assert loaded.keys() < own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.items())
    drawn = load_base(workload(folder, random_weights=True, seed=1))
    assert drawn.config.num_hidden_layers == 2
    assert not torch.equal(drawn.model.embed_tokens.weight, own["model.embed_tokens.weight"])
    assert not any(parameter.requires_grad for parameter in drawn.parameters())


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nobody-knows"}')
    with pytest.raises(CheckpointError, match="has no configuration of a model"):
        load_base(workload(tmp_path))


@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere"])  # Cohere's logits are scaled: its own loss is taken
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_way_to_run_a_step_has_the_same_loss_and_gradients(family, checkpointing, monkeypatch):
    """The fast path, each with its fused loss; Liger's, which needs a GPU, is played by torch's own."""

    class CrossEntropy:
        def __call__(self, weight, hidden, labels, bias):
            return nn.functional.cross_entropy(nn.functional.linear(hidden, weight, bias), labels)

    import liger_kernel.transformers

    monkeypatch.setattr(liger_kernel.transformers, "LigerFusedLinearCrossEntropyLoss", CrossEntropy)
    work = replace(bare(family), gradient_checkpointing=checkpointing)
    plain = VARIANTS["dora"]
    found = []
    for variant in (plain, replace(plain, accelerate=True), replace(plain, liger="loss")):
        step = build(work, variant)[1]()
        loss = step.loss()
        loss.backward()
        found.append((loss.detach(), [p.grad for p in step.trained]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_liger_is_asked_for_its_kernels_but_not_for_its_loss(family, monkeypatch):
    from liger_kernel.transformers import monkey_patch

    asked = []

    def apply(rope=True, cross_entropy=True, fused_linear_cross_entropy=True, model=None):
        asked.append((rope, cross_entropy, fused_linear_cross_entropy, model))

    monkeypatch.setattr(monkey_patch, "MODEL_TYPE_TO_APPLY_LIGER_FN", {"llama": apply})
    work = bare(family)
    model = load_base(work)
    prepare(model, work, replace(VARIANTS["floor"], liger="all"))
    assert asked == ([(True, False, False, model)] if family == "llama" else [])


def test_blocks_are_compiled_one_by_one(monkeypatch):
    model = load_base(bare())
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    compile_blocks(model)
    assert compiled == [(block, {"dynamic": False}) for block in model.model.layers]
    with pytest.raises(ConfigError, match="Linear has no list of decoder blocks"):
        decoder_blocks(nn.Linear(2, 2))
