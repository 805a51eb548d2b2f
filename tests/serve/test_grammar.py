"""Grammars on a vocabulary: which tokens can come, and what strangers can ask for."""

import asyncio
import json
import threading

import pytest
import torch

import tiny
from calling import SCHEMA
from theodora.errors import ConfigError
from theodora.serve import grammar as grammar_module
from theodora.serve.calls.families import FAMILIES, THINKING, Parser, gather
from theodora.serve.calls.forced import calls_format, sequence, thinking_format
from theodora.serve.grammar import Grammars, Unfollowable, format_of
from theodora.serve.messages import StructuredOutputs

TOKENIZER = tiny.tiny_tokenizer()
OFFER = [("look", SCHEMA), ("stop", None)]


def compiled(format, size=tiny.VOCAB_SIZE, ends=(tiny.EOS_ID,), words=()):
    return asyncio.run(Grammars(TOKENIZER, size, ends).grammar(format, words))


def form(**asked):
    return format_of(StructuredOutputs.model_validate(asked))


def wanders(grammar, seed=0, most=400, size=tiny.VOCAB_SIZE):
    """What random logits write, and whether it came to an end."""
    draws = torch.Generator().manual_seed(seed)
    state, tokens = grammar.start(), []
    for _ in range(most):
        logits = torch.randn(size, generator=draws)
        state.mask(logits)
        token = int(logits.argmax())
        state.accept(token)
        if token == tiny.EOS_ID:
            return TOKENIZER.decode(tokens, skip_special_tokens=True), True
        tokens.append(token)
    return TOKENIZER.decode(tokens, skip_special_tokens=True), False


def allowed(state, size=tiny.VOCAB_SIZE):
    logits = torch.zeros(size)
    state.mask(logits)
    return {int(token) for token in (logits > -1).nonzero()}


@pytest.mark.parametrize("seed", range(5))
def test_what_ends_is_json_that_fits(seed):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "s": {"type": "string", "maxLength": 4}, "l": {"enum": [1, "x"]}},
        "required": ["n", "s", "l"],
    }
    text, ended = wanders(compiled(form(json=schema)), seed)
    assert ended
    found = json.loads(text)
    assert isinstance(found["n"], int)
    assert len(found["s"]) <= 4
    assert found["l"] in (1, "x")


def test_the_end_comes_where_the_grammar_can_stop_and_nothing_special_elsewhere():
    state = compiled(form(regex="ab?")).start()
    a, b = TOKENIZER.convert_tokens_to_ids(["a", "b"])
    assert allowed(state) == {a}
    state.accept(a)
    assert allowed(state) == {b, tiny.EOS_ID}
    state.accept(b)
    assert allowed(state) == {tiny.EOS_ID}
    text = compiled({"type": "any_text"}).start()
    assert allowed(text) & {tiny.PAD_ID, tiny.BOS_ID} == set()
    kept = compiled({"type": "any_text"}, words=["<|im_start|>"]).start()
    assert tiny.BOS_ID in allowed(kept)
    with pytest.raises(Unfollowable, match="does not fit"):
        state.accept(a)


def test_vocabularies_of_other_sizes_than_the_models():
    small, large = compiled(form(regex="!+"), size=100), compiled(form(regex="!+"), size=300)
    for grammar, size in ((small, 100), (large, 300)):
        text, _ = wanders(grammar, most=5, size=size)
        assert set(text) == {"!"}
    assert allowed(large.start(), size=272) == allowed(small.start(), size=272)
    with pytest.raises(Unfollowable, match="no token"):
        compiled(form(regex="é"), size=20).start().mask(torch.zeros(20))


def test_a_model_without_an_end_takes_no_grammar():
    with pytest.raises(ConfigError, match="no token that ends"):
        compiled(form(regex="a"), ends=())


def test_a_grammar_that_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(grammar_module, "_COMPILE_SECONDS", 0.0)
    with pytest.raises(ConfigError, match="to compile"):
        compiled(form(regex="(ab){1,50}"))


def test_one_grammar_serves_many_answers():
    grammar = compiled(form(choice=["ab", "cd"]))
    first, second = grammar.start(), grammar.start()
    first.accept(TOKENIZER.convert_tokens_to_ids("a"))
    assert allowed(first) != allowed(second)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"whitespace_pattern": " ", "json": {}}, "whitespace_pattern"),
        ({"structural_tag": "[]"}, "no format"),
        ({"structural_tag": "{"}, "no JSON"),
        ({"json": "[1"}, "no JSON"),
        ({"json": "3"}, "expected an object"),
    ],
)
def test_forms_that_make_no_sense(asked, says):
    with pytest.raises(ConfigError, match=says):
        form(**asked)


def test_other_forms():
    older = {"structures": [{"begin": "<f>", "schema": {"const": 1}, "end": "</f>"}], "triggers": ["<f"]}
    state = compiled(form(structural_tag=json.dumps(older))).start()
    for token in TOKENIZER("So: <f>1</f>")["input_ids"]:
        state.accept(token)
    assert tiny.EOS_ID in allowed(state)
    compact = {"json": {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2}}
    assert wanders(compiled(form(**compact, disable_any_whitespace=True)))[0] == "[1, 1]"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_forced_calls_are_calls_in_every_family(family):
    schemas = {name: schema or {} for name, schema in OFFER}
    for seed in range(3):
        text, ended = wanders(compiled(calls_format(family, OFFER, "required", parallel=False)), seed)
        found = gather(Parser(family, schemas).feed(text, ended=True))
        ((name, arguments, _),) = found.calls
        assert ended
        assert found.content == ""
        read = json.loads(arguments)
        assert (name, read) == ("stop", {}) or (name == "look" and read["a"] in "xy" and isinstance(read["b"], bool))
    text, _ = wanders(compiled(calls_format(family, OFFER, "required", parallel=True)))
    assert gather(Parser(family, schemas).feed(text, ended=True)).calls
    for parallel in (True, False):  # calls that may come leave text free
        text, _ = wanders(compiled(calls_format(family, OFFER, "auto", parallel)), most=20)
        assert family.read or text


@pytest.mark.parametrize("thinking", THINKING, ids=lambda thinking: thinking.name)
def test_reasoning_may_come_before_a_form(thinking):
    opened = compiled(sequence(thinking_format(None, thinking, True), form(regex="yes")))
    state = opened.start()
    for token in TOKENIZER(f"Hm.{thinking.close}\n\nyes")["input_ids"]:
        assert token in allowed(state)
        state.accept(token)
    assert allowed(state) == {tiny.EOS_ID}
    either = compiled(sequence(thinking_format(None, thinking, False), form(regex="yes"))).start()
    firsts = {TOKENIZER.decode([token]) for token in allowed(either)}
    assert firsts == {"y", thinking.open[0]}


def test_grammars_that_take_too_long_leave_few_threads_and_hold_up_nothing(monkeypatch):
    monkeypatch.setattr(grammar_module, "_COMPILE_SECONDS", 0.05)
    release = threading.Event()
    monkeypatch.setattr(Grammars, "_compile", lambda *given: release.wait())
    grammars = Grammars(TOKENIZER, tiny.VOCAB_SIZE, (tiny.EOS_ID,))

    async def ask():
        told = []
        for _ in range(6):
            with pytest.raises(ConfigError) as error:
                await grammars.grammar({"type": "any_text"})
            told.append(str(error.value))
        stuck = [thread for thread in threading.enumerate() if thread.name == "theodora-daemon"]
        assert len(stuck) == 4
        assert all(thread.daemon for thread in stuck)
        release.set()
        while any(thread.is_alive() for thread in stuck):
            await asyncio.sleep(0.01)
        return told

    told = asyncio.run(ask())
    assert ["to compile; expected a simpler" in text for text in told] == [True] * 4 + [False] * 2
    assert "4 grammars take too long" in told[-1]
    monkeypatch.undo()
    assert asyncio.run(grammars.grammar({"type": "any_text"})) is not None  # all have ended
