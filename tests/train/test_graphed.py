"""A run whose steps are CUDA graphs is the run without them, bit for bit (here with a recorder in CUDA's place)."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import masking_utils, modeling_utils
from trl.trainer.sft_trainer import SFTTrainer

from formula import DEVICE
from theodora.data.packing import packed_batch
from theodora.fastpath import packed_attention
from theodora.fastpath.masks import packed_rows, whole_rows
from theodora.train import trainer_passes
from theodora.train.fused_loss import fill_up
from theodora.train.graphed import draws_at_random, reads_bounds
from theodora.train.packed_rows import attention_by_bounds, takes_bounds

# Each shape runs without a graph before it is captured, and packed rows have several.
PACKED = {"packing": True, "max_length": 96, "max_steps": 12}
SETTINGS = {"train_on": "all", "max_length": 12, "held_out": 6, "max_steps": 8, "save_steps": 5, "eval_steps": 4}


@pytest.fixture
def same_rows(tmp_path):
    """Rows of one length, but for some."""
    rows = [{"text": f"{a} + {b:02} = {a + b:02}" + " "[: b % 7 == 0]} for a in range(8) for b in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def same(one, other, losses):
    for name in ("loss", "eval_loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm", "learning_rate"):
        assert losses(one, name) == losses(other, name), name
        assert losses(one, name), name
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"gradient_accumulation_steps": 3, "logging_steps": 2, "max_steps": 5},
        {"dropout": 0.2, "method": "lora"},
        {"gradient_checkpointing": True},
        {"train_on": "completion", "data": None, "max_length": 64},
        PACKED,
        {**PACKED, "gradient_checkpointing": True},
        {"packing": True, "max_length": 24, "trainer": {"packing_strategy": "wrapped"}},
    ],
    ids=["", "accumulated", "dropout", "recomputed", "few learned", "packed", "packed and recomputed", "wrapped"],
)
def test_a_graphed_run_is_the_plain_run(others, run, made, same_rows, sums, tmp_path, losses, monkeypatch):
    if "dropout" in others and torch.cuda.is_available():
        pytest.skip("a CUDA graph draws random numbers of its own: the runs drop other values")
    settings = {**SETTINGS, "data": same_rows, **others}
    settings["data"] = settings["data"] or str(sums)
    run(output=str(tmp_path / "graphed"), **settings)
    monkeypatch.setattr(trainer_passes, "graph_inputs", lambda *_: None)
    run(output=str(tmp_path / "plain"), **settings)
    assert made[0].why_no_graph is None
    assert made[0].steps.replays >= 3
    assert made[0].steps.why_not == "training has ended"
    assert not made[1].steps.replays
    same(tmp_path / "graphed", tmp_path / "plain", losses)


def test_resumed_equals_uninterrupted(run, made, same_rows, tmp_path, losses):
    settings = {**SETTINGS, "max_steps": 10, "data": same_rows, "lr_scheduler_type": "constant"}
    run(output=str(tmp_path / "whole"), **settings)
    run(output=str(tmp_path / "parts"), **settings | {"max_steps": 5})
    run(output=str(tmp_path / "parts"), **settings, resume="auto")
    assert made[-1].steps.replays
    for name in ("loss", "grad_norm", "num_tokens"):
        assert losses(tmp_path / "parts", name) == losses(tmp_path / "whole", name), name


def test_what_cannot_be_a_graph_says_why(run, made):
    run(trainer={"torch_empty_cache_steps": 1})
    assert made[0].why_no_graph == "torch_empty_cache_steps"
    run(kernels="reference", overwrite=True)
    assert "TRL's loss" in made[1].why_no_graph
    assert [t.steps for t in made] == [None, None]


def test_packed_rows_are_filled_up_without_a_trace(run, made, same_rows, tmp_path, losses, monkeypatch):
    settings = {**SETTINGS, "data": same_rows, "packing": True, "max_length": 101, "per_device_train_batch_size": 2}
    run(output=str(tmp_path / "filled"), **settings)
    filled, trained = made[0].data_collator.full, made[0].steps.replays
    monkeypatch.setattr(trainer_passes, "reads_bounds", lambda model: True)
    run(output=str(tmp_path / "as they are"), **settings)
    assert (filled, made[1].data_collator.full) == (101, None)
    assert [t.sends_bounds for t in made] == [DEVICE == "cpu", False]  # flash attention does not take float32
    assert trained
    assert not made[1].steps.replays
    assert losses(tmp_path / "filled", "num_tokens") == losses(tmp_path / "as they are", "num_tokens")
    for name in ("loss", "eval_loss", "entropy", "mean_token_accuracy"):
        found, expected = losses(tmp_path / "filled", name), losses(tmp_path / "as they are", name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bounds_say_what_masks_say(checkpointing, run, made, same_rows, tmp_path, losses, monkeypatch):
    settings = {**SETTINGS, "data": same_rows, "packing": True, "max_length": 101, "per_device_train_batch_size": 2}
    settings |= {"gradient_checkpointing": checkpointing, "bf16": torch.cuda.is_available()}
    calls = []
    attention = packed_attention.attention_apart
    monkeypatch.setattr(packed_attention, "attention_apart", lambda *args: calls.append(args) or attention(*args))
    run(output=str(tmp_path / "bounds"), **settings)
    assert made[0].sends_bounds
    assert calls
    monkeypatch.setattr(trainer_passes, "takes_bounds", lambda *_: False)
    calls.clear()
    run(output=str(tmp_path / "masks"), **settings)
    assert not calls
    for name in ("loss", "eval_loss", "entropy", "mean_token_accuracy", "num_tokens"):
        found, expected = losses(tmp_path / "bounds", name), losses(tmp_path / "masks", name)
        torch.testing.assert_close(found, expected, rtol=5e-2 if settings["bf16"] else 1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma", "phi3", "gpt2"])
def test_models_that_take_bounds(family, tiny_model):
    model = tiny_model(family).to(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    assert takes_bounds(model, 64)
    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    assert masks is masking_utils.sdpa_mask
    model.config.sliding_window = 16
    assert not takes_bounds(model, 64)
    assert not takes_bounds(model, None)
    assert takes_bounds(model, 16)
    model.config._attn_implementation = "eager"
    assert not takes_bounds(model, 16)


def test_masks_are_built_again_afterwards(tiny_model):
    found = [masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]]
    with attention_by_bounds():
        with pytest.raises(ZeroDivisionError), attention_by_bounds():
            1 / 0  # noqa: B018
        found.append(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        with pytest.raises(RuntimeError, match="not told where its sequences begin"):
            tiny_model()(torch.arange(3, 9)[None])
    found.append(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    assert found[0] is found[2] is not found[1]
    tiny_model()(torch.arange(3, 9)[None])


def test_a_model_that_bounds_do_not_reach_keeps_its_masks(tiny_model, monkeypatch):
    model = tiny_model().to(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    layer = type(model.model.layers[0])
    forward = layer.forward
    monkeypatch.setattr(
        layer, "forward", lambda self, *args, theodora_sequences=None, **kwargs: forward(self, *args, **kwargs)
    )
    assert not takes_bounds(model, 64)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)  # nor where the difference does not show
    assert not takes_bounds(model, 64)


def test_filling_up_keeps_a_batch_of_one_kind():
    batch = packed_batch([torch.arange(3, 14), torch.arange(5, 14)]) | {"labels": torch.ones(1, 20).long()}
    whole = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    fill_up(batch, 21)
    expected = packed_batch([torch.arange(3, 14), torch.arange(5, 14), torch.zeros(1).long()])
    assert all(torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(expected[name])) for name in expected)
    assert batch["labels"].tolist() == [[1] * 20 + [-100]]
    fill_up(whole, 30)
    assert whole["input_ids"].shape == (1, 20)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "phi"])
def test_positions_say_it_all_to_attention(family, tiny_model):
    model = tiny_model(family)
    assert not reads_bounds(model)
    model.config._attn_implementation = "flash_attention_2"
    assert reads_bounds(model)


@pytest.mark.parametrize("lengths", [(10, 9), (19,)])
def test_what_the_host_knows_of_packed_rows_changes_nothing(lengths, tiny_model):
    model = tiny_model()
    batch = packed_batch([torch.randint(3, 200, (n,)) for n in lengths])
    with torch.no_grad():
        expected = model(**batch).logits
        with packed_rows() if len(lengths) > 1 else whole_rows():
            assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("rows", [packed_rows, whole_rows])
def test_no_model_looks_at_its_tokens_for_padding(rows, tiny_model, monkeypatch):
    model, said = tiny_model("gpt2"), []
    monkeypatch.setattr(modeling_utils.logger, "warning_once", said.append)
    batch = {"input_ids": torch.full((1, 4), model.config.pad_token_id), "position_ids": torch.arange(4)[None]}
    with torch.no_grad(), rows():
        model(**batch)
    assert not said
    with torch.no_grad():
        model(**batch)
    assert said


def test_random_states_are_kept_for_those_who_draw(run, tiny_model):
    def kept(**options):
        model = run(gradient_checkpointing=True, overwrite=True, **options).model
        return model.model.layers[0]._gradient_checkpointing_func.keywords.get("preserve_rng_state", True)

    assert not kept()
    assert kept(dropout=0.1)
    assert not draws_at_random(tiny_model("gpt2"))
    assert draws_at_random(tiny_model("gpt2", resid_pdrop=0.1))
    assert draws_at_random(tiny_model("llama", attention_dropout=0.1))


def test_graphs_make_room_for_an_evaluation(run, made, same_rows, tmp_path, losses, monkeypatch):
    settings = {**SETTINGS, "data": same_rows}
    run(output=str(tmp_path / "roomy"), **settings)
    predict, full = SFTTrainer.prediction_step, iter([True])

    def short_of_memory(self, *args):
        found = predict(self, *args)
        if self._graphed is not None and self._graphed.replays and next(full, False):
            raise torch.OutOfMemoryError("out of memory")
        return found

    monkeypatch.setattr(SFTTrainer, "prediction_step", short_of_memory)
    run(output=str(tmp_path / "tight"), **settings)
    assert made[1].why_no_graph == "evaluation needs the memory"
    assert 0 < made[1].graph_replays < made[0].graph_replays
    for name in ("loss", "eval_loss"):
        assert losses(tmp_path / "tight", name) == losses(tmp_path / "roomy", name)
