"""What one request does to its logits: the definitions, and that no other request of the batch is touched."""

import pytest
import torch

from serving import alone, settled
from theodora.serve.requests import Sampling
from theodora.serve.sampling import pick
from theodora.serve.shaping import Shaper

PROMPT = [5, 9, 9, 30, 41]
KINDS = {
    "plain": {},
    "drawn": {"temperature": 0.9},
    "bias": {"bias": ((7, 6.0), (12, -100.0), (200, 2.5))},
    "presence": {"presence_penalty": -2.0},
    "frequency": {"frequency_penalty": 1.1, "temperature": 0.8},
    "repetition": {"repetition_penalty": 4.0},
    "all penalties": {"presence_penalty": -0.5, "frequency_penalty": 0.9, "repetition_penalty": 0.8},
    "allowed": {"allowed": (8, 9, 70, 71), "temperature": 1.3},
    "banned": {"banned": ((9,), (30, 41), (100, 101, 102)), "bias": ((30, 9.0), (41, 8.5))},
    "min_p": {"min_p": 0.2, "temperature": 1.5},
    "top_p": {"top_p": 0.7, "top_k": 40, "temperature": 1.5},
}


class OneOf:
    """A grammar of one token after the other."""

    def __init__(self, *tokens):
        self.tokens = tokens

    def start(self):
        return Way(list(self.tokens))


class Way:
    def __init__(self, tokens):
        self.left = tokens

    def mask(self, logits_V):
        kept = logits_V[self.left[0]].clone()
        logits_V.fill_(-torch.inf)
        logits_V[self.left[0]] = kept

    def accept(self, token):
        assert self.left.pop(0) == token


KINDS["grammar"] = {"grammar": OneOf(*range(60, 80)), "temperature": 1.0}


def sampling(kind, count=12):
    return Sampling(**{"max_tokens": count, "temperature": 0.0, "seed": 11, **KINDS[kind]})


def shaped(logits, generated, sampling):
    """vLLM's definitions, token by token."""
    logits = logits.clone()
    for token, bias in sampling.bias:
        logits[token] += bias
    for token in set(PROMPT) | set(generated):
        value = logits[token]
        logits[token] = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
    for token in set(generated):
        logits[token] -= sampling.frequency_penalty * generated.count(token) + sampling.presence_penalty
    if sampling.allowed is not None:
        logits[[token for token in range(len(logits)) if token not in sampling.allowed]] = -torch.inf
    for *before, last in sampling.banned:
        if generated[len(generated) - len(before) :] == before:
            logits[last] = -torch.inf
    if sampling.grammar is not None:
        kept = sampling.grammar.tokens[len(generated)]
        logits[[token for token in range(len(logits)) if token != kept]] = -torch.inf
    return logits


@torch.no_grad()
def by_hand(model, kind, count=12):
    how, generated, logprobs = sampling(kind, count), [], []
    for _ in range(count):
        logits = model(torch.tensor([PROMPT + generated])).logits[0, -1]
        numbers = (how.temperature, how.chance(len(PROMPT) + len(generated)), how.top_p, how.top_k, how.min_p)
        given = [torch.tensor([number]) for number in numbers]
        generated.append(int(pick(shaped(logits, generated, how)[None], *given, how.filters)))
        logprobs.append(float(logits.log_softmax(-1)[generated[-1]]))
    return generated, logprobs


def test_in_one_batch_each_request_is_shaped_as_alone_and_no_other_is(engine_of):
    engine, model = engine_of("llama"), alone("llama", None, None)
    requests = {kind: engine.submit(PROMPT, sampling(kind)) for kind in KINDS}
    together = {kind: last(request) for kind, request in requests.items()}
    for kind, output in together.items():
        tokens, logprobs = by_hand(model, kind)
        assert output.generated_tokens == tokens, kind
        assert output.logprobs == pytest.approx(logprobs, abs=1e-4), kind  # the model's own
        assert last(engine.submit(PROMPT, sampling(kind))).generated_tokens == tokens, kind
    answers = {kind: output.generated_tokens for kind, output in together.items()}
    assert len({tuple(tokens) for tokens in answers.values()}) == len(KINDS), answers
    assert settled(engine)


def last(request):
    while not (output := request.updates.get()).is_finished():
        assert output.error is None
    assert output.error is None
    return output


def test_an_answer_does_not_end_before_min_tokens(engine_of):
    engine = engine_of("llama")
    (first,) = last(engine.submit(PROMPT, Sampling(max_tokens=1, temperature=0.0))).generated_tokens
    how = {"max_tokens": 9, "temperature": 0.0, "stop_ids": (first,), "bias": ((first, 50.0),)}
    assert last(engine.submit(PROMPT, Sampling(**how))).generated_tokens == [first]
    found = last(engine.submit(PROMPT, Sampling(**how, min_tokens=3))).generated_tokens
    assert first not in found[:3]
    assert found[3:] == [first]


def test_a_request_that_runs_anew_goes_on_with_what_it_had(engine_of):
    """With little memory transformers ends a request and starts it again with its tokens as part of the prompt."""
    engine = engine_of("llama", kv_tokens=160, max_batch=4)
    model = alone("llama", None, None)
    kinds = ["all penalties", "banned", "grammar", "repetition"]
    requests = [engine.submit(PROMPT, sampling(kind, 20)) for kind in kinds for _ in range(3)]
    for at, request in enumerate(requests):
        assert last(request).generated_tokens == by_hand(model, kinds[at // 3], 20)[0]


def test_a_shaper_that_is_told_of_other_tokens_starts_over():
    how = Sampling(max_tokens=9, frequency_penalty=1.0, banned=((3, 4),))
    shaper, whole = Shaper(how, [1]), torch.zeros(8)
    shaper.begin(2, lambda: [3, 3])
    logits = whole.clone()
    shaper.apply(logits)
    assert logits.tolist() == [0, 0, 0, -2, -torch.inf, 0, 0, 0]
    shaper.took(torch.tensor(5))
    shaper.begin(3, lambda: pytest.fail("is known"))
    shaper.apply(logits := whole.clone())
    assert logits.tolist() == [0, 0, 0, -2, 0, -1, 0, 0]
    shaper.begin(1, lambda: [3, 3])  # the rest is to come again
    shaper.apply(logits := whole.clone())
    assert logits.tolist() == [0, 0, 0, -1, -torch.inf, 0, 0, 0]


def test_what_leaves_no_token_is_not_minded():
    shaper = Shaper(Sampling(max_tokens=9, min_tokens=5, stop_ids=(2,), grammar=OneOf(2)), [1])
    shaper.begin(0, list)
    shaper.apply(logits := torch.zeros(8))
    assert int(logits.argmax()) == 2
    assert int(logits.isfinite().sum()) == 1


def test_a_grammar_that_fails_ends_its_own_request_alone():
    shaper = Shaper(Sampling(max_tokens=9, grammar=OneOf(2)), [1])
    shaper.begin(0, list)
    shaper.apply(torch.zeros(8))
    shaper.took(torch.tensor(3))
    assert shaper.problem is not None
    shaper.begin(1, list)
    shaper.apply(logits := torch.zeros(8))
    assert logits.isfinite().all()
