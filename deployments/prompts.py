"""From a checked body to prompts in token ids, with room for the output. The refusals that need token counts are made
here; knows nothing of HTTP or engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..cluster.errors import ContextLengthExceeded, RequestError
from ..model.chat_format import ChatError
from .protocol import GenerationBody, check_vocabulary
from .protocol_chat import ChatBody, ChatInput
from .protocol_completions import DEFAULT_MAX_TOKENS, CompletionBody, Prompt
from .service import Service


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """One prompt and how many tokens may follow it."""

    ids: list[int]
    max_tokens: int
    echo: str = ""
    """Text that the answer starts with."""


async def chat_ids(service: Service, body: ChatInput) -> list[int]:
    """The conversation as the chat format renders it. Raises RequestError naming what cannot be rendered."""
    generate = body.add_generation_prompt is not False
    size = sum(_characters(message) for message in body.messages)

    def render() -> list[int]:
        return service.chat_format.render(body.messages, body.tool_dicts(), add_generation_prompt=generate)

    try:
        return await service.off_loop(size, render)
    except ChatError as error:
        raise RequestError(error.message, param=error.param) from None


async def text_ids(service: Service, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The text's ids after the model's beginning-of-sequence token, if it has one."""
    ids = await service.off_loop(len(text), service.tokenizer.encode, text)
    bos_id = service.tokenizer.bos_id
    return [bos_id, *ids] if add_special_tokens and bos_id is not None else ids


async def plan_chat(service: Service, body: ChatBody) -> list[PromptPlan]:
    """The one prompt of a chat; the output may fill the rest of the context unless the user bounded it."""
    ids = await chat_ids(service, body)
    if not ids:
        raise RequestError("the messages render to an empty prompt", param="messages")
    return [PromptPlan(ids, output_room(service, body, len(ids), "messages", None))]


async def plan_completions(service: Service, body: CompletionBody) -> list[PromptPlan]:
    plans = []
    for prompt in body.prompt:
        ids = await _completion_ids(service, body, prompt)
        room = output_room(service, body, len(ids), "prompt", DEFAULT_MAX_TOKENS)
        plans.append(PromptPlan(ids, room, _echo(service, prompt) if body.echo else ""))
    return plans


async def _completion_ids(service: Service, body: CompletionBody, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        ids = await text_ids(service, prompt, add_special_tokens=body.add_special_tokens is not False)
    else:
        ids = prompt
        check_vocabulary("prompt", ids, service.limits.vocab_size)
    if not ids:
        raise RequestError("the prompt is empty: at least one token is needed", param="prompt")
    return ids


def _echo(service: Service, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt)


def output_room(service: Service, body: GenerationBody, prompt_tokens: int, where: str, default: int | None) -> int:
    """How many tokens may be generated. Raises ContextLengthExceeded, with OpenAI's wording, where a prompt leaves no
    room, or less than the user asked for; a `default` gives way instead."""
    limit = service.limits.max_model_len
    room = limit - prompt_tokens
    name, asked = body.token_limit
    if asked is not None and asked > room:
        total = prompt_tokens + asked
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limit} tokens. However, you requested {total} tokens "
            f"({prompt_tokens} in the {where}, {asked} in the completion). "
            f"Please reduce the length of the {where} or the completion.",
            param=where if room < 1 else name,
            limit=limit,
            requested=total,
        )
    if room < 1:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limit} tokens. However, your {where} resulted in "
            f"{prompt_tokens} tokens, which leaves no room for a completion. Please reduce the length of the {where}.",
            param=where,
            limit=limit,
            requested=prompt_tokens + 1,
        )
    if asked is not None:
        return asked
    if body.min_tokens is not None and body.min_tokens > room:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{prompt_tokens + body.min_tokens} tokens ({prompt_tokens} in the {where}, at least {body.min_tokens} in "
            "the completion).",
            param="min_tokens",
            limit=limit,
            requested=prompt_tokens + body.min_tokens,
        )
    return room if default is None else min(max(default, body.min_tokens or 0), room)


def visible_text(service: Service, ids: Sequence[int]) -> str:
    """The ids as text with special tokens by name: the inverse of tokenizing for people to read."""
    tokenizer = service.tokenizer
    data = b"".join(tokenizer.token_bytes(i) or tokenizer.token_text(i).encode() for i in ids)
    return data.decode("utf-8", "replace")


def _characters(value: Any) -> int:
    """Roughly how much text a message holds."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0
