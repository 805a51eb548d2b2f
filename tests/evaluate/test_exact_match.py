"""A model that answers exactly what it was taught scores 100 %, whatever the template makes of the answer."""

import json

import pytest
import torch
from datasets import Dataset

from chat_shapes import ONE, RESULT, SHAPES, TRL_TEMPLATES, USER, answer, tokenizer_for, tools_for
from theodora.data import Examples, expected_answer, load_examples, tokenize
from theodora.evaluate import evaluate
from theodora.evaluate.exact_match import answers
from theodora.evaluate.labels import choices, labels_of

# A template, and the tokens that end its turns.
ENDS = {
    "qwen2_5": ["<|im_end|>"],
    "qwen3": ["<|im_end|>"],
    "qwen3_5_think": ["<|im_end|>"],
    "qwen3_8": ["<|im_end|>"],
    "llama3_1": ["<|eot_id|>"],
    "gptoss": ["<|return|>", "<|call|>"],
    "gemma4_v5": ["<turn|>", "<|tool_response>"],
    "glm4moe": ["</s>", "<|user|>", "<|observation|>"],
    "phi3": ["<|end|>", "</s>"],
    "cohere2": ["<|END_OF_TURN_TOKEN|>"],
}
COMPLETIONS = {  # the answer to a prompt is the first turn of a completion of several
    "completion": ([USER], [answer("Let me look.", calls=[ONE]), RESULT, answer("Four.")]),
    "reasoned completion": ([USER], [answer("Blue.", reasoning="Hm one.")]),
    "completion that begins with another's turn": ([USER, answer("", calls=[ONE])], [RESULT, answer("Four.")]),
}


def rows_of(shape):
    tools = {"tools": tools} if (tools := tools_for(shape)) else {}
    if shape in COMPLETIONS:
        prompt, completion = COMPLETIONS[shape]
        return [{"prompt": prompt, "completion": completion, **tools}]
    return [{"messages": SHAPES[shape], **tools}]


def speak_as_taught(model, tokenizer, examples, spoil=lambda tokens: tokens):
    """Make `generate` go on as the rows do, as a model does that has learned them by heart."""
    taught = [row["input_ids"] for row in tokenize(examples, tokenizer, max_length=9999)]

    def generate(input_ids, attention_mask, generation_config, stopping_criteria):
        rows = []
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            prompt = [token for token, kept in zip(ids, mask, strict=True) if kept]
            (row,) = (row for row in taught if row[: len(prompt)] == prompt)
            rows.append(spoil([*row[len(prompt) :]]))
        done, output = torch.zeros(len(rows), dtype=torch.bool), input_ids
        for step in range(generation_config.max_new_tokens):
            pad = generation_config.pad_token_id
            following = [pad if over else row[step] for row, over in zip(rows, done.tolist(), strict=True)]
            output = torch.cat([output, torch.tensor(following)[:, None]], dim=1)
            done |= stopping_criteria(output, None)
            if done.all():
                break
        return output

    model.generate = generate


def asked(family, shape, tiny_model, write_rows):
    tokenizer = tokenizer_for(TRL_TEMPLATES[family].read_text(encoding="utf-8"))
    tokenizer.eos_token = ENDS[family][0]
    examples = load_examples(write_rows(rows_of(shape)))
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(end) for end in ENDS[family]]
    return model, tokenizer, examples


@pytest.fixture
def write_rows(tmp_path):
    def write(rows):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("shape", ["text", "reasoning", "thought", "last call", "text+call", "all", *COMPLETIONS])
@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "qwen3_5_think", "qwen3_8", "gemma4_v5", "glm4moe"])
def test_who_answers_as_taught_scores_all(family, shape, tiny_model, write_rows):
    model, tokenizer, examples = asked(family, shape, tiny_model, write_rows)
    speak_as_taught(model, tokenizer, examples)
    assert evaluate(model, tokenizer, examples, max_new_tokens=200, max_length=4096).exact_match == 1.0


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("gptoss", "reasoning"),
        ("gptoss", "last call"),
        ("llama3_1", "last call"),
        ("phi3", "text"),
        ("cohere2", "text"),
    ],
)
def test_so_it_does_with_other_ends_of_turn(family, shape, tiny_model, write_rows):
    model, tokenizer, examples = asked(family, shape, tiny_model, write_rows)
    speak_as_taught(model, tokenizer, examples)
    assert evaluate(model, tokenizer, examples, max_new_tokens=200, max_length=4096).exact_match == 1.0


@pytest.mark.parametrize("shape", ["reasoning", "last call"])
def test_who_reasons_or_calls_otherwise_scores_nothing(shape, tiny_model, write_rows):
    model, tokenizer, examples = asked("qwen3", shape, tiny_model, write_rows)
    other = tokenizer.convert_tokens_to_ids("x")
    speak_as_taught(model, tokenizer, examples, lambda tokens: [*tokens[:4], other, *tokens[5:]])
    assert evaluate(model, tokenizer, examples, max_new_tokens=200, max_length=4096).exact_match == 0.0


def test_what_is_expected_is_what_the_template_makes_of_the_answer(write_rows):
    tokenizer = tokenizer_for(TRL_TEMPLATES["qwen3"].read_text(encoding="utf-8"))
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "n": 4}}\n</tool_call>'
    expected = {
        "text": "<think>\n\n</think>\n\nRed.",
        "reasoning": "<think>\nHm two.\n</think>\n\nRed.",
        "last call": f"<think>\n\n</think>\n\n{call}",
        # Not the last turn of its row, so the template writes it without an empty <think>.
        "completion": f"Let me look.\n{call}",
    }
    for shape, text in expected.items():
        (row,) = load_examples(write_rows(rows_of(shape))).dataset
        assert expected_answer(row, tokenizer) == text
        assert expected_answer({"prompt": "a", "completion": " b"}, tokenizer, use_chat_template=False) == " b"


def test_the_turn_asked_for_is_one_that_is_learned(tiny_model, write_rows):
    messages = [*SHAPES["text"][:2], USER, {**answer("Not this."), "weight": 0}]
    tokenizer = tokenizer_for(TRL_TEMPLATES["qwen2_5"].read_text(encoding="utf-8"))
    (row,) = load_examples(write_rows([{"messages": messages}])).dataset
    assert expected_answer(row, tokenizer) == "Blue."


def test_labels_stand_behind_reasoning_and_before_later_turns():
    rows = [
        {"prompt": [USER], "completion": [answer(f"<think>\nHm.\n</think>\n\n{label}"), USER, answer("Bye.")]}
        for label in ("Blue", "Red")
    ]
    examples = Examples(Dataset.from_list(rows), "prompt-completion", "rows")
    assert labels_of(examples) == ["Blue", "Red"]
    tokenizer = tokenizer_for(TRL_TEMPLATES["qwen3"].read_text(encoding="utf-8"))
    tokenizer.eos_token = "<|im_end|>"
    for question, label in zip(
        choices(examples, tokenizer, ["Blue", "Red"], max_length=500), ("Blue", "Red"), strict=True
    ):
        assert tokenizer.decode(question.endings[question.right]) == f"{label}<|im_end|>"
        assert tokenizer.decode(question.prefix).endswith("<think>\nHm.\n</think>\n\n")


def test_the_head_reads_one_piece(tiny_model, tiny_tokenizer, monkeypatch):
    # With gaps in its input, torch copies a frozen weight once for each row.
    model = tiny_model("llama").requires_grad_(False)
    head, seen = model.get_output_embeddings(), []
    product = head.forward
    monkeypatch.setattr(head, "forward", lambda x: seen.append(x.is_contiguous()) or product(x))
    prompts = [[5, 6, 7], [8, 9]]
    given = answers(model, tiny_tokenizer, prompts, max_new_tokens=2, first_line_only=False)
    assert len(given) == 2
    assert seen
    assert all(seen)
    assert not head._forward_pre_hooks
