"""Answers in lock-step: the tokens of `generate`, rows that move together, and graphs that are kept."""

import weakref

import pytest
import torch

import recorder
from serving import trained
from theodora.evaluate.decoding import decoding
from theodora.serve import offline, static_batches
from theodora.serve.offline import Kept, Unfit, draw_together
from theodora.serve.requests import Sampling
from theodora.serve.static_batches import draw_in_step
from theodora.serve.static_cache import Run
from tiny import tiny_model

ENDS, MOST = [2, 77, 140], 24
LENGTHS = (3, 17, 40, 8, 25, 1, 60, 33)


def prompts_of(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 260, (length,), generator=generator).tolist() for length in lengths]


def samplings_of(count, **options):
    return [Sampling(max_tokens=MOST, seed=seed, **options) for seed in range(count)]


def in_step(model, prompts, *, ends=ENDS, most=MOST, draw=draw_in_step, sampling=None, **options):
    samplings = samplings_of(len(prompts), **(sampling or {"temperature": 0.0}))
    return [tokens for tokens, _ in draw(model, prompts, decoding(ends, most), samplings, **options)]


@torch.no_grad()
def generated(model, prompts):
    """Each prompt by itself."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=decoding(ENDS, MOST)
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


@pytest.fixture
def recorded(monkeypatch):
    return recorder.install_steps(monkeypatch)


@pytest.mark.parametrize("adapter", [None, "dora4"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma", "phi3", "gpt_neox"])
def test_the_tokens_are_those_of_generate(family, adapter):
    model = tiny_model(family)
    if adapter is not None:
        trained(model, adapter).eval()
    counted = []
    expected = generated(model, prompts_of())
    assert in_step(model, prompts_of(), over=lambda: counted.append(1), rows=5) == expected
    assert len(counted) == len(expected)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "qwen2"])
def test_windows_that_slide_are_kept(family):
    more = {"use_sliding_window": True, "max_window_layers": 1} if family == "qwen2" else {}
    model = tiny_model(family, sliding_window=8, **more)
    expected = generated(model, prompts_of())
    assert in_step(model, prompts_of()) == expected
    assert expected != generated(tiny_model(family, sliding_window=64, **more), prompts_of())


def test_capped_scores_stay_capped():
    model = tiny_model("gemma2", attn_logit_softcapping=0.5, attn_implementation="eager")
    assert in_step(model, prompts_of()) == generated(model, prompts_of())


@pytest.mark.parametrize("graphs", [False, True])
def test_few_long_answers_go_on_among_themselves(graphs, request):
    """With a third of all tokens as ends, most answers are short."""
    if graphs:
        recorded = request.getfixturevalue("recorded")
    model, prompts, ends = trained(tiny_model(), "dora4").eval(), prompts_of(LENGTHS * 5), [*range(2, 60)]
    prompts[13:17] = [prompts[13]] * 4
    options = {"ends": ends, "most": 80, "sampling": {"temperature": 1.0}}
    expected = in_step(model, prompts, draw=draw_together, **options)
    sizes, move = [], static_batches._Steps._move_together
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            static_batches._Steps,
            "_move_together",
            lambda self, live, size: sizes.append((len(live), size)) or move(self, live, size),
        )
        drawn = in_step(model, prompts, over=lambda: told.append(1), **options)
    assert drawn == expected
    assert len(told) == len(prompts)
    assert all(live <= size for live, size in sizes)
    assert sizes[-1][1] == 8
    if graphs:
        assert recorded == [40, *(size for _, size in sizes)]


def test_it_ends_with_the_last_row(recorded):
    model, steps = tiny_model(), []
    forward = static_batches._Steps._forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static_batches._Steps, "_forward", lambda self, size: steps.append(size) or forward(self, size))
        draw_in_step(model, prompts_of(), decoding([*range(3, 272)], 200), samplings_of(8))
        assert len(steps) <= 4 + 2 * 8  # the trial's, too


def test_equal_prompts_are_read_once(monkeypatch):
    seen, read = [], Run.read
    monkeypatch.setattr(Run, "read", lambda self, prompts: seen.append(list(prompts)) or read(self, prompts))
    model, prompts = tiny_model(), prompts_of((5, 30, 9))
    prompts = [prompts[at] for at in (0, 1, 2, 1, 0, 1, 1, 1, 2)]
    options = {"sampling": {"temperature": 1.0}}
    expected = in_step(model, prompts, draw=draw_together, **options)
    seen.clear()
    assert in_step(model, prompts, **options) == expected
    assert [sorted(map(len, each)) for each in seen[-1:]] == [[5, 9, 30]]
    monkeypatch.setattr(static_batches, "_READ", 40)
    seen.clear()
    assert in_step(model, prompts, **options) == expected
    assert [sorted(map(len, each)) for each in seen[-2:]] == [[30], [5, 9]]


def test_a_batch_is_kept_while_it_does(recorded):
    model, kept, made = tiny_model(), Kept(), []

    def draws(lengths, **options):
        prompts = prompts_of(lengths)
        assert in_step(model, prompts, kept=kept, **options) == generated(model, prompts)
        if kept.made not in made:
            made.append(kept.made)
        return len(made)

    lengths = (40, 30, 50, 3)
    assert [draws(each) for each in (lengths, (3, 60, 50), (30,), lengths, lengths[::-1])] == [1] * 5
    assert recorded == [8]
    assert draws((150, 100)) == 2  # longer
    assert draws(lengths) == 2
    assert draws(lengths * 3) == 3  # more rows
    assert draws(lengths) == 3
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    assert draws(lengths) == 4
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
    assert draws(lengths) == 5
    held = weakref.ref(kept.made.mask_N11W)
    made.clear()
    kept.let_go()
    assert held() is None


@pytest.mark.parametrize("fails", ["over", "step"])
def test_after_an_error_nothing_is_kept(fails, recorded, monkeypatch):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    model, kept = tiny_model(), Kept()
    expected = in_step(model, prompts_of(), kept=kept)
    if fails == "step":
        monkeypatch.setattr(static_batches._Steps, "_step", stop)
    with pytest.raises(Stop):
        in_step(model, prompts_of(), kept=kept, over=stop if fails == "over" else lambda: None)
    assert kept.made is None
    monkeypatch.undo()
    assert in_step(model, prompts_of(), kept=kept) == expected


def test_what_was_not_finite_is_not_met_again():
    model, kept = tiny_model(), Kept()
    expected = in_step(model, prompts_of(), kept=kept)
    weight = model.model.layers[0].self_attn.v_proj.weight.data
    before = weight.clone()
    weight.fill_(torch.nan)
    in_step(model, prompts_of(), kept=kept)
    assert kept.made.layers[0][1].isnan().any()
    weight.copy_(before)
    assert in_step(model, prompts_of(), kept=kept) == expected


def test_rows_wait_where_memory_does_not_do(monkeypatch):
    model, kept, rows = tiny_model(), Kept(), []
    expected = in_step(model, prompts_of())
    monkeypatch.setattr(static_batches, "_most_rows", lambda *_: 3)
    made = []
    for _ in range(2):
        assert in_step(model, prompts_of(), kept=kept) == expected
        made.append(kept.made)
        rows.append(kept.made.rows)
    assert rows == [3, 3]
    assert made[0] is made[1]
    monkeypatch.setattr(static_batches, "_most_rows", lambda *_: 0)
    with pytest.raises(offline.NoRoom, match="one row"):
        in_step(model, prompts_of())


@pytest.mark.parametrize(
    ("family", "more", "says"),
    [
        ("bloom", {}, "in the place of"),
        ("mamba", {}, "finds positions itself"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of conv"),
    ],
)
def test_who_cannot_be_run_so_is_unfit(family, more, says):
    model = tiny_model(family, **more)
    for _ in range(2):
        with pytest.raises(Unfit, match=says):
            in_step(model, prompts_of())


@pytest.mark.parametrize("more", [{"bias": ((5, 9.0),)}, {"presence_penalty": 1.0}, {"allowed": (5, 6)}])
def test_what_changes_logits_is_for_others(more):
    with pytest.raises(Unfit, match="changes logits"):
        in_step(tiny_model(), prompts_of(), sampling=more)


def test_a_model_that_takes_no_such_mask_is_unfit():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(Unfit, match="takes no mask"):
        in_step(model, prompts_of())


def test_a_model_that_minds_who_is_in_the_batch_is_unfit_and_not_tried_again():
    model, passes = tiny_model(), []

    def steer(module, args, output):
        passes.append(1)
        output[0] *= -3
        return output

    model.model.layers[0].mlp.register_forward_hook(steer)
    for _ in range(2):
        with pytest.raises(Unfit, match="log-probabilities are off"):
            in_step(model, prompts_of())
        count, passes = len(passes), []
    assert count == 0


def test_what_cannot_be_recorded_is_unfit(recorded, monkeypatch):
    def fails(step, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    model, kept = tiny_model(), Kept()
    monkeypatch.setattr(static_batches, "record", fails)
    for _ in range(2):
        with pytest.raises(Unfit, match="not permitted when stream is capturing"):
            in_step(model, prompts_of(), kept=kept)
        assert kept.made is None
