"""Which tokens end an answer, for the templates that TRL ships and for odd ones."""

import re
from pathlib import Path

import pytest
import trl
from transformers import GenerationConfig

from theodora.ends import end_token_ids, template_end_ids
from tiny import CHATML, tiny_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
EOS = "<|endoftext|>"
# What the families' real tokenizers have beside the tokens that their templates spell out.
ADDED = ("<|END_OF_TURN_TOKEN|>", "<end_of_turn>", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "<turn|>")

# Template -> the tokens that end a turn of text or of calls. Phi-3 closes with two; gpt-oss's `<|end|>` ends reasoning,
# too, and GLM's `</tool_call>` each call, so that they end no answer.
FAMILIES = {
    "qwen2_5": ["<|im_end|>"],
    "qwen3": ["<|im_end|>"],
    "qwen3_5_think": ["<|im_end|>"],
    "llama3": ["<|eot_id|>"],
    "llama3_1": ["<|eot_id|>"],
    "gemma": ["<end_of_turn>"],
    "gemma3": ["<end_of_turn>"],
    "phi3": ["<|end|>", EOS],
    "gptoss": ["<|return|>", "<|call|>"],
    "deepseekv3": ["<｜end▁of▁sentence｜>"],
    "glm4moe": [],
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "smolvlm": ["<end_of_utterance>"],
}


def tokenizer_with(template, eos=EOS, more=()):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = eos
    special = sorted({*re.findall(r"<\|[^|<>\s]{1,40}\|>", template), *ADDED, *more} - {EOS, "<|im_start|>"})
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens(
        [token for token in ("<tool_call>", "</tool_call>", "<think>", "</think>") if token in template]
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_familys_template_ends_turns_with(name):
    path = TEMPLATES / f"{name}.jinja"
    if not path.is_file():  # the oldest supported TRL ships fewer
        pytest.skip(f"this TRL has no {name}")
    tokenizer = tokenizer_with(path.read_text(encoding="utf-8"))
    assert tokenizer.convert_ids_to_tokens(list(template_end_ids(tokenizer))) == FAMILIES[name]


def test_all_that_name_an_end_count_once():
    tokenizer = tokenizer_with(CHATML)
    settings = GenerationConfig(eos_token_id=[7, 0])
    assert end_token_ids(settings, tokenizer) == (7, 0, 2)
    assert end_token_ids({"eos_token_id": 7}, tokenizer) == (7, 0, 2)
    assert end_token_ids(None, tokenizer) == (0, 2)


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",  # ends nothing
        "{% for m in messages %}{{ m['content'] + '[END]' }}{% endfor %}",  # ends turns in letters
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m['content'] | length }}{% endfor %}",  # does not show what is said
        "{{ broken",
    ],
    ids=str,
)
def test_a_template_without_an_end_token_names_none(template):
    tokenizer = tokenizer_with("")
    tokenizer.chat_template = template
    assert template_end_ids(tokenizer) == ()
    assert end_token_ids(None, tokenizer) == (0,)


def test_a_template_that_takes_lists_of_parts_alone():
    parts = "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
    tokenizer = tokenizer_with("{% for m in messages %}" + parts + "{{ '<|im_end|>' }}{% endfor %}")
    assert template_end_ids(tokenizer) == (2,)
