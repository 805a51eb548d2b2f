"""`train/tried`: a model is tried out once, and again when anything about it is another."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.trainer_callback import CallbackHandler

from formula import DEVICE
from theodora.adapters import conditions as conditions_module
from theodora.adapters import inject_adapter
from theodora.adapters.conditions import hash_of_weights
from theodora.config import AdapterConfig
from theodora.train.text_only import check_continues_text, without_gradient
from theodora.train.tried import is_true, know, tried


@pytest.fixture
def asked(monkeypatch, tmp_path, tiny_model):
    """`asked(change, answer)`: the answer of a new model, known, then changed; `asked.count` times it was tried out."""
    monkeypatch.setenv("THEODORA_CACHE", str(tmp_path))

    def asked(change=lambda model: None, answer=True, **of_model):
        model = tiny_model(**of_model)
        know(model, hash_of_weights(model))
        change(model)

        def find():
            asked.count += 1
            return answer

        return tried("question", model, find, is_true)

    asked.count = 0
    return asked


def test_the_same_model_is_tried_out_once(asked):
    assert [asked(), asked(), asked()] == [True] * 3
    assert asked.count == 1


def test_a_bad_answer_is_never_kept(asked):
    assert [asked(answer=False), asked(answer=False), asked()] == [False, False, True]


def _add_hook(model):
    model.lm_head.register_forward_hook(lambda *_: None)


def _own_code(model):
    model.lm_head.__class__ = type("Mine", (nn.Linear,), {"__module__": "mine"})


@pytest.mark.parametrize(
    ("change", "of_model"),
    [
        (lambda model: None, {"seed": 1}),
        (lambda model: None, {"rms_norm_eps": 1e-3}),
        (lambda model: None, {"dtype": torch.bfloat16}),
        (inject_adapter, {}),
        (lambda model: setattr(model.model.layers[0].self_attn, "is_causal", False), {}),
        (lambda model: model.model.rotary_emb.inv_freq.mul_(2), {}),
        (_add_hook, {}),
        (_own_code, {}),
        (lambda model: model.set_attn_implementation("eager"), {}),
    ],
)
def test_another_model_is_tried_out_itself(asked, change, of_model):
    asked()
    asked(change, **of_model)
    assert asked.count == 2


@pytest.mark.parametrize("other", [{"alpha": 1e-30}, {"init": "pissa"}, {"dropout": 0.5}], ids=str)
def test_another_adapter_is_tried_out_itself(asked, other):
    for settings in ({}, other):
        asked(lambda model, settings=settings: inject_adapter(model, AdapterConfig(rank=2, **settings)))
    assert asked.count == 2


def test_a_model_whose_class_was_changed_is_tried_out_itself(asked, monkeypatch):
    asked()
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *_, **__: None)
    asked()
    assert asked.count == 2


def test_what_torch_may_choose_from_is_part_of_it(asked, monkeypatch):
    asked()
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: "another")
    asked()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    asked()
    assert asked.count == 3


@pytest.mark.parametrize("file", ["transformers/masking_utils.py", "transformers/integrations/sdpa_attention.py"])
def test_libraries_that_are_worked_on_are_tried_out_anew(asked, monkeypatch, file):
    asked()
    stat = Path.stat

    def changed(path, **options):
        found = stat(path, **options)
        is_it = path.as_posix().endswith(file)
        return SimpleNamespace(st_size=1, st_mtime_ns=1, st_mode=found.st_mode) if is_it else found

    monkeypatch.setattr(Path, "stat", changed)
    conditions_module._code.cache_clear()
    asked()
    conditions_module._code.cache_clear()
    assert asked.count == 2


def test_where_files_cannot_be_looked_at_it_is_tried_out(asked, monkeypatch):
    def archived(path):
        raise NotADirectoryError(path)

    monkeypatch.setattr(conditions_module, "_file", archived)
    assert [asked(), asked()] == [True, True]
    assert asked.count == 2


def test_a_model_that_nobody_knows_is_always_tried_out(asked, tiny_model):
    asked()
    assert tried("question", tiny_model(), lambda: "tried", is_true) == "tried"


def test_random_numbers_are_the_same_whether_or_not_it_was_tried(tiny_model):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    tried("question", tiny_model(), lambda: bool(torch.rand(5).sum() > 0), is_true)
    assert torch.equal(torch.rand(3), expected)


def test_a_second_start_runs_no_trial(monkeypatch, tmp_path, tiny_model):
    monkeypatch.setenv("THEODORA_CACHE", str(tmp_path))
    runs = []
    for _ in range(2):
        model = tiny_model()
        know(model, hash_of_weights(model))
        own = type(model).forward
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "forward", lambda *a, own=own, **k: runs.append(1) or own(*a, **k))
            check_continues_text(model)
            inject_adapter(model, AdapterConfig(rank=2))
            assert without_gradient(model) == []
    assert len(runs) == 3  # two and one, of the first start


@pytest.mark.parametrize("others", [{}, {"packing": True}], ids=str)
def test_a_second_run_runs_the_model_for_its_steps_alone(monkeypatch, tmp_path, made, run, others):
    """As on a GPU: with the fused loss, whose head and bounds are tried out, too."""
    monkeypatch.setenv("THEODORA_CACHE", str(tmp_path / "kept"))
    before, forward, begin = [], LlamaForCausalLM.forward, CallbackHandler.on_step_begin
    stepping = []
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *a, **k: stepping or before.append(1) or forward(*a, **k))
    monkeypatch.setattr(CallbackHandler, "on_step_begin", lambda *a: stepping.append(1) or begin(*a))
    counts = []
    for _ in range(2):
        before.clear()
        stepping.clear()
        # (In float32, attention on a GPU has no kernel that takes bounds, which is tried out each time.)
        run(held_out=0, max_steps=1, max_length=64, overwrite=True, bf16=DEVICE == "cuda", **others)
        counts.append(sum(before))
    assert counts[0] > 0
    assert counts[1] == 0
