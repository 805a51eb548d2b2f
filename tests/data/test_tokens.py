"""Which tokens are trained, for the chat templates and tokenizers that models have."""

import pytest

from theodora.data import (
    encode_prompt,
    expected_answer,
    load_examples,
    prompts,
    reference_answer,
    render_prompt,
    tokenize,
)
from theodora.data.chat import ChatRenderer
from theodora.data.prompts import encode_prompts, expected_answers
from theodora.errors import ConfigError, DataError

TALK = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue é🙂."},
    {"role": "user", "content": "Another one?"},
    {"role": "assistant", "content": "Red."},
]
SYSTEM = {"role": "system", "content": "You answer in one word."}
THOUGHT = [
    TALK[0],
    {"role": "assistant", "content": "<think>\nSky.\n</think>\n\nBlue."},
    TALK[2],
    {"role": "assistant", "content": "<think>\nRose.\n</think>\n\nRed."},
]

# What is learned of TALK: each assistant turn with the token that ends it, and nothing else.
LEARNED = {
    "chatml": ["Blue é🙂.<|im_end|>", "Red.<|im_end|>"],
    "chatml-marked": ["Blue é🙂.<|im_end|>", "Red.<|im_end|>"],
    "llama3": ["Blue é🙂.<|eot_id|>", "Red.<|eot_id|>"],
    "gemma": ["Blue é🙂.<end_of_turn>", "Red.<end_of_turn>"],
    "mistral": [" Blue é🙂.</s>", " Red.</s>"],
    "mistral-last": [" Blue é🙂.</s>", " Red.</s>"],
    # The last turn's empty reasoning comes after the generation prompt, so the model has to write it itself.
    "qwen3": ["Blue é🙂.<|im_end|>", "<think>\n\n</think>\n\nRed.<|im_end|>"],
    "deepseek": ["Blue é🙂.</s>", "Red.</s>"],
    "glm": ["\nBlue é🙂.<|user|>", "\nRed.</s>"],
    "no-thinking": ["Blue é🙂.<|im_end|>", "Red.<|im_end|>"],
    "bare": [" Blue é🙂.\n", " Red.\n</s>"],
    "phi3": ["Blue é🙂.<|end|>", "Red.<|end|>\n</s>"],
}


def learned(dataset, tokenizer, row=0):
    """The learned stretches of a row, decoded."""
    stretches, open_ = [], False
    for token, label in zip(dataset[row]["input_ids"], dataset[row]["labels"], strict=True):
        assert label in (-100, token)
        if label != -100:
            stretches = stretches if open_ else [*stretches, []]
            stretches[-1].append(token)
        open_ = label != -100
    return [tokenizer.decode(stretch) for stretch in stretches]


def ascii_only(messages):
    return [{**message, "content": message["content"].replace("é🙂", "")} for message in messages]


def tokenised(write, rows, tokenizer, **options):
    return tokenize(load_examples(write(rows)), tokenizer, **{"max_length": 512, **options})


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "python"])
@pytest.mark.parametrize("template", LEARNED)
def test_every_assistant_turn_is_learned_through_its_end(kind, template, write, make_tokenizer):
    tokenizer = make_tokenizer(kind, template)
    talk = ascii_only(TALK) if kind == "python" else TALK
    dataset = tokenised(write, [{"messages": talk}], tokenizer)
    expected = [text.replace("é🙂", "") if kind == "python" else text for text in LEARNED[template]]
    if kind == "metaspace":  # whose decoder takes a leading space for one that it put there itself
        expected = [text.removeprefix(" ") for text in expected]
    assert learned(dataset, tokenizer) == expected
    plain = tokenizer.apply_chat_template(talk, return_dict=False)
    assert dataset[0]["input_ids"] == plain + ([tokenizer.eos_token_id] if template in ("bare", "glm") else [])


@pytest.mark.parametrize("template", LEARNED)
def test_a_system_turn_reaches_the_model_and_is_not_learned(template, write, make_tokenizer):
    tokenizer = make_tokenizer(template=template)
    dataset = tokenised(write, [{"messages": [SYSTEM, *TALK]}], tokenizer)
    assert SYSTEM["content"] in tokenizer.decode(dataset[0]["input_ids"])
    assert learned(dataset, tokenizer) == LEARNED[template]


def test_reasoning_that_a_template_drops_is_said(write, make_tokenizer, caplog):
    tokenizer = make_tokenizer(template="qwen3")
    dataset = tokenised(write, [{"messages": THOUGHT}], tokenizer)
    assert learned(dataset, tokenizer) == ["Blue.<|im_end|>", "<think>\nRose.\n</think>\n\nRed.<|im_end|>"]
    assert "reasoning of earlier turns: left out by the chat template in 1 turn" in dataset.info.description
    assert "left out by the chat template" in caplog.text


def test_a_call_that_is_written_otherwise_when_it_is_the_last(write, make_tokenizer):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    tokenizer = make_tokenizer(template="qwen3")
    dataset = tokenised(write, [{"messages": [TALK[0], call, {"role": "tool", "content": "4"}, TALK[3]]}], tokenizer)
    assert learned(dataset, tokenizer) == [
        '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nRed.<|im_end|>",
    ]


def test_reasoning_where_the_generation_prompt_has_closed_it(write, make_tokenizer):
    tokenizer = make_tokenizer(template="no-thinking")
    dataset = tokenised(write, [{"messages": THOUGHT}], tokenizer)
    assert learned(dataset, tokenizer) == ["Sky.\n</think>\n\nBlue.<|im_end|>", "Rose.\n</think>\n\nRed.<|im_end|>"]
    assert "in 1 rows the answer does not follow" in dataset.info.description
    assert "left out" not in dataset.info.description


def test_a_template_that_drops_the_answers_is_refused(write, make_tokenizer):
    tokenizer = make_tokenizer()
    answers = "{% if m.role == 'user' %}{{ m.content }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>" + answers + "<|end|>{% endfor %}"
    with pytest.raises(DataError, match="leaves an assistant turn out"):
        tokenised(write, [{"messages": TALK}], tokenizer)


def test_a_generation_prompt_that_training_never_shows_is_said(write, make_tokenizer):
    description = tokenised(write, [{"messages": TALK}], make_tokenizer(template="deepseek")).info.description
    assert "in 1 rows the answer does not follow" in description


def test_turns_of_weight_0_are_not_learned(write, make_tokenizer):
    for template in ("chatml", "chatml-marked"):
        tokenizer = make_tokenizer(template=template)
        dataset = tokenised(write, [{"messages": [TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]]}], tokenizer)
        assert learned(dataset, tokenizer) == LEARNED[template][1:]


def test_only_the_completion_of_a_conversational_prompt_is_learned(write, make_tokenizer):
    tokenizer = make_tokenizer(template="chatml")
    dataset = tokenised(write, [{"prompt": TALK[:3], "completion": TALK[3:]}], tokenizer)
    assert learned(dataset, tokenizer) == LEARNED["chatml"][1:]


def test_train_on_all_learns_every_token(write, make_tokenizer):
    tokenizer = make_tokenizer(template="chatml")
    row = tokenised(write, [{"messages": TALK}], tokenizer, train_on="all")[0]
    assert row["labels"] == row["input_ids"] == tokenizer.apply_chat_template(TALK, return_dict=False)


def test_a_conversation_that_begins_with_the_assistant(write, make_tokenizer):
    tokenizer = make_tokenizer(template="chatml")
    dataset = tokenised(write, [{"messages": TALK[1:]}], tokenizer)
    assert learned(dataset, tokenizer) == LEARNED["chatml"]


def test_strings_are_a_user_and_an_assistant_turn_to_a_chat_template(write, make_tokenizer):
    tokenizer = make_tokenizer(template="llama3")
    dataset = tokenised(write, [{"prompt": TALK[2]["content"], "completion": TALK[3]["content"]}], tokenizer)
    assert dataset[0]["input_ids"] == tokenizer.apply_chat_template(TALK[2:], return_dict=False)
    assert learned(dataset, tokenizer) == ["Red.<|eot_id|>"]


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "python"])
def test_strings_without_a_template_are_joined_and_ended(kind, write, make_tokenizer):
    tokenizer = make_tokenizer(kind)
    row = {"prompt": "The capital of France is", "completion": " Paris."}
    dataset = tokenised(write, [row], tokenizer)
    joined = tokenizer(row["prompt"] + row["completion"])["input_ids"]
    assert dataset[0]["input_ids"] == [*joined, tokenizer.eos_token_id]
    assert [text.strip(" ") for text in learned(dataset, tokenizer)] == ["Paris.</s>"]
    prompt = encode_prompt(load_examples(write([row])).dataset[0], tokenizer)
    assert dataset[0]["input_ids"][: len(prompt)] == prompt


def test_use_chat_template_false_joins_strings_although_there_is_one(write, make_tokenizer):
    tokenizer = make_tokenizer(template="chatml")
    dataset = tokenised(write, [{"prompt": "Two", "completion": " four."}], tokenizer, use_chat_template=False)
    assert tokenizer.decode(dataset[0]["input_ids"]) == "Two four.</s>"


def test_questions_without_a_template_get_the_fallback(write, make_tokenizer):
    tokenizer = make_tokenizer(bos=True)
    examples = load_examples(write([{"instruction": "Name a colour.", "input": "Sky.", "output": "Blue."}]))
    dataset = tokenize(examples, tokenizer, max_length=512)
    text = "<s>### Instruction:\nName a colour.\n\nSky.\n\n### Response:\nBlue.</s>\n\n"
    assert tokenizer.decode(dataset[0]["input_ids"]) == text
    assert learned(dataset, tokenizer) == ["Blue.</s>"]
    prompt = encode_prompt(examples.dataset[0], tokenizer)
    assert dataset[0]["input_ids"][: len(prompt)] == prompt


def test_bos_comes_once(write, make_tokenizer):
    for kind in ("byte-level", "metaspace"):
        tokenizer = make_tokenizer(kind, bos=True)
        chat = make_tokenizer(kind, "mistral", bos=True)
        rows = [{"prompt": "Two", "completion": " four."}, {"prompt": "<s>Two", "completion": " four."}]
        for dataset in (tokenised(write, rows, tokenizer), tokenised(write, rows[:1], chat)):
            for row in dataset:
                assert row["input_ids"].count(tokenizer.bos_token_id) == 1
                assert row["input_ids"].count(tokenizer.eos_token_id) == 1
                assert len(row["labels"]) == len(row["input_ids"])
        assert encode_prompt({"prompt": "<s>Two", "completion": "b"}, tokenizer).count(tokenizer.bos_token_id) == 1


def test_eos_that_the_row_has_already_is_not_doubled(write, make_tokenizer):
    tokenizer = make_tokenizer()
    dataset = tokenised(write, [{"prompt": "Two", "completion": " four.</s>"}, {"text": "Two</s>"}][:1], tokenizer)
    assert tokenizer.decode(dataset[0]["labels"][-3:]).count("</s>") == 1


def test_text_is_cut_into_pieces_without_loss(write, make_tokenizer):
    tokenizer = make_tokenizer(bos=True)
    documents = ["The capital of France is Paris. " * 5, "Red."]
    dataset = tokenised(write, [{"text": text} for text in documents], tokenizer, max_length=16)
    everything = [token for row in dataset for token in row["input_ids"]]
    assert everything == [token for d in documents for token in [*tokenizer(d)["input_ids"], tokenizer.eos_token_id]]
    assert all(row["labels"] == row["input_ids"] and len(row["labels"]) <= 16 for row in dataset)


def test_rows_without_anything_left_to_learn_are_dropped_and_counted(write, make_tokenizer, caplog):
    tokenizer = make_tokenizer()
    rows = [{"prompt": "x" * n, "completion": " Red. Blue."} for n in (4, 30, 300)]
    dataset = tokenised(write, rows, tokenizer, max_length=32)
    assert len(dataset) == 2
    assert all(len(row["input_ids"]) <= 32 for row in dataset)
    assert "1 rows dropped" in caplog.text
    assert "1 rows cut" in dataset.info.description
    with pytest.raises(DataError, match="raise max_length"):
        tokenised(write, rows[2:], tokenizer, max_length=32)


def test_a_prompt_that_shares_a_token_with_its_answer_is_said(write, make_tokenizer):
    tokenizer = make_tokenizer()
    dataset = tokenised(write, [{"prompt": "The capital of France is ", "completion": "Paris."}], tokenizer)
    assert learned(dataset, tokenizer) == [" Paris.</s>"]
    assert "in 1 rows one token spans" in dataset.info.description


def test_tokenising_twice_does_not_read_an_old_cache(write, make_tokenizer):
    examples = load_examples(write([{"prompt": "a", "completion": "b"}]))
    lengths = [
        len(tokenize(examples, make_tokenizer(template=template), max_length=512)[0]["input_ids"])
        for template in (None, "chatml", None)
    ]
    assert lengths[0] == lengths[2] < lengths[1]


def test_conversations_that_the_template_refuses_are_all_named(write, make_tokenizer):
    rows = [{"messages": TALK}, {"messages": [TALK[0], *TALK]}, {"messages": TALK[1:]}]
    with pytest.raises(DataError, match="must alternate") as raised:
        tokenised(write, rows, make_tokenizer(template="gemma"))
    assert "row 2 (user: Name a colour.)" in str(raised.value)
    assert "row 3" in str(raised.value)


def test_tools_and_calls_reach_the_template(write, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
        "{{ m.content }}{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tool = {"type": "function", "function": {"name": "add", "parameters": {"a": None, "b": [1, "2"]}}}
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    turns = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "4"}]
    dataset = tokenised(write, [{"messages": [*turns, TALK[3]], "tools": [tool]}], tokenizer)
    call_text = '{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}'
    assert learned(dataset, tokenizer) == [call_text + "<|end|>", "Red.<|end|>"]
    assert '"parameters": {"b": [1, "2"]}' in tokenizer.decode(dataset[0]["input_ids"])


def test_wrong_arguments(write, make_tokenizer):
    rows, tokenizer = [{"prompt": "a", "completion": "b"}], make_tokenizer()
    for options in ({"max_length": 1}, {"train_on": "prompt"}, {"use_chat_template": True}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            tokenised(write, rows, tokenizer, **options)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no EOS"):
        tokenised(write, rows, tokenizer)


@pytest.mark.parametrize("template", sorted(set(LEARNED) - {"deepseek"}))
def test_training_continues_exactly_what_evaluation_prompts_with(template, write, make_tokenizer):
    tokenizer = make_tokenizer(template=template)
    examples = load_examples(write([{"messages": [SYSTEM, *TALK]}]))
    row = examples.dataset[0]
    prompt = encode_prompt(row, tokenizer)
    ids = tokenize(examples, tokenizer, max_length=512)[0]["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert prompt == tokenizer(render_prompt(row, tokenizer), add_special_tokens=False)["input_ids"]
    assert reference_answer(row) == "Red."


def test_text_has_no_prompt(make_tokenizer):
    for ask in (reference_answer, lambda row: render_prompt(row, make_tokenizer())):
        with pytest.raises(DataError, match="no question"):
            ask({"text": "a"})


def test_a_prompt_that_the_template_refuses(make_tokenizer):
    row = {"prompt": TALK[1:2], "completion": TALK[1:2]}
    with pytest.raises(DataError, match="must alternate"):
        render_prompt(row, make_tokenizer(template="gemma"))


def test_rows_are_rendered_by_one_renderer_and_tokenised_together(make_tokenizer, monkeypatch):
    made, calls = [], []
    tokenizer = make_tokenizer(template="qwen3")
    monkeypatch.setattr(prompts, "ChatRenderer", lambda *given: made.append(given) or ChatRenderer(*given))
    rows = [{"prompt": f"Is it {i}?", "completion": f"<think>\nHm.\n</think>\n\nIt is {i}."} for i in range(6)]
    alone = [(encode_prompt(row, tokenizer), expected_answer(row, tokenizer)) for row in rows]
    made.clear()
    monkeypatch.setattr(type(tokenizer), "__call__", counted(type(tokenizer).__call__, calls))
    assert list(zip(encode_prompts(rows, tokenizer), expected_answers(rows, tokenizer), strict=True)) == alone
    assert len(made) == len(calls) == 2


def counted(method, calls):
    def call(*given, **named):
        calls.append(given)
        return method(*given, **named)

    return call
