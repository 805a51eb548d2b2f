"""What runs of grpo are made of and held against: a tiny model that ends its answers, functions that reward them, and
what a training pass says of the tokens."""

import os
import signal
from pathlib import Path

import torch

import tiny

ENDS = [2, *range(60, 100)]


def saved(model, path):
    """The folder of a tiny model that ends what it says after some seven tokens."""
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(path)
    tiny.tiny_tokenizer().save_pretrained(path)
    return str(path)


def reward(name):
    """How `reward` names one of the functions below."""
    return f"{__file__}:{name}"


def low(completion_ids, **kwargs):
    """The share of low tokens."""
    return [sum(token < 136 for token in ids) / len(ids) for ids in completion_ids]


def alike(completions):
    return [0.3] * len(completions)


def of_rows(prompts, completions, completion_ids, n, kind, reference, trainer_state):
    """Looks whether all that belongs together comes together, and gives the number of tokens."""
    tried = trainer_state.max_steps == 0  # with the rows' own references, beforehand
    assert tried or len(n) == {"train": 8, "held out": 2}[kind[0]]
    assert len(prompts) == len(completions) == len(completion_ids) == len(n)
    assert set(kind) == {kind[0]}
    for prompt, number, right in zip(prompts, n, reference, strict=True):
        assert prompt == [{"role": "user", "content": f"number {number}?"}]
        assert right == f"it is {number}"
    if kind[0] == "train" and not tried:
        assert len(set(n)) == 2
        assert n == sorted(n, key=n.index)  # those of a prompt one after the other
    assert all(turns[0]["role"] == "assistant" for turns in completions)
    return [len(ids) for ids in completion_ids]


def belongs(prompts, completions, completion_ids, n, reference):
    """Of rows some of which are left out, and some held out."""
    assert len(prompts) == len(completions) == len(completion_ids) == len(n)
    assert [prompt.split()[0] for prompt in prompts] == [f"number{number}" for number in n]
    assert reference == [f"it is {number}" for number in n]
    return [number + len(ids) / 100 for number, ids in zip(n, completion_ids, strict=True)]


def stops(completion_ids, trainer_state, **kwargs):
    """Sends SIGTERM at the third step, if a file asks for it."""
    flag = Path(os.environ.get("THEODORA_TEST_STOP", "none"))
    if trainer_state.global_step == 2 and flag.exists():
        flag.unlink()
        os.kill(os.getpid(), signal.SIGTERM)
    return low(completion_ids)


def fails(completion_ids, trainer_state, **kwargs):
    """In the second process, at the third step."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank() and trainer_state.global_step == 2:
        raise OSError("no more rewards")
    return low(completion_ids)


@torch.no_grad()
def forward_logps(model, prompt, tokens, temperature):
    """Of the tokens, by one pass of the trainer's kind over everything."""
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def tokens_of(completions):
    return [each.tokens for each in completions]
