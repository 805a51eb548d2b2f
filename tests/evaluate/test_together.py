"""Answers from the batches that serve are those of `generate`, and what they cannot answer it does."""

import logging

import pytest
import torch
from datasets import Dataset

from serving import trained
from theodora.data import Examples
from theodora.evaluate import evaluate
from theodora.evaluate.exact_match import answers
from theodora.serve import offline
from tiny import tiny_model

PROMPTS = [[n % 250 + 3 for n in range(start, start + length)] for start, length in ((5, 3), (90, 21), (9, 8), (60, 2))]


@pytest.fixture
def on_cpu(monkeypatch):
    """Answer together on a CPU, too; what was answered so."""
    asked = []
    together = offline.answer_together

    def counted(model, prompts, *args, **options):
        tokens = together(model, prompts, *args, **options)
        asked.append(len(prompts))
        return tokens

    monkeypatch.setattr(offline, "answer_together", counted)
    monkeypatch.setattr(offline, "DEVICES", {"cpu"})
    return asked


@torch.no_grad()
def both(model, tokenizer, monkeypatch, prompts=PROMPTS, **options):
    """By generate, then together."""
    options = {"max_new_tokens": 16, "first_line_only": False} | options
    with monkeypatch.context() as patched:
        patched.setattr(offline, "DEVICES", set())
        expected = answers(model, tokenizer, prompts, **options)
    return expected, answers(model, tokenizer, prompts, **options)


def test_on_a_cpu_generate_answers(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(offline, "answer_together", None)
    assert len(answers(tiny_model(), tiny_tokenizer, PROMPTS, max_new_tokens=2, first_line_only=False)) == 4


@pytest.mark.parametrize("first_line_only", [False, True])
def test_answers_are_those_of_generate(first_line_only, tiny_tokenizer, on_cpu, monkeypatch):
    model = trained(tiny_model("qwen2"), "dora4").eval()
    expected, given = both(model, tiny_tokenizer, monkeypatch, first_line_only=first_line_only)
    assert given == expected
    only_if = [expected[0], "@", expected[2][:3], expected[3]]
    broken_off, given = both(
        model, tiny_tokenizer, monkeypatch, first_line_only=first_line_only, only_if=only_if, batch_size=3
    )
    assert given == broken_off != expected
    assert (given[0], given[3]) == (expected[0], expected[3])
    assert on_cpu == [4, 4]


def test_a_row_that_is_too_long_for_a_batch_is_left_to_generate(tiny_tokenizer, on_cpu, monkeypatch):
    model = tiny_model(max_position_embeddings=32)
    told = []
    expected, given = both(model, tiny_tokenizer, monkeypatch, advance=told.append)
    assert given == expected
    assert on_cpu == [3]
    assert sum(told) == 8


@pytest.mark.parametrize("late", [False, True])
def test_who_cannot_answer_together_falls_back(late, tiny_tokenizer, on_cpu, monkeypatch, caplog):
    model = tiny_model("llama" if late else "bloom")
    if late:  # in the middle

        def failing(*args, over, **options):
            over()
            raise offline.Unfit("no memory")

        monkeypatch.setattr(offline, "answer_together", failing)
    told = []
    with caplog.at_level(logging.INFO, "theodora.evaluate"):
        expected, given = both(model, tiny_tokenizer, monkeypatch, advance=told.append)
    assert given == expected
    assert on_cpu == []
    assert sum(told) == 8
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "padded batches: " in caplog.text


def test_scores_are_the_same(tiny_tokenizer, on_cpu, monkeypatch):
    rows = [{"prompt": "a" * n, "completion": "ja" * n} for n in (1, 4, 2)]
    examples = Examples(Dataset.from_list(rows), "prompt-completion", "rows")
    model = trained(tiny_model("gpt2"), "lora8")  # in training mode
    model.train()
    options = {"max_new_tokens": 8, "f1": True, "metrics": {"length": lambda answer, reference: len(answer)}}
    together = evaluate(model, tiny_tokenizer, examples, **options)
    assert on_cpu == [3]
    assert model.training
    monkeypatch.setattr(offline, "DEVICES", set())
    alone = evaluate(model, tiny_tokenizer, examples, **options)
    assert together.metrics == alone.metrics
    assert (together.exact_match, together.token_f1, together.loss) == (alone.exact_match, alone.token_f1, alone.loss)
