"""Families whose templates TRL does not ship, in short imitations of what is peculiar to them."""

import pytest

from chat_shapes import SHAPES, TRL_TEMPLATES, tokenizer_for, tools_for
from theodora.data import left_out_of, load_examples, tokenize
from theodora.data.templates import for_template
from theodora.errors import ConfigError, DataError

CALL = '{"name": "weather", "arguments": {"city": "Oslo", "n": 4}'
CALL_LOOP = "{% for c in m.tool_calls or [] %}"

# Mistral's tokenizers of 2024: tools stand before the last user turn, calls are one list with ids, no header.
MISTRAL = (
    "{{ bos_token }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% if tools and m == asked[-1] %}"
    "{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS][' }}{% for c in m.tool_calls %}{% set f = c.function | tojson %}"
    "{{ f[:-1] + ', \"id\": \"' + c.id + '\"}' }}{{ '' if loop.last else ', ' }}{% endfor %}{{ ']</s>' }}"
    "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)
# Magistral and Ministral 3: reasoning is a part of the content, calls are name[ARGS]arguments.
MINISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}{% else %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'thinking' %}"
    "{{ '[THINK]' + p.thinking + '[/THINK]' }}{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    + CALL_LOOP
    + "{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' + c.function.arguments | tojson }}{% endfor %}{{ '</s>' }}"
    "{% endif %}{% endfor %}"
)
LLAMA4 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|header_start|>' + m.role + '<|header_end|>\n\n' + m.content | trim }}"
    + CALL_LOOP
    + "{{ c.function | tojson }}{% endfor %}{{ '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\n\n' }}{% endif %}"
)
GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content }}"
    "{% if m.tool_calls %}{{ '<|tool_call|>[' }}"
    + CALL_LOOP
    + "{{ c.function | tojson }}{{ '' if loop.last else ', ' }}{% endfor %}{{ ']' }}{% endif %}"
    "{{ '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
# DeepSeek V3.1: the generation prompt closes the reasoning; arguments are added to strings.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}{% else %}"
    "{% if loop.previtem.role == 'user' %}{{ '<｜Assistant｜></think>' }}{% endif %}{{ m.content }}"
    + CALL_LOOP
    + "{{ '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' + c.function.arguments }}"
    "{{ '<｜tool▁call▁end｜>' }}{% endfor %}{{ '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role == 'user' %}{{ '<｜Assistant｜></think>' }}{% endif %}"
)
# SmolLM3: markers around the whole turn, header and all, and Python's repr of tools; no calls.
SMOLLM3 = (
    "{{ '<|im_start|>system\n' }}{% for t in tools or [] %}{{ t | string }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' + m.content }}"
    "{{ '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Command A: the next header is written whether it is asked for or not.
COMMAND_A = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
    "{% if m.role == 'assistant' %}{{ '<|CHATBOT_TOKEN|><|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}"
    "{% else %}{{ '<|USER_TOKEN|>' + m.content }}{% endif %}{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}"
    "{% if add_generation_prompt %}{{ '<|START_RESPONSE|>' }}{% endif %}"
)
# Kimi K2: a call is written by its id, which names the function.
KIMI = (
    "{% for m in messages %}{{ '<|im_' + m.role + '|>' + m.content }}"
    + CALL_LOOP
    + "{{ '<|tool_call_begin|>' + c.id + '<|tool_call_argument_begin|>' + c.function.arguments | tojson }}"
    "{{ '<|tool_call_end|>' }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_assistant|>' }}{% endif %}"
)

# (template, shape) -> what is learned of each turn, and what is said to be left out.
ANSWERS = {
    ("mistral", "text"): (["Blue.</s>", "Red.</s>"], []),
    ("mistral", "call"): ([f'[TOOL_CALLS][{CALL}, "id": "123456707"}}]</s>', "Four.</s>", "Bye.</s>"], []),
    ("mistral", "text+call"): (
        [f'[TOOL_CALLS][{CALL}, "id": "123456707"}}]</s>', "Four.</s>", "Bye.</s>"],
        ["text beside tool calls"],
    ),
    ("ministral", "reasoning"): (["[THINK]Hm one.[/THINK]Blue.</s>", "[THINK]Hm two.[/THINK]Red.</s>"], []),
    ("ministral", "thought"): (["[THINK]Hm one.[/THINK]Blue.</s>", "[THINK]Hm two.[/THINK]Red.</s>"], []),
    ("ministral", "all"): (
        [
            '[THINK]Hm one.[/THINK]Let me look.[TOOL_CALLS]weather[ARGS]{"city": "Oslo", "n": 4}</s>',
            "[THINK]Hm two.[/THINK]Four.</s>",
            "[THINK]Hm three.[/THINK]Bye.</s>",
        ],
        ["tools on offer"],
    ),
    ("llama4", "text+call"): ([f"Let me look.{CALL}}}<|eot|>", "Four.<|eot|>", "Bye.<|eot|>"], ["tools on offer"]),
    ("granite", "calls"): (
        [
            f'<|tool_call|>[{CALL}}}, {{"name": "weathers", "arguments": {{"city": "Rome"}}}}]<|end_of_text|>',
            "Four.<|end_of_text|>",
            "Bye.<|end_of_text|>",
        ],
        ["tools on offer"],
    ),
    ("phi4", "call"): (
        ["Four.<|im_end|>", "Bye.<|im_end|>"],
        ["tools on offer", "tool calls", "turns of which nothing is shown"],
    ),
    ("deepseek", "call"): (
        [
            '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Oslo", "n": 4}<｜tool▁call▁end｜>'
            "<｜end▁of▁sentence｜>",
            "Four.<｜end▁of▁sentence｜>",
            "Bye.<｜end▁of▁sentence｜>",
        ],
        ["tools on offer"],
    ),
    ("smollm3", "text+call"): (["Let me look.<|im_end|>", "Four.<|im_end|>", "Bye.<|im_end|>"], ["tool calls"]),
    ("smollm3", "text"): (["Blue.<|im_end|>", "Red.<|im_end|>"], []),
    ("command-a", "text"): (
        ["Blue.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "Red.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"],
        [],
    ),
    ("kimi", "call"): (
        [
            '<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"city": "Oslo", "n": 4}'
            "<|tool_call_end|><|im_end|>",
            "Four.<|im_end|>",
            "Bye.<|im_end|>",
        ],
        ["tools on offer"],
    ),
    # Of those that TRL ships: a call in the middle, an end of turn that changes, and content behind the result.
    ("qwen3", "text+call"): (
        [
            f"Let me look.\n<tool_call>\n{CALL}}}\n</tool_call><|im_end|>",
            "Four.<|im_end|>",
            "<think>\n\n</think>\n\nBye.<|im_end|>",
        ],
        [],
    ),
    ("qwen3_6", "text+call"): (
        [
            "Let me look.\n\n<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=n>\n4\n"
            "</parameter>\n</function>\n</tool_call><|im_end|>",
            "Four.<|im_end|>",
            "\n</think>\n\nBye.<|im_end|>",
        ],
        [],
    ),
    ("gptoss", "reasoning"): (
        [
            "<|channel|>final<|message|>Blue.<|end|>",
            "<|channel|>analysis<|message|>Hm two.<|end|><|start|>assistant<|channel|>final<|message|>Red.<|return|>",
        ],
        ["reasoning of earlier turns"],
    ),
    ("gptoss", "call"): (
        [
            ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo", "n": 4}<|call|>',
            "<|channel|>final<|message|>Four.<|end|>",
            "<|channel|>final<|message|>Bye.<|return|>",
        ],
        [],
    ),
    ("gemma4_v5", "text+call"): (
        [
            '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,n:4}<tool_call|><|tool_response>',
            "Let me look.Four.<turn|>",
            "Bye.<turn|>",
        ],
        [],
    ),
    ("glm4moe", "reasoning"): (
        ["\n<think></think>\nBlue.<|user|>", "\n<think>Hm two.</think>\nRed.</s>"],
        ["reasoning of earlier turns"],
    ),
    ("idefics3", "text"): ([" Blue.<end_of_utterance>", " Red.<end_of_utterance>"], []),
}
TEMPLATES = {
    "mistral": MISTRAL,
    "ministral": MINISTRAL,
    "llama4": LLAMA4,
    "granite": GRANITE,
    "phi4": PHI4,
    "deepseek": DEEPSEEK,
    "smollm3": SMOLLM3,
    "command-a": COMMAND_A,
    "kimi": KIMI,
}


def template_of(family):
    return TEMPLATES[family] if family in TEMPLATES else TRL_TEMPLATES[family].read_text(encoding="utf-8")


def row_of(shape, family=None):
    messages = SHAPES[shape]
    if family == "kimi":
        messages = [
            {**m, "tool_calls": [{**c, "id": "functions.weather:0"} for c in m["tool_calls"]]}
            if "tool_calls" in m
            else m
            for m in messages
        ]
    tools = tools_for(shape)
    return {"messages": messages, **({"tools": tools} if tools else {})}


def learned_of(dataset, tokenizer, row=0):
    """The learned stretches of a row, decoded."""
    stretches, open_ = [], False
    for token, label in zip(dataset[row]["input_ids"], dataset[row]["labels"], strict=True):
        if label != -100:
            stretches = stretches if open_ else [*stretches, []]
            stretches[-1].append(token)
        open_ = label != -100
    return [tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize(("family", "shape"), ANSWERS)
def test_what_is_learned_and_what_is_said(family, shape, write):
    tokenizer = tokenizer_for(template_of(family))
    dataset = tokenize(load_examples(write([row_of(shape, family)])), tokenizer, max_length=9999)
    answers, left_out = ANSWERS[family, shape]
    assert learned_of(dataset, tokenizer) == answers
    assert [one.what for one in left_out_of(dataset)] == left_out
    assert all(one.rows == 1 and str(one) in dataset.info.description for one in left_out_of(dataset))


def test_what_a_template_does_not_show_is_said_with_the_rows_and_what_to_do(write, caplog):
    rows = [row_of("all"), row_of("text"), row_of("call")]
    dataset = tokenize(load_examples(write(rows)), tokenizer_for(PHI4), max_length=9999)
    said = {one.what: one for one in left_out_of(dataset)}
    assert said["tools on offer"].rows == said["tool calls"].rows == 2
    assert said["reasoning"].rows == 1
    assert "in 3 turns, use a template that shows it (chat_template_path)" in said["reasoning"].why
    assert "left out by the chat template" in caplog.text


def test_rows_of_which_nothing_is_left_to_learn(write):
    rows = [row_of("last call"), row_of("text")]
    dataset = tokenize(load_examples(write(rows)), tokenizer_for(PHI4), max_length=9999)
    assert len(dataset) == 1
    assert "1 rows dropped: the chat template shows nothing of what is to be learned" in dataset.info.description
    with pytest.raises(DataError, match="tool calls: left out by the chat template in 1 turn"):
        tokenize(load_examples(write(rows[:1])), tokenizer_for(PHI4), max_length=9999)


def test_a_template_that_refuses_tools_says_that_it_may_not_know_them(write):
    tokenizer = tokenizer_for(template_of("gemma"))
    with pytest.raises(DataError, match=r"must alternate.*holds tool calls or results; .*chat_template_path"):
        tokenize(load_examples(write([row_of("call")])), tokenizer, max_length=9999)


def test_markers_of_a_template_can_only_leave_out_and_that_is_said(write):
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{{ 'Well: ' }}"
        "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|end|>' }}{% else %}{{ m.content + '<|end|>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokenizer = tokenizer_for(template + "<|assistant|><|user|><|end|>")
    tokenizer.chat_template = template
    dataset = tokenize(load_examples(write([row_of("text")])), tokenizer, max_length=9999)
    assert learned_of(dataset, tokenizer) == ["Blue.<|end|>", "Red.<|end|>"]
    assert [one.what for one in left_out_of(dataset)] == ["what stands outside of the chat template's own markers"]


def test_words_that_hold_rare_characters_are_found_all_the_same(write):
    messages = [
        {"role": "user", "content": "\U00020000\U00024001 \U000f0000?"},
        {"role": "assistant", "content": "\U00020002!"},
    ]
    tokenizer = tokenizer_for(GRANITE)
    dataset = tokenize(load_examples(write([{"messages": messages}])), tokenizer, max_length=9999)
    assert learned_of(dataset, tokenizer) == ["\U00020002!<|end_of_text|>"]


def test_a_tokenizer_with_a_template_of_its_own_for_tools(write):
    tokenizer = tokenizer_for(PHI4 + GRANITE)
    tokenizer.chat_template = {"default": PHI4, "tool_use": GRANITE}
    dataset = tokenize(load_examples(write([row_of("text"), row_of("last call")])), tokenizer, max_length=9999)
    assert learned_of(dataset, tokenizer) == ["Blue.<|im_end|>", "Red.<|im_end|>"]
    assert learned_of(dataset, tokenizer, 1) == [f"<|tool_call|>[{CALL}}}]<|end_of_text|>"]
    tokenizer.chat_template = {"rag": PHI4}
    with pytest.raises(ConfigError, match="no default"):
        tokenize(load_examples(write([row_of("text")])), tokenizer, max_length=9999)


def test_messages_are_offered_in_the_form_that_a_template_wants():
    wanted = for_template(SHAPES["call"], tokenizer_for(template_of("deepseekv3")))
    assert wanted[1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo", "n": 4}'
    parts = for_template(SHAPES["text"], tokenizer_for(template_of("idefics3")))
    assert parts[0]["content"] == [{"type": "text", "text": "U1?"}]
