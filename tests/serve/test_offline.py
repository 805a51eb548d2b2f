"""Prompts answered together: the tokens of `generate`, and a model left as it was."""

import copy
import gc
import threading
import weakref
from contextlib import nullcontext

import peft
import pytest
import torch
from transformers import GenerationConfig

from serving import trained
from theodora import adapter_disabled, inject_adapter
from theodora.adapters.state import trained_tensors
from theodora.config import AdapterConfig
from theodora.evaluate.decoding import decoding
from theodora.serve import offline, offline_manager, trial
from theodora.serve import tried as module_of_trials
from theodora.serve.offline import Unfit, answer_together, runnable
from theodora.serve.offline_manager import Asked, Sizes
from tiny import tiny_model

ENDS, MOST = [2, 77, 140], 12
LENGTHS = (3, 17, 40, 8, 25, 1, 60, 33)


def prompts_of(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 260, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def generated(model, prompts, settings=None):
    """Each prompt by itself."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        settings = settings or decoding(ENDS, MOST)
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def together(model, prompts, **options):
    return answer_together(model, prompts, decoding(ENDS, MOST), **options)


@pytest.mark.parametrize("adapter", [None, "dora4", "lora8"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma", "phi3", "gpt_neox"])
def test_the_tokens_are_those_of_generate(family, adapter):
    model = tiny_model(family)
    if adapter is not None:
        trained(model, adapter).eval()
    expected = generated(model, prompts_of())
    counted = []
    assert together(model, prompts_of(), over=lambda: counted.append(1), rows=5) == expected
    assert len(counted) == len(expected)


def test_capped_scores_stay_capped():
    model = tiny_model("gemma2", attn_logit_softcapping=0.5, attn_implementation="eager")
    uncapped = tiny_model("gemma2", attn_logit_softcapping=None)
    expected = generated(model, prompts_of())
    assert together(model, prompts_of()) == expected != generated(uncapped, prompts_of())
    assert together(uncapped, prompts_of()) == generated(uncapped, prompts_of())


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "qwen2"])
def test_windows_that_slide_are_kept(family):
    more = {"use_sliding_window": True, "max_window_layers": 1} if family == "qwen2" else {}
    model = tiny_model(family, sliding_window=8, **more)
    assert together(model, prompts_of()) == generated(model, prompts_of())


def test_an_adapter_that_is_put_away_is_not_used():
    model = trained(tiny_model(), "dora4").eval()
    with adapter_disabled(model):
        assert together(model, prompts_of()) == generated(tiny_model(), prompts_of())
    assert together(model, prompts_of()) == generated(model, prompts_of())


@pytest.mark.parametrize("dora", [False, True])
def test_a_model_of_pefts_is_answered_for_by_its_own(dora):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], use_dora=dora, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(), config).eval()
    assert together(model, prompts_of()) == generated(model, prompts_of())
    prompted = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(Unfit, match="changes prompts"):
        runnable(peft.get_peft_model(tiny_model(), prompted))


def test_an_answer_that_is_settled_is_broken_off():
    model = tiny_model()
    whole = generated(model, prompts_of())
    seen = []

    def settled(row, tokens):
        seen.append((row, len(tokens)))
        return len(tokens) == 1 + row % 3

    answers = together(model, prompts_of(), settled=settled)
    assert answers == [answer[: 1 + row % 3] for row, answer in enumerate(whole)]
    assert max(count for _, count in seen) == 3


def test_a_weight_written_between_is_seen():
    model = trained(tiny_model(), "dora4").eval()
    before = together(model, prompts_of())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(-3)
    assert together(model, prompts_of()) == generated(copy.deepcopy(model), prompts_of()) != before


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [None, Stop, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_in_training_is_left_as_it_was(attention, error):
    model = trained(tiny_model(attn_implementation=attention), "dora4").train()
    model.config.use_cache = False
    model.lm_head.eval()
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes = {name: module.training for name, module in model.named_modules()}
    hooks, drawn = len(model._forward_pre_hooks), torch.random.get_rng_state()

    def over():
        if error is not None:
            raise error

    if error is None:
        answers = together(model, prompts_of(), over=over)
        assert answers == generated(copy.deepcopy(model).eval(), prompts_of())
    else:
        with pytest.raises(Unfit if error is RuntimeError else error):
            together(model, prompts_of(), over=over)
    assert model.config._attn_implementation == attention
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(model._forward_pre_hooks) == hooks
    assert torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(dict(model.named_parameters())[name].grad, grad) for name, grad in grads.items())
    assert threading.active_count() == 1 or not any("batch" in t.name for t in threading.enumerate())


@pytest.mark.parametrize("fails", [False, True])
def test_pages_are_given_back_at_once(fails, monkeypatch):
    pages = []
    keep = offline_manager.keep_cache_finite
    monkeypatch.setattr(
        offline_manager, "keep_cache_finite", lambda cache: pages.append(weakref.ref(cache)) or keep(cache)
    )

    def over():
        if fails:
            raise Stop

    gc.disable()
    try:
        with pytest.raises(Stop) if fails else nullcontext():
            together(tiny_model(), prompts_of(), over=over)
        assert [cache() for cache in pages] == [None, None]  # of the trial, and of the run
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("bloom", "in the place of"),
        ("stablelm", "do not take it"),
        ("mamba", "(do not take it|in the place of)"),
    ],
)
def test_who_cannot_be_run_so_is_unfit(family, says):
    model = tiny_model(family)
    attention = model.config._attn_implementation
    for _ in range(2):
        with pytest.raises(Unfit, match=says):
            together(model, prompts_of())
    assert model.config._attn_implementation == attention
    generated(model, prompts_of((3,)))


def test_a_model_is_tried_once(monkeypatch):
    tried = []
    of = trial.Trial.of
    monkeypatch.setattr(trial.Trial, "of", lambda *args: tried.append(1) or of(*args))
    model = tiny_model()
    for _ in range(2):
        together(model, prompts_of((3, 5)))
    assert len(tried) == 1


def test_a_model_that_has_got_a_hook_since_is_tried_again():
    model = tiny_model("llama")
    together(model, prompts_of())

    def steer(module, args, output):
        output[:, -1] *= -3  # of the last row alone, where rows are one behind the other
        return output

    model.model.layers[0].mlp.register_forward_hook(steer)
    with pytest.raises(Unfit, match="log-probabilities are off"):
        together(model, prompts_of())


def test_a_model_that_was_fit_is_not_tried_at_the_next_start(monkeypatch, tmp_path):
    monkeypatch.setenv("THEODORA_CACHE", str(tmp_path))
    tried = []
    of = trial.Trial.of
    monkeypatch.setattr(trial.Trial, "of", lambda *args: tried.append(1) or of(*args))

    def runs(model):
        tried.clear()
        answers = together(model, prompts_of((3, 5)))
        return answers, len(tried)

    def model(alpha=8.0):
        torch.manual_seed(0)
        return inject_adapter(tiny_model(), AdapterConfig(rank=2, alpha=alpha))

    first, again = runs(model()), runs(model())
    assert (first[1], again[1]) == (1, 0)
    assert first[0] == again[0]
    assert runs(model(alpha=16.0))[1] == 1
    other = model()
    next(iter(trained_tensors(other).values())).data[0] += 1
    assert runs(other)[1] == 1


def test_why_a_model_is_unfit_is_found_out_each_time(monkeypatch, tmp_path):
    monkeypatch.setenv("THEODORA_CACHE", str(tmp_path))
    tried = []
    monkeypatch.setattr(module_of_trials, "_why_unfit", lambda model, way: tried.append(1) or "it is not")
    for _ in range(2):
        with pytest.raises(Unfit, match="it is not"):
            together(tiny_model(), prompts_of((3, 5)))
    assert len(tried) == 2


def test_settings_that_pick_otherwise_are_for_generate():
    for settings in ({"repetition_penalty": 2.0}, {"do_sample": True}, {"num_beams": 2}, {"bad_words_ids": [[5]]}):
        with pytest.raises(Unfit, match="generation settings"):
            answer_together(
                tiny_model(), prompts_of((3,)), GenerationConfig(max_new_tokens=4, eos_token_id=[2], **settings)
            )
    model = tiny_model()
    model.generation_config.repetition_penalty = 2.0  # `decoding` overrules it, as with `generate`
    assert together(model, prompts_of()) == generated(model, prompts_of())
    model.generation_config.bad_words_ids = [[generated(model, prompts_of())[0][0]]]
    with pytest.raises(Unfit, match="generation settings"):
        together(model, prompts_of())


def test_pages_are_as_many_as_the_rows_need():
    model = tiny_model()

    def pages(needs, rows):
        asked = Asked([[5] * (need * 32 - MOST) for need in needs], decoding(ENDS, MOST))
        return Sizes.of(model, asked, range(len(needs)), rows).pages

    assert pages([3, 1, 2], 2) == 5
    assert pages([2000, 1, 2], 2) == 2000
    assert pages([100] * 300, 256) == 1024


def test_what_cannot_be_recorded_goes_on_without(monkeypatch):
    model, counted, runs = trained(tiny_model(), "dora4").eval(), [], []
    batching = offline_manager._batching

    def noted(model, asked, sizes):
        config = batching(model, asked, sizes)
        runs.append((asked.graphs, sizes.rows))
        config.use_cuda_graph = False  # there are none on a CPU
        return config

    def once(row, tokens):
        if runs[-1][0] and counted:
            raise RuntimeError("operation not permitted when stream is capturing")
        return len(tokens) == 2 and row == 4

    monkeypatch.setattr(offline_manager, "_batching", noted)
    monkeypatch.setattr(offline, "records", lambda model: model not in offline._NOT_RECORDED)
    expected = generated(model, prompts_of())
    expected[4] = expected[4][:2]
    for _ in range(2):
        counted.clear()
        assert together(model, prompts_of(), settled=once, over=lambda: counted.append(1)) == expected
        assert len(counted) == len(expected)
    rows = len(expected)
    assert runs == [(False, 2), (True, rows), (False, rows - 1), (False, rows)]
