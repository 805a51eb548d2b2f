"""Which tokens go out with which text."""

from types import SimpleNamespace

import pytest

from theodora.serve.answers import Answers, Choice
from theodora.serve.requests import Request, Sampling
from theodora.serve.text import Writer
from tiny import tiny_tokenizer

TOKENS = tiny_tokenizer()("aé xEND and on€")["input_ids"][:-1]  # the last letter is not whole


@pytest.mark.parametrize("sizes", [[1] * 17, [2, 1, 4, 10], [17]], ids=["one by one", "some", "all at once"])
@pytest.mark.parametrize(("stop", "text"), [("END", "aé x"), ("n€", "aé xEND and o"), ("?", "aé xEND and on")])
def test_tokens_go_out_with_their_text_however_many_come_at_once(sizes, stop, text):
    """A token is a byte: as many are told as the text so far has, none of a stop text's or of half a letter's."""
    assert sum(sizes) == len(TOKENS)
    choice = Choice(0, Request("one", [1], None, Sampling(max_tokens=99)), Writer(tiny_tokenizer(), [stop]))
    answers = Answers(SimpleNamespace(cancel=lambda request: None), [choice], None, frozenset())
    for end in [sum(sizes[: n + 1]) for n in range(len(sizes))]:
        update = SimpleNamespace(
            error=None, generated_tokens=TOKENS[:end], logprobs=[0.0] * end, is_finished=lambda: False
        )
        piece = answers.take(choice, update)
        assert piece.stop == choice.sent == len(choice.writer.text.encode())
        if choice.finish:
            break
    assert choice.writer.text == text
    assert choice.finish == ("stop" if stop == "END" else None)
