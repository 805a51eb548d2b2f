"""Completions drawn from a live model: by the batches that serve and by generate, the same ones."""

import copy
import math

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import GenerationConfig

import recorder
from serving import trained
from theodora import inject_adapter
from theodora.adapters.state import trained_tensors
from theodora.config import AdapterConfig
from theodora.errors import ConfigError, DataError, TheodoraError
from theodora.serve import offline, offline_manager, static_batches
from theodora.train.rollouts import Drawing, Rollouts
from tiny import tiny_model
from train.rewarded import forward_logps, tokens_of

ENDS, MOST = [2, 77, 140], 12
LENGTHS = (3, 17, 40, 8, 25, 1, 60, 33)
IN_STEP, BATCHES = "batches in lock-step", "transformers' continuous batching"


def prompts_of(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 260, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(autouse=True)
def _one_way(monkeypatch):
    """What draws is what a test asks for."""
    monkeypatch.setattr(static_batches, "DEVICES", set())


@pytest.fixture(params=["in step", "batches", "generate"])
def way(request, monkeypatch):
    """All ways run on a CPU here; which one does is said in `Rollouts.way`."""
    if request.param == "in step":
        monkeypatch.setattr(static_batches, "DEVICES", {"cpu"})
        return IN_STEP
    if request.param == "batches":
        monkeypatch.setattr(offline, "DEVICES", {"cpu"})
        return BATCHES
    return "generate (it is faster on cpu)"


@pytest.mark.parametrize("adapter", ["dora4", "lora8"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_log_probabilities_are_those_of_a_pass_over_everything(family, adapter, way):
    model = trained(tiny_model(family), adapter).train()
    drawing = Drawing(temperature=0.7, top_k=40, top_p=0.95)
    rollouts = Rollouts(model, drawing, ENDS, MOST, rows=5)
    counted = []
    completions = rollouts(prompts_of(), 3, over=lambda: counted.append(1))
    assert rollouts.way == way
    assert len(counted) == len(completions)
    exact = copy.deepcopy(model).double().eval()
    for prompt, each in zip(prompts_of(), completions, strict=True):
        expected = forward_logps(exact, prompt, each.tokens, 0.7)
        torch.testing.assert_close(torch.tensor(each.logps).double(), expected, rtol=0, atol=2e-5)
        assert each.tokens[-1] in ENDS or len(each.tokens) == MOST
        assert not set(each.tokens[:-1]) & set(ENDS)


@pytest.mark.parametrize(
    "drawing",
    [
        Drawing(),
        Drawing(temperature=1.3, top_p=0.8),
        Drawing(temperature=0.5, min_p=0.1, top_k=9),
        Drawing(repetition_penalty=1.7),
    ],
)
def test_both_ways_draw_the_same(drawing, monkeypatch):
    model = trained(tiny_model(), "dora4").train()
    generated = Rollouts(model, drawing, ENDS, MOST, rows=3)(prompts_of(), 5)
    monkeypatch.setattr(offline, "DEVICES", {"cpu"})
    rollouts = Rollouts(model, drawing, ENDS, MOST, rows=5)
    drawn = rollouts(prompts_of(), 5)
    assert rollouts.way == BATCHES
    assert tokens_of(drawn) == tokens_of(generated)
    for one, other in zip(drawn, generated, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=2e-5)


def test_a_seed_gives_the_same_whoever_else_is_there(way):
    model = trained(tiny_model(), "dora4")
    prompts = prompts_of()
    all_ = tokens_of(Rollouts(model, Drawing(), ENDS, MOST)(prompts, 1))
    assert tokens_of(Rollouts(model, Drawing(), ENDS, MOST, rows=2)(prompts, 1)) == all_
    assert tokens_of(Rollouts(model, Drawing(), ENDS, MOST)(prompts[:3], 1)) == all_[:3]
    others = [prompts_of((5,))[0], *prompts[1:]]
    assert tokens_of(Rollouts(model, Drawing(), ENDS, MOST)(others, 1))[1:] == all_[1:]
    other = tokens_of(Rollouts(model, Drawing(), ENDS, MOST)(prompts, 2))
    assert all(one != two for one, two in zip(all_, other, strict=True))
    group = tokens_of(Rollouts(model, Drawing(), ENDS, MOST)([prompts[0]] * 8, 1))
    assert len(set(map(tuple, group))) == 8


def test_tokens_come_as_often_as_the_softmax_says(way):
    model = tiny_model(vocab_size=16)
    prompt, count = [3, 5, 7], 2000
    with torch.no_grad():
        chances = (model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    completions = Rollouts(model, Drawing(temperature=0.7), [0], 1, rows=500)([prompt] * count, 0)
    drawn = torch.tensor([each.tokens[0] for each in completions]).bincount(minlength=16)
    expected = chances.double() * count
    chi_squared = ((drawn - expected) ** 2 / expected).sum()
    assert float(torch.special.gammaincc(torch.tensor(15 / 2).double(), chi_squared / 2)) > 0.01


@pytest.mark.parametrize("drawing", [Drawing(top_k=3), Drawing(top_p=0.5), Drawing(min_p=0.4)])
def test_only_the_likeliest_are_drawn(drawing, way):
    model = tiny_model(vocab_size=16)
    prompt = [3, 5, 7]
    with torch.no_grad():
        chances = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    sorted_, order = chances.sort(descending=True)
    if drawing.top_k:
        allowed = order[: drawing.top_k]
    elif drawing.top_p < 1:
        allowed = order[sorted_.cumsum(0) - sorted_ < drawing.top_p]
    else:
        allowed = order[sorted_ >= drawing.min_p * sorted_[0]]
    completions = Rollouts(model, drawing, [0], 1)([prompt] * 300, 0)
    assert {each.tokens[0] for each in completions} == set(allowed.tolist())
    assert len(allowed) < 16
    for each in completions:  # of the whole softmax all the same
        assert math.exp(each.logps[0]) == pytest.approx(float(chances[each.tokens[0]]), rel=1e-4)


def test_what_was_there_is_penalised(way):
    model, prompt = tiny_model(vocab_size=16), [3, 5, 7, 9, 11]

    def repeats(penalty):
        drawing = Drawing(repetition_penalty=penalty)
        completions = Rollouts(model, drawing, [0], 8)([prompt] * 50, 0)
        return sum(len(each.tokens) - len(set(each.tokens) - set(prompt)) for each in completions)

    assert repeats(3.0) < 0.8 * repeats(1.0)


def test_a_completion_ends_with_the_first_end(way):
    model, prompt = tiny_model(), prompts_of((9,))[0]
    whole = Rollouts(model, Drawing(), [0], MOST)([prompt], 4)[0]
    end = whole.tokens[4]
    cut = whole.tokens.index(end) + 1
    (ended,) = Rollouts(model, Drawing(), [0, end], MOST)([prompt], 4)
    assert ended.tokens == whole.tokens[:cut]
    assert ended.logps == pytest.approx(whole.logps[:cut], abs=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_weights_written_between_are_used(way, training):
    model = trained(tiny_model(), "dora4").train(training)
    rollouts = Rollouts(model, Drawing(), ENDS, MOST)
    seen = [tokens_of(rollouts(prompts_of(), 1))]
    for part, write in (
        ("magnitude", lambda p: p.data.mul_(1.5)),
        ("lora_B", lambda p: p.add_(0.3)),
        ("lora_A", lambda p: p.data.neg_()),
    ):
        with torch.no_grad():
            for name, tensor in trained_tensors(model).items():
                if part in name:
                    write(tensor)
        fresh = Rollouts(copy.deepcopy(model), Drawing(), ENDS, MOST)(prompts_of(), 1)
        completions = rollouts(prompts_of(), 1)
        assert tokens_of(completions) == tokens_of(fresh)
        assert tokens_of(completions) not in seen, part
        seen.append(tokens_of(completions))
        for prompt, each in zip(prompts_of(), completions, strict=True):
            expected = forward_logps(copy.deepcopy(model).eval(), prompt, each.tokens, 1.0)
            assert each.logps == pytest.approx(expected.tolist(), abs=5e-5)
        if part == "magnitude":
            rollouts.release()


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable:FutureWarning")
def test_a_model_in_training_is_left_as_it_was(way):
    model = trained(tiny_model(), "dora4").train()
    model.gradient_checkpointing_enable()  # (the new name is of 5.2x)
    model.config.use_cache = False
    model.lm_head.eval()
    ids = torch.tensor([[5, 6, 7]])
    model(ids, labels=ids, use_cache=False).loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes = {name: module.training for name, module in model.named_modules()}
    own, settings, drawn = model.generation_config, model.generation_config.to_dict(), torch.random.get_rng_state()
    hooks = len(model._forward_pre_hooks), len(model.lm_head._forward_pre_hooks)
    rollouts = Rollouts(model, Drawing(), ENDS, MOST)
    completions = rollouts(prompts_of(), 0)
    assert rollouts.way == way
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert (len(model._forward_pre_hooks), len(model.lm_head._forward_pre_hooks)) == hooks
    assert model.config._attn_implementation == "sdpa"
    assert not model.config.use_cache
    assert model.is_gradient_checkpointing
    assert model.generation_config is own
    assert own.to_dict() == settings
    assert torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(dict(model.named_parameters())[name].grad, grad) for name, grad in grads.items())
    assert tokens_of(Rollouts(model.eval(), Drawing(), ENDS, MOST)(prompts_of(), 0)) == tokens_of(completions)


def test_a_model_of_pefts_draws_as_its_own(way):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], use_dora=True, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(), config).train()
    own = model.get_base_model().generation_config
    rollouts = Rollouts(model, Drawing(), ENDS, MOST)
    for seed in range(2):
        for prompt, each in zip(prompts_of(), rollouts(prompts_of(), seed), strict=True):
            expected = forward_logps(copy.deepcopy(model).eval(), prompt, each.tokens, 1.0)
            assert each.logps == pytest.approx(expected.tolist(), abs=5e-5)
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.data.mul_(1.5)
    assert rollouts.way == way
    assert model.get_base_model().generation_config is own


def test_dropout_is_off(way):
    model = inject_adapter(tiny_model(), AdapterConfig(rank=4, dropout=0.5)).train()
    for tensor in trained_tensors(model).values():
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))
    for prompt, each in zip(prompts_of(), Rollouts(model, Drawing(), ENDS, MOST)(prompts_of(), 0), strict=True):
        expected = forward_logps(copy.deepcopy(model).eval(), prompt, each.tokens, 1.0)
        assert each.logps == pytest.approx(expected.tolist(), abs=5e-5)


def test_attention_gives_the_same_bits_each_time(way):
    model, on = tiny_model("llama"), []
    model.register_forward_hook(lambda *_: on.append(torch.backends.cuda.cudnn_sdp_enabled()))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        Rollouts(model, Drawing(), ENDS, MOST)(prompts_of(), 3)
        assert set(on) == {False}  # cuDNN's does not, for one query
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_within_autocast(way):
    model = trained(tiny_model(), "dora4").train()
    model.lm_head.requires_grad_(True)  # so that autocast would keep its cast
    cached, rollouts = [], Rollouts(model, Drawing(), ENDS, MOST)
    with torch.autocast("cpu", torch.bfloat16):
        rollouts(prompts_of(), 1)
        model.lm_head.weight.data.neg_()
        model.lm_head.register_forward_pre_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))
        completions = rollouts(prompts_of(), 0)
        assert way != BATCHES or not any(cached)  # a recorded graph would go on reading the cast
        ids = torch.tensor([[5, 6, 7]])
        model(ids, labels=ids).loss.backward()  # of casts that have a gradient
        expected = [
            forward_logps(copy.deepcopy(model).eval(), prompt, each.tokens, 1.0)
            for prompt, each in zip(prompts_of(), completions, strict=True)
        ]
    assert rollouts.way == way
    assert model.lm_head.weight.grad is not None
    exact = [
        forward_logps(copy.deepcopy(model).eval(), prompt, each.tokens, 1.0)
        for prompt, each in zip(prompts_of(), completions, strict=True)
    ]
    logps = torch.tensor([logp for each in completions for logp in each.logps])
    rounding = float((torch.cat(expected).float() - torch.cat(exact)).abs().mean())
    assert 0 < float((logps - torch.cat(exact)).abs().mean()) < 2 * rounding


def test_within_the_autocast_that_accelerate_puts_into_forward(way):
    AcceleratorState._reset_state(reset_partial_state=True)  # of runs before
    model = trained(tiny_model(), "dora4").train()
    exact = Rollouts(copy.deepcopy(model), Drawing(), ENDS, MOST)(prompts_of(), 0)
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    rollouts = Rollouts(model, Drawing(), ENDS, MOST)
    completions = rollouts(prompts_of(), 0)
    assert rollouts.way == way
    assert [each.logps[0] for each in completions] != pytest.approx([each.logps[0] for each in exact], abs=1e-5)
    for prompt, each in zip(prompts_of(), completions, strict=True):
        logps = forward_logps(model, prompt, each.tokens, 1.0)
        assert each.logps == pytest.approx(logps.tolist(), abs=0.15)


@pytest.fixture
def made(monkeypatch):
    """What is noted of each manager of batches that draws; this is on a CPU, but as if passes were recorded there."""
    made, batching = [], offline_manager._batching

    def noted(model, asked, sizes):
        config = batching(model, asked, sizes)
        config.use_cuda_graph = False
        if asked.samplings:
            assert asked.graphs
            made.append(sizes)
        return config

    monkeypatch.setattr(offline_manager, "_batching", noted)
    monkeypatch.setattr(offline, "records", lambda model: True)
    monkeypatch.setattr(offline, "DEVICES", {"cpu"})
    return made


def read_by_graphs(model):
    """Addresses of what passes without gradients read of each layer."""
    return [layer.norm_cache._inference.norm_O.data_ptr() for layer in model.modules() if hasattr(layer, "norm_cache")]


@pytest.fixture(params=["in step", "batches"])
def graphs(request, monkeypatch):
    """What is noted of each recording, in the two ways that record."""
    if request.param == "batches":
        return request.getfixturevalue("made")
    monkeypatch.setattr(static_batches, "DEVICES", {"cpu"})
    return recorder.install_steps(monkeypatch)


@pytest.mark.parametrize("training", [True, False])
def test_what_graphs_read_is_made_anew_where_it_lies(training, graphs):
    model = trained(tiny_model(), "dora4").train(training)
    optimizer = torch.optim.SGD(trained_tensors(model).values(), lr=0.3)
    rollouts, addresses, drawn = Rollouts(model, Drawing(), ENDS, MOST, rows=4), [], []
    for step in range(3):
        completions = rollouts(prompts_of(), 0)
        assert completions == Rollouts(copy.deepcopy(model), Drawing(), ENDS, MOST, rows=4)(prompts_of(), 0)
        addresses.append(read_by_graphs(model))
        drawn.append(tokens_of(completions))
        ids = torch.tensor([completions[0].tokens])
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        if step:
            optimizer.step()
        else:  # what leaves no trace but in the values
            for name, tensor in trained_tensors(model).items():
                tensor.data.mul_(-2.0 if "lora_B" in name else 1.2)
        with torch.no_grad():  # makes something of its own, which nobody recorded reads
            model(ids)
        aside = [torch.empty(64) for _ in range(64)]  # takes what was let go of
    del aside
    assert addresses[0] == addresses[1] == addresses[2]
    assert drawn[0] != drawn[1] != drawn[2]
    assert len(graphs) == 4  # one, and that of each fresh copy


def test_pages_are_made_once_and_anew_where_they_do_not_do(made):
    model = trained(tiny_model(), "dora4").train()
    rollouts = Rollouts(model, Drawing(), ENDS, MOST, rows=4)
    for seed, lengths in enumerate([(40, 30, 50), (3, 60, 50), (1,), (40, 30, 50)]):
        rollouts(prompts_of(lengths), seed)
    assert len(made) == 1
    rollouts(prompts_of((300, 300)), 0)
    assert len(made) == 2
    rollouts(prompts_of((40, 30, 50)), 0)
    assert len(made) == 2
    rollouts.release()
    rollouts.release()
    rollouts(prompts_of((40, 30, 50)), 0)
    assert len(made) == 3
    for layer in model.modules():
        for adapter in getattr(layer, "adapters", {}).values():
            adapter.scale = 3.0  # a number that a recorded pass would not see
    fresh = Rollouts(copy.deepcopy(model), Drawing(), ENDS, MOST, rows=4)(prompts_of((40, 30, 50)), 0)
    assert rollouts(prompts_of((40, 30, 50)), 0) == fresh
    assert len(made) == 5


def test_nothing_is_kept_where_others_need_it(graphs):
    model = trained(tiny_model(), "dora4").train()
    rollouts = Rollouts(model, Drawing(), ENDS, MOST)
    completions = rollouts(prompts_of(), 0)
    for for_good, count in ((False, 2), (True, 4)):
        rollouts.release(for_good)
        assert [rollouts(prompts_of(), 0) for _ in range(2)] == [completions] * 2
        assert len(graphs) == count


def test_after_an_error_nothing_is_kept(made):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    model = trained(tiny_model(), "dora4").train()
    rollouts = Rollouts(model, Drawing(), ENDS, MOST)
    completions = rollouts(prompts_of(), 0)
    with pytest.raises(Stop):
        rollouts(prompts_of(), 1, over=stop)
    assert rollouts(prompts_of(), 0) == completions
    assert len(made) == 2


def test_what_the_model_is_set_to_suppress_is_drawn_all_the_same(way):
    model = tiny_model()
    completions = Rollouts(model, Drawing(), ENDS, MOST)(prompts_of(), 0)
    model.generation_config = GenerationConfig(suppress_tokens=[completions[0].tokens[0]], do_sample=True, num_beams=2)
    assert tokens_of(Rollouts(model, Drawing(), ENDS, MOST)(prompts_of(), 0)) == tokens_of(completions)


def test_a_model_that_is_unfit_draws_by_generate(monkeypatch):
    monkeypatch.setattr(offline, "DEVICES", {"cpu"})
    model = tiny_model("bloom")
    rollouts = Rollouts(model, Drawing(), ENDS, MOST)
    completions = rollouts(prompts_of(), 0)
    assert rollouts.way.startswith("generate (its attention")
    for prompt, each in zip(prompts_of(), completions, strict=True):
        assert each.logps == pytest.approx(forward_logps(model, prompt, each.tokens, 1.0).tolist(), abs=5e-5)


def test_a_model_whose_steps_are_not_recorded_draws_otherwise(monkeypatch):
    def fails(step, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    model, told = trained(tiny_model(), "dora4").train(), []
    expected = Rollouts(model, Drawing(), ENDS, MOST)(prompts_of(), 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static_batches, "DEVICES", {"cpu"})
        patch.setattr(offline, "DEVICES", {"cpu"})
        recorder.install_steps(patch)
        patch.setattr(static_batches, "record", fails)
        rollouts = Rollouts(model, Drawing(), ENDS, MOST)
        assert rollouts.way == IN_STEP
        assert tokens_of(rollouts(prompts_of(), 3, over=lambda: told.append(1))) == tokens_of(expected)
    assert rollouts.way == BATCHES
    assert len(told) == len(expected)


def test_a_prompt_beyond_the_window_is_for_generate(monkeypatch):
    monkeypatch.setattr(offline, "DEVICES", {"cpu"})
    model = tiny_model(max_position_embeddings=48)
    rollouts = Rollouts(model, Drawing(), ENDS, MOST)
    assert all(map(len, tokens_of(rollouts(prompts_of(), 0))))
    assert rollouts.way == BATCHES


def test_rows_are_halved_where_memory_does_not_do(monkeypatch, way):
    model, seen = tiny_model(), []
    run, generate, batch = offline._run, type(model).generate, static_batches.Batch

    def scarce(count):
        seen.append(count)
        if count > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def runs(model, asked, rows, *more):
        if asked.samplings:
            scarce(min(rows, len(asked.prompts) - len(asked.answers)))
        return run(model, asked, rows, *more)

    def takes(asked, like, rows, width):
        if asked.sampling.temperature:  # not in the trial
            scarce(rows)
        return batch(asked, like, rows, width)

    def generates(self, *args, **options):
        scarce(len(options["input_ids"]))
        return generate(self, *args, **options)

    whole = tokens_of(Rollouts(model, Drawing(), ENDS, MOST)(prompts_of(), 0))
    rollouts, told = Rollouts(model, Drawing(), ENDS, MOST, rows=8), []
    if way == BATCHES:
        monkeypatch.setattr(offline, "_run", runs)
    elif way == IN_STEP:
        monkeypatch.setattr(static_batches, "Batch", takes)
    else:
        monkeypatch.setattr(type(model), "generate", generates)
    assert tokens_of(rollouts(prompts_of(), 0, over=lambda: told.append(1))) == whole
    assert len(told) == len(whole)
    assert rollouts.way == way
    assert seen[:3] == [8, 4, 2]


def test_what_cannot_be_drawn_is_refused(way):
    with pytest.raises(ConfigError, match=r"temperature is 0.0.*top_k is -1"):
        Drawing(temperature=0.0, top_k=-1)
    with pytest.raises(DataError, match="number 2"):
        Rollouts(tiny_model(), Drawing(), ENDS, MOST)([[5], []], 0)
    model = tiny_model()
    assert Rollouts(model, Drawing(), ENDS, MOST)([], 0) == []
    rollouts = Rollouts(model, Drawing(), ENDS, MOST)
    rollouts([[5, 6]], 0)
    model.lm_head.weight.data[7] = math.nan
    with pytest.raises(TheodoraError, match="not finite"):
        rollouts([[5, 6]], 0)
