"""The endpoints: each reads its body, plans and answers. Routing is `http_app.py`'s, the HTTP edge `exchange.py`'s."""

from __future__ import annotations

from typing import Any, TypeVar

from .exchange import Exchange
from .generate import Generation
from .http_errors import MissingParameter
from .prompts import chat_ids, plan_chat, plan_completions, text_ids, visible_text
from .protocol import Body, GenerationBody, check_vocabulary, parse_body
from .protocol_chat import ChatBody
from .protocol_completions import CompletionBody, DetokenizeBody, TokenizeChatBody, TokenizeCompletionBody
from .responses import to_json
from .service import Service

BodyT = TypeVar("BodyT", bound=Body)


async def chat_completions(exchange: Exchange) -> None:
    """POST /v1/chat/completions"""
    body = _read(exchange, ChatBody)
    model = _accept(exchange, body)
    plans = await plan_chat(exchange.service, body)
    await Generation(exchange, "chat", model, body, plans).run()


async def completions(exchange: Exchange) -> None:
    """POST /v1/completions"""
    body = _read(exchange, CompletionBody)
    model = _accept(exchange, body)
    plans = await plan_completions(exchange.service, body)
    await Generation(exchange, "text", model, body, plans).run()


async def tokenize(exchange: Exchange) -> None:
    """POST /tokenize with a prompt or with messages."""
    service = exchange.service
    kind = parse_body(Body, exchange.raw_body).model_extra or {}
    if "messages" not in kind and "prompt" not in kind:
        raise MissingParameter("Missing required parameter: 'prompt' (or 'messages').", param="prompt")
    if "messages" in kind:
        body = _read(exchange, TokenizeChatBody)
        service.resolve_model(body.model)
        ids = await chat_ids(service, body)
    else:
        body = _read(exchange, TokenizeCompletionBody)
        service.resolve_model(body.model)
        ids = await text_ids(service, body.prompt, add_special_tokens=body.add_special_tokens is not False)
    texts = [service.tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
    answer = {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids, "token_strs": texts}
    await exchange.reply(to_json(answer))


async def detokenize(exchange: Exchange) -> None:
    """POST /detokenize"""
    service = exchange.service
    body = _read(exchange, DetokenizeBody)
    service.resolve_model(body.model)
    check_vocabulary("tokens", body.tokens, service.vocab_size)
    await exchange.reply(to_json({"prompt": visible_text(service, body.tokens)}))


def model_object(service: Service, name: str) -> dict[str, Any]:
    """One entry of /v1/models. `max_model_len` is there once an engine has said it."""
    model = {"id": name, "object": "model", "created": service.created, "owned_by": "herd"}
    model |= {"root": service.served_names[0], "parent": None}
    return model | ({"max_model_len": service.max_model_len} if service.max_model_len is not None else {})


def _read(exchange: Exchange, shape: type[BodyT]) -> BodyT:
    body = parse_body(shape, exchange.raw_body)
    exchange.ignored = list(body.model_extra or ())
    return body


def _accept(exchange: Exchange, body: GenerationBody) -> str:
    """Everything that can be refused without looking at the text. Returns the name of the model."""
    exchange.take_request_id(body.request_id)
    model = exchange.service.resolve_model(body.model)
    body.check(exchange.service.limits)
    return model
