"""A running OpenAI-compatible server as a form of a model: its log-probabilities over `/v1/completions`.

Every position of the probe is its own prompt, given as token ids, of which one token is asked for. That needs nothing
but the completions endpoint (vLLM, SGLang, llama.cpp, `theodora serve`), and takes the path that users' requests take.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urldefrag

from transformers import PreTrainedTokenizerBase

from theodora.errors import CheckpointError, UsageError
from theodora.export.predictions import Predictions

API_KEY = "THEODORA_API_KEY"
_PROMPTS = 8  # in one request
_TOP = 5  # most servers give no more
_TIMEOUT = 600  # seconds; a server on a CPU is slow


def is_server(name: str) -> bool:
    """Whether a form is named by a URL."""
    return name.startswith(("http://", "https://"))


class Server:
    """A model behind a URL such as `http://localhost:8000/v1#law`; after the # stands the model's name there.

    An API key is taken from the environment variable THEODORA_API_KEY.

    Raises:
        CheckpointError: nobody answers there, or there is no such model.
        UsageError: there are several models, and none is named.
    """

    def __init__(self, url: str) -> None:
        self.url, self.model = urldefrag(url)
        self.url = self.url.rstrip("/")
        if not self.url.endswith("/v1"):
            self.url += "/v1"
        names = [entry["id"] for entry in self._ask("/models").get("data", [])]
        if not self.model and len(names) != 1:
            raise UsageError(
                f"{url} serves {', '.join(names) or 'no model'}; name one, as {self.url}#{(names or ['NAME'])[0]}"
            )
        self.model = self.model or names[0]
        if self.model not in names:
            raise CheckpointError(f"{self.url} serves no {self.model!r}; it has {', '.join(names) or 'no model'}")

    def predict(self, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Predictions:
        """Log-probabilities of the likeliest tokens after each token of `ids`.

        Raises:
            CheckpointError: the server refuses, or answers without log-probabilities.
        """
        prompts = [ids[: end + 1] for end in range(len(ids))]
        tops: list[dict[int, float]] = []
        for start in range(0, len(prompts), _PROMPTS):
            tops += self._tops(prompts[start : start + _PROMPTS], tokenizer)
        if sum(map(bool, tops)) * 2 < len(tops):
            silent = len(tops) - sum(map(bool, tops))
            raise CheckpointError(
                f"{self.url} answers without log-probabilities (choices[].logprobs.top_logprobs) after {silent} of "
                f"{len(tops)} tokens. Does it allow `logprobs` on /v1/completions?"
            )
        return Predictions(None, tuple(tops))

    def _tops(self, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[dict[int, float]]:
        asked = {"model": self.model, "prompt": prompts, "max_tokens": 1, "temperature": 0, "logprobs": _TOP}
        # vLLM and `theodora serve` name tokens by their ids when asked to; others leave the field alone or refuse it.
        try:
            answer = self._ask("/completions", asked | {"return_tokens_as_token_ids": True})
        except CheckpointError:
            answer = self._ask("/completions", asked)
        choices = sorted(answer.get("choices", []), key=lambda choice: choice.get("index", 0))
        if len(choices) != len(prompts):
            raise CheckpointError(f"{self.url} gave {len(choices)} answers to {len(prompts)} prompts")
        return [self._top(choice, tokenizer) for choice in choices]

    def _top(self, choice: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[int, float]:
        """Empty where the server keeps them back, as llama.cpp does for ends of text and for parts of a character."""
        logprobs = choice.get("logprobs") or {}
        listed = (logprobs.get("content") or [{}])[0].get("top_logprobs")  # llama.cpp answers as the chat endpoint does
        if listed:
            known = {entry.get("id", _token_id(entry["token"], tokenizer)): entry["logprob"] for entry in listed}
        else:
            tops: dict[str, float] = (logprobs.get("top_logprobs") or [{}])[0] or {}
            known = {_token_id(text, tokenizer): score for text, score in tops.items()}
        return {token: float(score) for token, score in known.items() if token is not None}

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {os.environ[API_KEY]}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            raise CheckpointError(f"{self.url}{path} answers {error.code}: {said}") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.url}{path} does not answer: {error}") from error


def _token_id(text: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that a server means by its number, by its name in the vocabulary, or by its text."""
    if text.startswith("token_id:"):
        return int(text.removeprefix("token_id:"))
    vocabulary = tokenizer.get_vocab()
    if text in vocabulary:
        return vocabulary[text]
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and tokenizer.decode(ids) == text else None
