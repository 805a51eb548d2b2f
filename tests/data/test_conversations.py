"""Conversations drawn at random, by every template that TRL ships: the model's words are learned, and no others."""

import random
import re

import pytest

from chat_shapes import TOOL, TRL_TEMPLATES, answer, call, tokenizer_for
from theodora.data import messages as data_messages
from theodora.data.chat import ChatRenderer
from theodora.data.notes import Notes
from theodora.data.templates import TEMPLATE_ERRORS

_OF_OTHERS = re.compile(r"[SUT]\d+w")


def conversation(draw):
    """One to three rounds; a word's letter says whose it is, its number makes it unique."""
    numbers = iter(range(1000))

    def word(letter):
        return f"{letter}{next(numbers)}w"

    def reasoning():
        return {"reasoning_content": f"{word('A')}\n{word('A')}"} if draw.random() < 0.4 else {}

    def one_call():
        arguments = draw.choice([{}, {"a": 1, "b": True}, {"q": f'{word("A")} "x"\n'}, {"z": [word("A"), 2]}])
        return {**call(f"f{word('A')}", **arguments), "id": f"{draw.randrange(10**9):09}"}

    messages = [{"role": "system", "content": word("S")}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 3)):
        messages.append({"role": "user", "content": word("U") + draw.choice(["", "\n", " <b>", "\n\nx"])})
        for _ in range(draw.choice([0, 0, 1, 2])):
            calls = [one_call() for _ in range(draw.choice([1, 1, 2]))]
            messages.append(answer(draw.choice(["", word("A")]), calls=calls) | reasoning())
            messages += [
                {"role": "tool", "name": one["function"]["name"], "tool_call_id": one["id"], "content": word("T")}
                for one in calls
            ]
        messages.append(answer(word("A") + draw.choice(["", "\n", ".", " <|x|>"])) | reasoning())
        if draw.random() < 0.2:
            messages[-1]["content"] = f"<think>\n{word('A')}\n</think>\n\n{messages[-1]['content']}"
        if draw.random() < 0.2:
            messages[-1]["weight"] = 0
    return messages


@pytest.mark.parametrize("name", TRL_TEMPLATES)
def test_the_models_words_and_no_others(name):
    renderer = ChatRenderer(tokenizer_for(TRL_TEMPLATES[name].read_text(encoding="utf-8")))
    for seed in range(5):
        messages = conversation(random.Random(f"{name} {seed}"))
        tools = [TOOL] if any("tool_calls" in message for message in messages) else None
        try:
            chat = renderer.render_for_training(messages, tools)
        except TEMPLATE_ERRORS:
            continue
        assert chat is not None
        learned = "\n".join(chat.text[start:end] for start, end in chat.spans)
        assert not _OF_OTHERS.search(learned)
        assert sorted(chat.spans) == list(chat.spans)
        for message in messages:
            if message["role"] == "assistant":
                for words in re.findall(r"A\d+w", str(message)):
                    shown = words in chat.text
                    is_learned = words in learned
                    assert is_learned == (shown and message.get("weight") != 0)


def test_turns_of_a_role_and_words_are_read_as_all_others(monkeypatch):
    speakers = ["user", "gpt", "system", "observation", "function_call", "User", "nobody", 3, None]
    words = ["Hi", " Hi ", "", " ", "é", 4, None, ["a"], "\ud800", '{"name": "f", "arguments": {}}']
    keys = [("role", "content"), ("from", "value"), ("role", "value"), ("role", "from"), ("human", "assistant")]
    turns = [{who: speaker, what: said} for who, what in keys for speaker in speakers for said in words]
    turns += [{what: said, who: speaker} for who, what in keys[:1] for speaker in speakers for said in words]

    def read(turn):
        notes = Notes()
        return data_messages.read_turns([turn], "messages", notes), notes.problems, notes.left_out

    at_a_glance = [read(turn) for turn in turns]
    monkeypatch.setattr(data_messages, "_plain_role", lambda turn: None)
    assert at_a_glance == [read(turn) for turn in turns]
