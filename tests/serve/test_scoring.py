"""How likely prompts are: as plain forward passes say, in one batch with others, in the forms that clients read."""

import openai
import pytest
import torch

from serving import alone, settled
from theodora.serve.requests import Sampling
from tiny import tiny_tokenizer

TEXT = "Hello thére €"


@torch.no_grad()
def by_hand(name, folder, ids):
    """Log-probability of each token but the first, and all of its place."""
    rows = alone("llama", name, folder)(torch.tensor([ids])).logits[0].log_softmax(-1)[:-1]
    return rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist(), rows


def last(request):
    while not (output := request.updates.get()).is_finished():
        assert output.error is None
    assert output.error is None
    return output


def test_scores_are_those_of_plain_passes_whatever_else_is_in_the_batch(engine_of, adapter_dir):
    """Prompts longer than a batch, prompts whose beginning is known already, and adapters with a head of their own."""
    engine = engine_of("llama", "dora4", "head", max_batch_tokens=48, page_size=8)
    ids = [3 + (7 * place) % 250 for place in range(100)]
    how = Sampling(max_tokens=2, temperature=0.0, prompt_logprobs=3)
    asked = [("dora4", ids), (None, ids), ("head", ids[:70]), ("dora4", ids), ("dora4", ids[:1])]
    plain = engine.submit(ids, Sampling(max_tokens=6, temperature=0.0), "dora4")
    requests = [engine.submit(prompt, how, name) for name, prompt in asked]
    for request, (name, prompt) in zip(requests, asked, strict=True):
        last(request)
        values, rows = by_hand(name, name and adapter_dir(name), prompt)
        first, *scores = request.scores or [None]
        assert first is None
        assert [score.logprob for score in scores] == pytest.approx(values, abs=1e-4)
        for score, row, token in zip(scores, rows, prompt[1:], strict=True):
            best = row.topk(3)
            assert score.tops[0] == best.indices.tolist()
            assert score.tops[1] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert score.rank == int((row > row[token]).sum()) + 1
    assert last(plain).generated_tokens == last(engine.submit(ids, plain.sampling, "dora4")).generated_tokens
    assert settled(engine)


def complete(server, **asked):
    return server.client.completions.create(**{"model": "dora4", "temperature": 0, **asked})


@pytest.mark.parametrize("most", [0, 1, 5])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_log_probabilities(server, adapter_dir, most, stream):
    ids = tiny_tokenizer()(TEXT)["input_ids"]
    values, _ = by_hand("dora4", adapter_dir("dora4"), ids)
    found = complete(server, prompt=TEXT, max_tokens=most, echo=True, logprobs=2, stream=stream)
    choices = [reply.choices[0] for reply in (found if stream else [found])]
    assert "".join(choice.text for choice in choices).startswith(TEXT)
    assert choices[-1].finish_reason == "length"
    parts = [choice.logprobs for choice in choices]
    told = [value for part in parts for value in part.token_logprobs]
    assert told[0] is None
    assert told[1 : len(ids)] == pytest.approx(values, abs=1e-4)
    assert len(told) == len(ids) + most == sum(len(part.tokens) for part in parts)
    tops = [top for part in parts for top in part.top_logprobs]
    assert tops[0] is None
    assert all(len(top) in (2, 3) for top in tops[1:])
    offsets = [offset for part in parts for offset in part.text_offset]
    starts = [at for at, letter in enumerate(TEXT) for _ in letter.encode()]
    assert offsets[: len(ids)] == starts
    assert all(offset >= len(TEXT) for offset in offsets[len(ids) :])
    if not stream:
        assert found.usage.completion_tokens == most


def test_lm_eval_reads_scores_of_texts(server, adapter_dir):
    """Its local-completions: batches of token ids, one token generated, of which the last number is left out."""
    ids = [tiny_tokenizer()(text)["input_ids"] for text in ("One two", "Three four five")]
    context = 4
    reply = complete(server, prompt=ids, max_tokens=1, logprobs=1, seed=1234, echo=True).model_dump()
    for choice, prompt in zip(sorted(reply["choices"], key=lambda one: one["index"]), ids, strict=True):
        values, rows = by_hand("dora4", adapter_dir("dora4"), prompt)
        found = choice["logprobs"]["token_logprobs"][context:-1]
        assert found == pytest.approx(values[context - 1 :], abs=1e-4)
        tops = choice["logprobs"]["top_logprobs"][context:-1]
        greedy = [value == max(top.values()) for value, top in zip(found, tops, strict=True)]
        assert (
            greedy == [int(row.argmax()) == token for row, token in zip(rows, prompt[1:], strict=True)][context - 1 :]
        )


def test_the_token_that_ends_an_answer_is_told_beside_a_text(server):
    """lm-eval leaves one number out for the generated token, whichever it is."""
    end = tiny_tokenizer().eos_token_id
    asked = {"prompt": TEXT, "max_tokens": 1, "echo": True, "logprobs": 1, "logit_bias": {str(end): 100}}
    choice = complete(server, **asked).choices[0]
    assert (choice.text, choice.finish_reason) == (TEXT, "stop")
    assert len(choice.logprobs.token_logprobs) == len(tiny_tokenizer()(TEXT)["input_ids"]) + 1
    assert choice.logprobs.tokens[-1] == tiny_tokenizer().eos_token
    assert choice.logprobs.text_offset[-1] == len(TEXT)


def test_prompt_logprobs_by_number(server, adapter_dir):
    ids = tiny_tokenizer()(TEXT)["input_ids"]
    values, rows = by_hand("dora4", adapter_dir("dora4"), ids)
    (choice,) = complete(server, prompt=ids, max_tokens=1, extra_body={"prompt_logprobs": 1}).choices
    first, *found = choice.prompt_logprobs
    assert first is None
    for entry, token, value, row in zip(found, ids[1:], values, rows, strict=True):
        assert entry[str(token)]["logprob"] == pytest.approx(value, abs=1e-4)
        assert entry[str(int(row.argmax()))]["rank"] == 1
        assert len(entry) == (1 if int(row.argmax()) == token else 2)
    messages = [{"role": "user", "content": "Hi"}]
    asked = {"extra_body": {"prompt_logprobs": 0, "return_token_ids": True}, "max_tokens": 1}
    reply = server.client.chat.completions.create(model="dora4", messages=messages, **asked)
    assert len(reply.prompt_logprobs) == len(reply.prompt_token_ids) == reply.usage.prompt_tokens
    assert all(len(entry) == 1 for entry in reply.prompt_logprobs[1:])


def test_echo_of_tokens_shows_special_ones(server):
    ids = [1, *tiny_tokenizer()("ab")["input_ids"]]
    choice = complete(server, prompt=ids, max_tokens=0, echo=True, logprobs=0).choices[0]
    assert choice.text == "<|im_start|>ab"
    assert choice.logprobs.text_offset == [0, 12, 13]
    assert complete(server, prompt=[ids[0]], max_tokens=0, echo=True, logprobs=0).choices[0].logprobs.tokens == [
        "<|im_start|>"
    ]


def test_a_whole_window_can_be_scored(server):
    found = complete(server, prompt=[5] * server.engine.window, max_tokens=0, echo=True, logprobs=0)
    assert len(found.choices[0].logprobs.tokens) == server.engine.window
    with pytest.raises(openai.BadRequestError, match="at most 512"):
        complete(server, prompt=[5] * server.engine.window, max_tokens=1, echo=True, logprobs=0)
