"""The likeliest of several labels: the search with a cache finds what scoring every label in full finds."""

import pytest
import torch
from datasets import Dataset

from theodora.data import Examples, tokenize
from theodora.errors import DataError
from theodora.evaluate import evaluate
from theodora.evaluate import labels as module
from theodora.evaluate.labels import choices, choose, labels_of
from tiny import FAMILIES

LABELS = ["a", "ab", "abc", "beta", "betb", "c and c"]
ROWS = [{"prompt": "x" * n, "completion": LABELS[n % len(LABELS)]} for n in (1, 17, 30, 5, 64, 9, 2)]


def examples_of(rows, format="prompt-completion"):
    return Examples(Dataset.from_list(rows), format, "rows")


def score_alone(model, tokenizer, row, label):
    """log p of the whole answer, one row at a time, in float64."""
    (encoded,) = tokenize(examples_of([{**row, "completion": label}]), tokenizer, max_length=512)
    ids, marks = torch.tensor([encoded["input_ids"]]), torch.tensor(encoded["labels"])
    log_probs = model(ids).logits[0, :-1].double().log_softmax(-1)
    learned = marks[1:] != -100
    return float(log_probs[learned].gather(1, ids[0, 1:][learned][:, None]).sum().detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_search_finds_what_scoring_all_labels_finds(family, tiny_model, tiny_tokenizer, monkeypatch):
    model = tiny_model(family)
    asked = choices(examples_of(ROWS), tiny_tokenizer, LABELS, max_length=512)
    expected = [
        max(range(len(LABELS)), key=lambda i: score_alone(model, tiny_tokenizer, row, LABELS[i])) for row in ROWS
    ]
    used = []
    search = module.LabelSearch.run
    monkeypatch.setattr(module.LabelSearch, "run", lambda self: used.append(1) or search(self))
    with torch.inference_mode():
        for size in (1, 3, 16):
            found = {
                i: label for batch, labels in choose(model, asked, size) for i, label in zip(batch, labels, strict=True)
            }
            assert [found[i] for i in range(len(ROWS))] == expected
        assert used  # not the way around for models without a cache
        full = [max(range(len(LABELS)), key=scores.__getitem__) for scores in module.score_in_full(model, asked)]
    assert full == expected


def test_a_model_whose_cache_gives_something_else_is_scored_in_full(tiny_model, tiny_tokenizer, monkeypatch):
    model = tiny_model()
    asked = choices(examples_of(ROWS), tiny_tokenizer, LABELS, max_length=512)
    with torch.inference_mode():
        expected = [found for _, found in choose(model, asked, 16)]
    run = module.LabelSearch.run

    def wrong(self):
        found = [(label + 1) % len(LABELS) for label in run(self)]
        self.score = [{**scores, label: 0.0} for scores, label in zip(self.score, found, strict=True)]
        return found

    monkeypatch.setattr(module.LabelSearch, "run", wrong)
    with torch.inference_mode():
        assert [found for _, found in choose(model, asked, 16)] == expected


def test_accuracy_counts_the_rows_whose_label_is_likeliest(tiny_model, tiny_tokenizer):
    model = tiny_model()
    rows = [
        {**row, "completion": max(LABELS, key=lambda label: score_alone(model, tiny_tokenizer, row, label))}
        for row in ROWS
    ]
    wrong = {**rows[0], "completion": next(label for label in LABELS if label != rows[0]["completion"])}
    scores = evaluate(model, tiny_tokenizer, examples_of([*rows, wrong]), labels=LABELS, exact_match=False)
    assert scores.label_accuracy == pytest.approx(len(rows) / (len(rows) + 1))
    messages = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in [*rows, wrong]
    ]
    again = evaluate(model, tiny_tokenizer, examples_of(messages, "messages"), labels=LABELS, exact_match=False)
    assert again.label_accuracy == scores.label_accuracy


def test_without_a_template_prompt_and_label_are_joined_as_they_stand(tiny_model, tiny_tokenizer):
    rows = [{"prompt": "q:", "completion": " a"}, {"prompt": "r:", "completion": " beta"}]
    asked = choices(examples_of(rows), tiny_tokenizer, ["a", "beta"], max_length=512, use_chat_template=False)
    ids = asked[1].prefix + asked[1].endings[1]
    assert tiny_tokenizer.decode(ids) == "r: beta<|im_end|>"
    assert [choice.right for choice in asked] == [0, 1]


def test_what_is_no_choice_is_an_error(tiny_tokenizer):
    rows = [{"prompt": "q", "completion": c} for c in ("a", "beta", "abc")]
    with pytest.raises(DataError, match="2 answers are none of the 2 labels: abc, beta"):
        choices(examples_of(rows), tiny_tokenizer, ["a", "b"], max_length=512)
    with pytest.raises(DataError, match="plain text, which has no labels"):
        labels_of(examples_of([{"text": "t"}], "text"))
    with pytest.raises(DataError, match="1 different answers"):
        labels_of(examples_of([{"prompt": "q", "completion": "a"}] * 3))
    with pytest.raises(DataError, match="longer than max_length=90"):
        choices(examples_of(ROWS), tiny_tokenizer, LABELS, max_length=90)
