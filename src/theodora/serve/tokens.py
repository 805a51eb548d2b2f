"""The tokenizer's routes, in vLLM's form: text or chat to tokens, and back."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Discriminator, Tag

from theodora.errors import ConfigError
from theodora.serve.answers import Desk
from theodora.serve.chats import chat_text
from theodora.serve.engine import UnknownModel
from theodora.serve.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest


def _kind(body: Any) -> str:
    # Upper case, which no field has: where in the body an error is does not name it.
    return "CHAT" if isinstance(body, dict) and "messages" in body else "TEXT"


_Tokenize = Annotated[
    Annotated[TokenizeChatRequest, Tag("CHAT")] | Annotated[TokenizeRequest, Tag("TEXT")], Discriminator(_kind)
]


def token_routes(desk: Desk) -> APIRouter:
    """The routes /tokenize, /detokenize and /tokenizer_info."""
    router, tokenizer = APIRouter(), desk.tokenizer

    async def text_of(asked: TokenizeRequest | TokenizeChatRequest) -> str:
        if isinstance(asked, TokenizeRequest):
            return asked.prompt
        own = None if asked.model is None else (await asyncio.to_thread(desk.manner, asked.model)).template
        return chat_text(tokenizer, asked, own)[0]

    def check(model: str | None) -> None:
        if model is not None and not desk.knows(model):
            raise UnknownModel(f"There is no model {model!r}.")

    @router.post("/tokenize")
    async def tokenize(asked: _Tokenize) -> dict[str, Any]:
        check(asked.model)
        ids = await desk.encode(await text_of(asked), asked.add_special_tokens)
        names = tokenizer.convert_ids_to_tokens(ids) if asked.return_token_strs else None
        return {"count": len(ids), "max_model_len": desk.engine.window, "tokens": ids, "token_strs": names}

    @router.post("/detokenize")
    async def detokenize(asked: DetokenizeRequest) -> dict[str, Any]:
        check(asked.model)
        if asked.tokens and max(asked.tokens) >= (most := max(len(tokenizer), desk.engine.vocabulary)):
            raise ConfigError(f"tokens holds ids outside 0 to {most - 1}.")
        return {"prompt": tokenizer.decode(asked.tokens, clean_up_tokenization_spaces=False)}

    @router.get("/tokenizer_info")
    async def info() -> dict[str, Any]:
        told = {name: getattr(tokenizer, name, None) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        template = getattr(tokenizer, "chat_template", None)
        return {"tokenizer_class": type(tokenizer).__name__, **told, "chat_template": template}

    return router
