import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from theodora.adapters import inject_adapter
from theodora.adapters.state import trained_tensors
from theodora.config import AdapterConfig
from theodora.data import Examples, encode_prompt, tokenize
from theodora.errors import DataError
from theodora.evaluate import evaluate, text_loss
from theodora.evaluate import scores as scores_module
from theodora.evaluate.batches import batches_by_length, pad, rows_together
from theodora.evaluate.decoding import decoding, end_tokens
from theodora.evaluate.loss import row_losses
from theodora.layers import norm_cache
from tiny import FAMILIES

ROWS = [
    {"prompt": "a", "completion": "yes"},
    {"prompt": "a much longer question", "completion": "no, and at length"},
    {"prompt": "b?", "completion": "é"},
    {"prompt": "what", "completion": "two\nlines"},
    {"prompt": "x" * 40, "completion": "maybe"},
]


def examples_of(rows, format="prompt-completion"):
    return Examples(Dataset.from_list(rows), format, "rows")


def plain_loss(model, dataset):
    """One row at a time, all logits in float64: what the batched loss must equal."""
    total, count = 0.0, 0
    for row in dataset:
        ids = torch.tensor([row["input_ids"]])
        targets = torch.tensor(row["labels"])[1:]
        logits = model(input_ids=ids).logits[0, :-1].double()
        total += float(F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").detach())
        count += int((targets != -100).sum())
    return total / count, count


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_loss_equals_one_row_at_a_time(family, batch_size, tiny_model, tiny_tokenizer):
    model = tiny_model(family)
    examples = examples_of(ROWS)
    expected, count = plain_loss(model, tokenize(examples, tiny_tokenizer, max_length=512))
    scores = evaluate(model, tiny_tokenizer, examples, batch_size=batch_size, exact_match=False)
    assert scores.loss == pytest.approx(expected, rel=1e-5)
    assert (scores.tokens, scores.rows, scores.exact_match) == (count, len(ROWS), None)
    assert scores.perplexity == pytest.approx(math.exp(expected), rel=1e-4)


def test_text_loss_covers_every_token(tiny_model, tiny_tokenizer):
    model = tiny_model("llama")
    texts = ["one text", "another, rather longer text", "x" * 300]
    expected, count = plain_loss(
        model, tokenize(examples_of([{"text": t} for t in texts], "text"), tiny_tokenizer, max_length=512)
    )
    scores = text_loss(model, tiny_tokenizer, texts, batch_size=2)
    assert scores.loss == pytest.approx(expected, rel=1e-5)
    assert (scores.tokens, scores.exact_match) == (count, None)


def test_a_model_without_logits_to_keep_is_scored_too(tiny_model, tiny_tokenizer, monkeypatch):
    model = tiny_model("llama")
    examples = examples_of(ROWS)
    expected = evaluate(model, tiny_tokenizer, examples, exact_match=False).loss
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids: forward(input_ids=input_ids))
    assert evaluate(model, tiny_tokenizer, examples, exact_match=False).loss == pytest.approx(expected, rel=1e-6)


def _speak_ascii(model):
    """Keep a random model from stringing together bytes that are no UTF-8: its answers could not be written down."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[3 + 94 :] = 0  # after the special tokens and the printable ASCII bytes
        if head.bias is not None:
            head.bias[3 + 94 :] = -10


def greedy_answer(model, tokenizer, row, tokens=12, use_chat_template=None):
    """What the model answers to one prompt alone, without padding or early stops."""
    prompt = torch.tensor([encode_prompt(row, tokenizer, use_chat_template)])
    ends = end_tokens(model, tokenizer)
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=decoding(ends, tokens))
    return tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_match_counts_what_the_model_says_alone(family, tiny_model, tiny_tokenizer):
    model = tiny_model(family)
    _speak_ascii(model)
    # The random model's own answers are the references of the first three rows.
    answers = [greedy_answer(model, tiny_tokenizer, row) for row in ROWS]
    rows = [{**row, "completion": answer} for row, answer in zip(ROWS[:3], answers[:3], strict=True)] + ROWS[3:]
    right = sum(answer.strip() == row["completion"].strip() for answer, row in zip(answers, rows, strict=True))
    assert right == 3
    scores = evaluate(model, tiny_tokenizer, examples_of(rows), batch_size=2, max_new_tokens=12)
    assert scores.exact_match == pytest.approx(3 / 5)


def test_without_a_template_the_answer_is_the_first_line(tiny_model, tiny_tokenizer):
    rows = [{"prompt": "q: ", "completion": "fine"}]
    model = tiny_model("llama")
    _say(model, tiny_tokenizer, "\n fine \nand more")
    assert evaluate(model, tiny_tokenizer, examples_of(rows), use_chat_template=False).exact_match == 1.0
    # In a conversation the whole turn is the answer.
    assert evaluate(model, tiny_tokenizer, examples_of(rows)).exact_match == 0.0


def test_blanks_around_an_answer_do_not_count(tiny_model, tiny_tokenizer):
    model = tiny_model("llama")
    _say(model, tiny_tokenizer, "  two\nlines \n<|im_end|>")
    assert (
        evaluate(model, tiny_tokenizer, examples_of([{"prompt": "q", "completion": "two\nlines"}])).exact_match == 1.0
    )


def test_half_a_character_is_no_mismatch(tiny_model, tiny_tokenizer):
    model = tiny_model("llama")
    _say(model, tiny_tokenizer, "日本<|im_end|>")
    assert evaluate(model, tiny_tokenizer, examples_of([{"prompt": "q", "completion": "日本"}])).exact_match == 1.0


def _say(model, tokenizer, text):
    """Make `model` generate the tokens of `text`, whatever it is asked."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    def generate(input_ids, stopping_criteria, generation_config, **kwargs):
        for token in ids:
            input_ids = torch.cat([input_ids, torch.full((len(input_ids), 1), token)], dim=1)
            if bool(stopping_criteria(input_ids, None).all()):
                break
        return input_ids

    model.generate = generate


def test_settings_of_the_model_do_not_change_greedy_decoding(tiny_model, tiny_tokenizer):
    model = tiny_model("llama")
    answer = greedy_answer(model, tiny_tokenizer, ROWS[0])
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, top_k=3)
    model.config.use_cache = False
    assert greedy_answer(model, tiny_tokenizer, ROWS[0]) == answer


def test_the_model_is_left_as_it_was(tiny_model, tiny_tokenizer):
    model = tiny_model("llama").train()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    evaluate(model, tiny_tokenizer, examples_of(ROWS), max_new_tokens=20)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_answers_longer_than_asked_for_are_said(tiny_model, tiny_tokenizer):
    with pytest.warns(UserWarning, match=r"2 of 5 reference answers are longer than max_new_tokens \(6\).*has 17"):
        evaluate(tiny_model("llama"), tiny_tokenizer, examples_of(ROWS), max_new_tokens=6)


def test_nothing_to_predict_is_an_error(tiny_model, tiny_tokenizer):
    with pytest.raises(DataError):
        text_loss(tiny_model("llama"), tiny_tokenizer, [])


def test_batches_are_sorted_and_bounded():
    lengths = [5, 100, 7, 50, 50, 200]
    assert list(batches_by_length(lengths, 2)) == [[5, 1], [3, 4], [2, 0]]
    assert list(batches_by_length(lengths, 16, max_tokens=200)) == [[5], [1, 3], [4, 2, 0]]
    assert list(batches_by_length([], 4)) == []


def test_padding_on_both_sides():
    assert pad([[1, 2], [3]], 0).tolist() == [[1, 2], [3, 0]]
    assert pad([[1, 2], [3]], 9, left=True).tolist() == [[1, 2], [9, 3]]


def test_as_many_rows_go_together_on_a_gpu_as_have_so_many_logits(tiny_model):
    model = tiny_model()
    assert rows_together(model) == 16
    on_gpu = SimpleNamespace(device=torch.device("cuda"), config=model.config)
    together = rows_together(on_gpu)
    vocabulary = model.config.vocab_size
    assert together(100) == 2**29 // (vocabulary * 100)
    assert together(2**29) == 16
    lengths = [2**29, *[100] * 300]
    assert [len(batch) for batch in batches_by_length(lengths, together)] == [1, 163, 137]  # 16,384 tokens at most


def test_what_memory_does_not_hold_together_is_scored_in_halves(tiny_model, tiny_tokenizer, monkeypatch):
    model, rows = tiny_model(), examples_of(ROWS * 8)
    expected = evaluate(model, tiny_tokenizer, rows, exact_match=False)
    sizes = []

    def losses(model, ids, labels):
        sizes.append(len(ids))
        if len(ids) > 20:
            raise torch.OutOfMemoryError
        return row_losses(model, ids, labels)

    monkeypatch.setattr(scores_module, "row_losses", losses)
    monkeypatch.setattr(scores_module, "rows_together", lambda model: lambda length: 64)
    scores = evaluate(model, tiny_tokenizer, rows, exact_match=False)
    assert sizes == [40, 20, 20]
    assert scores.loss == pytest.approx(expected.loss, rel=1e-6)
    assert scores.tokens == expected.tokens

    monkeypatch.setattr(scores_module, "USUAL_ROWS", 64)
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(model, tiny_tokenizer, rows, batch_size=32, exact_match=False)


def test_weights_are_looked_at_once_for_all_batches(tiny_model, tiny_tokenizer, monkeypatch):
    """Each look waits for a GPU, and there are some at each layer."""
    model, look, looks = inject_adapter(tiny_model(), AdapterConfig(rank=2)), norm_cache.content, []
    monkeypatch.setattr(norm_cache, "content", lambda *tensors: looks.append(1) or look(*tensors))
    counts = []
    for rows in (ROWS, ROWS * 2, ROWS * 4):
        looks.clear()
        evaluate(model, tiny_tokenizer, examples_of(rows), batch_size=2, exact_match=False)
        counts.append(len(looks))
    assert counts[1] == counts[2] > 0
    next(iter(trained_tensors(model).values())).data.mul_(2)  # which the next evaluation sees
    looks.clear()
    evaluate(model, tiny_tokenizer, examples_of(ROWS), exact_match=False)
    assert looks
