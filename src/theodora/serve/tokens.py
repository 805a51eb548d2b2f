"""The tokenizer's routes, in vLLM's form: text or chat to tokens, and back."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse
from pydantic import Discriminator, Tag

from theodora.errors import ConfigError
from theodora.serve.bodies import body_of
from theodora.serve.chats import chat_text
from theodora.serve.daemon_threads import LONG
from theodora.serve.errors import UnknownModel
from theodora.serve.intake import Intake
from theodora.serve.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest


def _kind(body: Any) -> str:
    # Upper case, which no field has: where in the body an error is does not name it.
    return "CHAT" if isinstance(body, dict) and "messages" in body else "TEXT"


_KINDS = Annotated[
    Annotated[TokenizeChatRequest, Tag("CHAT")] | Annotated[TokenizeRequest, Tag("TEXT")], Discriminator(_kind)
]
_Tokenize = Annotated[TokenizeChatRequest | TokenizeRequest, Depends(body_of(_KINDS))]
_Detokenize = Annotated[DetokenizeRequest, Depends(body_of(DetokenizeRequest))]


def token_routes(intake: Intake) -> APIRouter:
    """The routes /tokenize, /detokenize and /tokenizer_info."""
    router, tokenizer = APIRouter(), intake.tokenizer
    most = intake.most_read

    def check(model: str | None) -> None:
        if model is not None and not intake.knows(model):
            raise UnknownModel(f"There is no model {model!r}.")

    @router.post("/tokenize")
    async def tokenize(asked: _Tokenize) -> Response:
        check(asked.model)
        chat_format = await intake.read_chat_format(asked.model or intake.engine.config.name)

        def read() -> Response:
            if isinstance(asked, TokenizeRequest):
                text = asked.prompt
            else:  # an adapter's own template, as its chats are written
                text = chat_text(tokenizer, asked, chat_format.template_of(bool(asked.tools)))[0]
            ids = intake.ids(text, asked.add_special_tokens, most)
            if len(ids) > most:
                raise ConfigError(f"The text has {len(ids)} tokens; expected at most {most}.")
            names = tokenizer.convert_ids_to_tokens(ids) if asked.return_token_strs else None
            return JSONResponse(
                {"count": len(ids), "max_model_len": intake.engine.window, "tokens": ids, "token_strs": names}
            )

        short = isinstance(asked, TokenizeRequest) and len(asked.prompt) <= LONG
        return read() if short else await intake.reading(read)

    @router.post("/detokenize")
    async def detokenize(asked: _Detokenize) -> Response:
        check(asked.model)
        if len(asked.tokens) > most:
            raise ConfigError(f"tokens holds {len(asked.tokens)} ids; expected at most {most}.")
        if asked.tokens and max(asked.tokens) >= (rows := max(len(tokenizer), intake.engine.vocabulary)):
            raise ConfigError(f"tokens holds ids outside 0 to {rows - 1}.")

        def read() -> Response:
            return JSONResponse({"prompt": tokenizer.decode(asked.tokens, clean_up_tokenization_spaces=False)})

        return read() if len(asked.tokens) <= LONG // 4 else await intake.reading(read)

    @router.get("/tokenizer_info")
    async def info() -> dict[str, Any]:
        special = {
            name: getattr(tokenizer, name, None) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        template = getattr(tokenizer, "chat_template", None)
        return {"tokenizer_class": type(tokenizer).__name__, **special, "chat_template": template}

    return router
