"""Conversations of every shape that a model's turn can have, and tokenizers with a chat template's control tokens."""

import re
from pathlib import Path

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TRL_TEMPLATES = {path.stem: path for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}

_SPECIAL = re.compile(
    r"<\|[^|<>\s']{1,40}\|>|<｜[^<>\s']{1,40}｜>|</?s>|<bos>|<(?:start|end)_of_\w+>|\[/?[A-Z_]{3,20}\]|\[gMASK\]|<sop>"
    r"|<\|(?:tool_call|tool_response|turn|channel|tool)>|<(?:tool_call|tool_response|turn|channel|tool)\|>"
)
_PLAIN = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>", "</tool_response>")

USER, AGAIN = {"role": "user", "content": "U1?"}, {"role": "user", "content": "U2?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How it is outside",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "where"}},
            "required": ["city"],
        },
    },
}


def call(name, **arguments):
    """A call with an id of nine digits, as Mistral's templates insist on."""
    return {
        "id": f"1234567{len(name):02}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def answer(text, *, reasoning=None, calls=None):
    """A model's turn."""
    extras = {"reasoning_content": reasoning, "tool_calls": calls}
    return {"role": "assistant", "content": text, **{key: value for key, value in extras.items() if value}}


ONE, OTHER = call("weather", city="Oslo", n=4), call("weathers", city="Rome")
RESULT, OTHER_RESULT = (
    {"role": "tool", "name": one["function"]["name"], "tool_call_id": one["id"], "content": content}
    for one, content in ((ONE, "RESULT1"), (OTHER, "RESULT2"))
)

SHAPES = {
    "text": [USER, answer("Blue."), AGAIN, answer("Red.")],
    "system": [{"role": "system", "content": "RULES"}, USER, answer("Blue."), AGAIN, answer("Red.")],
    "reasoning": [USER, answer("Blue.", reasoning="Hm one."), AGAIN, answer("Red.", reasoning="Hm two.")],
    "thought": [
        USER,
        answer("<think>\nHm one.\n</think>\n\nBlue."),
        AGAIN,
        answer("<think>\nHm two.\n</think>\n\nRed."),
    ],
    "call": [USER, answer("", calls=[ONE]), RESULT, answer("Four."), AGAIN, answer("Bye.")],
    "last call": [USER, answer("", calls=[ONE])],
    "calls": [USER, answer("", calls=[ONE, OTHER]), RESULT, OTHER_RESULT, answer("Four."), AGAIN, answer("Bye.")],
    "text+call": [USER, answer("Let me look.", calls=[ONE]), RESULT, answer("Four."), AGAIN, answer("Bye.")],
    "reasoning+call": [
        USER,
        answer("", reasoning="Hm one.", calls=[ONE]),
        RESULT,
        answer("Four.", reasoning="Hm two."),
        AGAIN,
        answer("Bye."),
    ],
    "all": [
        USER,
        answer("Let me look.", reasoning="Hm one.", calls=[ONE]),
        RESULT,
        answer("Four.", reasoning="Hm two."),
        AGAIN,
        answer("Bye.", reasoning="Hm three."),
    ],
}


def tools_for(shape):
    """The tools on offer in a conversation of this shape."""
    return [TOOL] if "call" in shape or shape == "all" else None


def tokenizer_for(template):
    """A byte-level tokenizer that has each control token of a template as one token."""
    special = ["<|endoftext|>", "</s>", *sorted(set(_SPECIAL.findall(template)) - {"</s>"})]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="</s>")
    fast.add_tokens([token for token in _PLAIN if token in template])
    if "bos_token" in template:
        fast.add_special_tokens({"bos_token": "<|begin|>"})
    fast.chat_template = template
    return fast
