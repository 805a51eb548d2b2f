"""A batch whose rows are one row trains as the padded batch does, and nearly every step is a graph."""

import json

import pytest
import torch
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import tiny
import tiny_families
from formula import DEVICE
from theodora import accelerate
from theodora.errors import TheodoraError
from theodora.fastpath import packed_attention
from theodora.kernels.cross_entropy import IGNORED
from theodora.train import trainer_passes
from theodora.train.flattened import Costs, Flatten, Shape, choose, lengths_of
from theodora.train.fused_loss import LEARNED

SETTINGS = {"max_steps": 8, "held_out": 6, "eval_steps": 4, "per_device_train_batch_size": 5}
FREE = Costs(token=1.0, shape=0.0, batches=1)


def rows_of(*lengths):
    return [{"input_ids": [*range(1, n + 1)], "labels": [IGNORED] * 2 + [*range(3, n + 1)]} for n in lengths]


def flatten(*shapes, batch=4):
    return Flatten(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True), shapes, batch)


@pytest.fixture
def uneven(tmp_path):
    """Rows of many lengths."""
    path = tmp_path / "uneven.jsonl"
    rows = [
        {"prompt": f"{a} + {b} =", "completion": f" {a + b}" + "!" * (a * b % 11)} for a in range(9) for b in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"train_on": "all", "per_device_train_batch_size": 1},
        {"gradient_checkpointing": True},
    ],
    ids=["", "accumulated", "single rows", "recomputed"],
)
def test_losses_are_those_of_padded_batches(others, run, made, uneven, tmp_path, losses, monkeypatch):
    settings = {**SETTINGS, "data": uneven, "bf16": torch.cuda.is_available(), **others}
    run(output=str(tmp_path / "flat"), **settings)
    monkeypatch.setattr(trainer_passes, "takes_bounds", lambda *_: False)
    run(output=str(tmp_path / "padded"), **settings)
    flat, padded = made
    assert flat.shapes
    assert not padded.shapes
    assert flat.graph_replays >= 4, flat.why_no_graph
    assert "rows of a batch as one" in flat.fast_notes
    assert losses(tmp_path / "flat", "num_tokens") == losses(tmp_path / "padded", "num_tokens")
    rounding = 5e-2 if settings["bf16"] else 1e-5
    for name in ("loss", "eval_loss", "entropy", "mean_token_accuracy"):
        found, expected = losses(tmp_path / "flat", name), losses(tmp_path / "padded", name)
        # (Of some thirty tokens in a batch rounding may make another the likeliest.)
        few = 2 / 28 if settings["bf16"] and name == "mean_token_accuracy" else 1e-5
        torch.testing.assert_close(found, expected, rtol=rounding, atol=few)


def test_attention_covers_what_fills_up_a_short_batch(run, made, uneven, monkeypatch):
    """Beyond the longest sequence that it is told of, flash attention writes nothing to its output."""
    calls, attention = [], packed_attention.attention_apart
    monkeypatch.setattr(packed_attention, "attention_apart", lambda *args: calls.append(args[3:5]) or attention(*args))
    run(data=uneven, bf16=torch.cuda.is_available(), **SETTINGS | {"max_length": 40, "max_steps": 10})
    assert made[0].shapes
    longest_of = [(int(bounds.diff().max()), longest) for bounds, longest in calls]
    assert any(tokens > 40 for tokens, _ in longest_of)  # of the last batch of an epoch
    assert all(tokens <= longest for tokens, longest in longest_of)


def test_learned_positions_and_rows_as_long_as_they_go(run, made, uneven, tiny_model_dir):
    model = str(tiny_model_dir("gpt2"))
    run(model=model, data=uneven, bf16=torch.cuda.is_available(), **SETTINGS)
    assert made[0].shapes
    assert made[0].graph_replays, made[0].why_no_graph


def test_models_with_sinks(run, made, uneven, tmp_path, losses, monkeypatch):
    """Whose rows nothing but bounds keeps apart, on the fast path; under windows shorter than rows."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "num_local_experts": 4}
    model = tiny.tiny_model("gpt_oss", **layers, num_experts_per_tok=2, head_dim=8)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    model.save_pretrained(tmp_path / "model")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "model")
    choose_graphs = trainer_passes.PassOverrides.choose_graphs
    monkeypatch.setattr(  # which a run on a CPU leaves out
        trainer_passes.PassOverrides, "choose_graphs", lambda self: [accelerate(self.model), choose_graphs(self)][1]
    )
    settings = SETTINGS | {"model": str(tmp_path / "model"), "data": uneven, "targets": ["q_proj", "v_proj"]}
    settings |= {"bf16": DEVICE == "cuda", "router_aux_loss_coef": 0.0}  # of a whole batch
    run(output=str(tmp_path / "flat"), **settings)
    monkeypatch.setattr(trainer_passes, "takes_bounds", lambda *_: False)
    run(output=str(tmp_path / "padded"), **settings)
    assert made[0].shapes
    assert not made[1].shapes
    assert made[0].graph_replays >= 4, made[0].why_no_graph
    for name in ("loss", "eval_loss"):
        found, expected = losses(tmp_path / "flat", name), losses(tmp_path / "padded", name)
        torch.testing.assert_close(found, expected, rtol=5e-2 if DEVICE == "cuda" else 1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "others"),
    [
        ("bloom", {"targets": ["query_key_value"]}),  # knows its places by the mask
        ("llama", {"trainer": {"neftune_noise_alpha": 5.0}}),  # noise by the length of the batch
        ("llama", {"trainer": {"pad_to_multiple_of": 8}}),
        ("llama", {"packing": True}),
    ],
    ids=["bloom", "noise", "multiple", "packed"],
)
def test_what_a_single_row_would_change_is_padded(family, others, run, made, uneven, tiny_model_dir):
    run(model=str(tiny_model_dir(family)), data=uneven, max_steps=1, bf16=DEVICE == "cuda", **others)
    assert not made[0].shapes


def test_rows_whose_state_would_run_on_are_padded(run, made, uneven, tmp_path):
    model = tiny_families.tiny_family("recurrent_gemma", tiny_families.families()["recurrent_gemma"])
    model.save_pretrained(tmp_path / "model")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "model")
    settings = {"targets": ["q_proj"], "max_steps": 1, "held_out": 0, "bf16": DEVICE == "cuda"}
    run(model=str(tmp_path / "model"), data=uneven, **settings)
    assert made[0].fast_notes
    assert not made[0].shapes


def test_what_fills_up_is_not_among_the_rows_of_a_bad_batch(run, made, uneven, tmp_path):
    with pytest.raises(TheodoraError, match="more than max_loss"):
        run(data=uneven, max_loss=0.01, **SETTINGS, bf16=DEVICE == "cuda")
    assert made[0].shapes
    told = [json.loads(line) for line in (tmp_path / "run" / "bad_batches.jsonl").read_text().splitlines()]
    assert len(told) == 5
    assert all(row["learned_text"] for row in told)


def test_a_batch_as_one_row():
    batch = flatten(Shape(16, 16), Shape(32, 16))(rows_of(5, 9, 3))
    assert batch["input_ids"].tolist() == [[*range(1, 6), *range(1, 10), *range(1, 4), *[0] * 15]]
    assert batch["position_ids"].tolist() == [[*range(5), *range(9), *range(3), *range(9), *range(6)]]
    learned = batch[LEARNED]
    assert learned["bounds"].tolist() == [0, 5, 14, 17, 32, 32]
    assert (learned["tokens"], learned["longest"], learned["packed"]) == (17, 15, True)
    assert [t for t in learned["targets"].tolist() if t != IGNORED] == [3, 4, 5, *range(3, 10), 3]
    assert len(learned["targets"]) == len(learned["positions"]) == 16
    labels, targets = batch["labels"][0], learned["targets"]
    for position, target in zip(learned["positions"], targets, strict=True):
        assert target == IGNORED or labels[position + 1] == target


def test_a_batch_that_fits_no_shape_stays_as_long_as_it_is():
    for shapes in ([Shape(16, 16)], [Shape(32, 8)], []):  # too many tokens, too many of them learned
        batch = flatten(*shapes)(rows_of(5, 9, 3))
        assert batch["input_ids"].shape == (1, 17)
        assert batch[LEARNED]["bounds"].tolist() == [0, 5, 14, 17, 17, 17]


def test_batches_of_one_shape_have_tensors_of_one_shape():
    collate = flatten(Shape(64, 32))
    batches = [collate(rows_of(*lengths)) for lengths in ((5, 9, 3, 8), (20, 14), (7, 7, 7, 7))]
    shapes = [
        [t.shape for t in (*batch.values(), *batch[LEARNED].values()) if isinstance(t, torch.Tensor)]
        for batch in batches
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def test_lengths_of_rows():
    lengths, learned = lengths_of(Dataset.from_list([*rows_of(5, 9), {"input_ids": [4, 5], "labels": [4, IGNORED]}]))
    assert (lengths.tolist(), learned.tolist()) == ([5, 9, 2], [3, 7, 0])


def test_shapes_are_as_many_as_pay():
    lengths = torch.arange(40, 400)
    learned = lengths // 3
    free, dear = (choose(lengths, learned, 8, costs) for costs in (FREE, Costs(token=1.0, shape=1e9, batches=1)))
    assert len(dear) == 1 < len(free)
    assert dear[-1].tokens == free[-1].tokens
    assert [s.tokens for s in free] == sorted({s.tokens for s in free})
    assert all(0 < s.learned <= s.tokens for s in free)
    longer = choose(lengths, learned, 8, Costs(token=1e-3, shape=1.0, batches=100_000))
    shorter = choose(lengths, learned, 8, Costs(token=1e-3, shape=1.0, batches=10))
    assert len(shorter) <= len(longer)
    assert choose(torch.tensor([7]), torch.tensor([5]), 8, FREE) == [Shape(64, 64)]


@pytest.mark.parametrize(("dear", "expected"), [(10, [64, 128, 640]), (100, [128, 640]), (1000, [640])])
def test_the_shapes_that_cost_least(dear, expected):
    """Tokens per batch: 0.3 · 512 without 128, 0.5 · 64 without 64, 0.5 · 576 + 0.3 · 512 with 640 alone."""
    lengths = torch.tensor([64] * 5 + [128] * 3 + [640] * 2)
    found = choose(lengths, lengths, 1, Costs(token=1.0, shape=dear * 100.0, batches=100))
    assert [shape.tokens for shape in found] == expected
