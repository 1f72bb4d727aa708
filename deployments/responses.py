"""Bytes of answers in OpenAI's shapes: server-sent events whose constant parts are encoded once per stream, and whole
bodies. Knows nothing of HTTP, engines or how text came about."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..model.tokenizer import Tokenizer
from .generation import Delta, ScoredToken

Kind = Literal["chat", "text"]

DONE = b"data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
_LINE_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
"""Not line breaks to SSE, but to clients that split text with `str.splitlines`."""


def to_json(value: Any) -> bytes:
    return _encode(value).encode("utf-8", "replace")


def sse(value: Any) -> bytes:
    """One event with that value."""
    return b"data: " + to_json(value) + b"\n\n"


def quote(text: str) -> str:
    """`text` as a JSON string that stays on one line for every client."""
    quoted = _encode(text)
    return quoted if quoted.isascii() else quoted.translate(_LINE_BREAKS)


def usage_object(prompt_tokens: int, output_tokens: int, cached_tokens: int | None) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }
    if cached_tokens is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
    return usage


@dataclass(frozen=True, slots=True)
class Header:
    """What all parts of one answer share."""

    kind: Kind
    id: str
    created: int
    """Seconds since the epoch."""
    model: str

    def fields(self, *, chunk: bool) -> dict[str, Any]:
        name = "text_completion" if self.kind == "text" else "chat.completion"
        if chunk and self.kind == "chat":
            name += ".chunk"
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}


class StreamEncoder:
    """Encodes one stream. `null_usage` puts the `"usage": null` into each chunk that OpenAI sends when the client asked
    for usage at the end."""

    def __init__(
        self,
        header: Header,
        tokenizer: Tokenizer,
        *,
        null_usage: bool = False,
        with_logprobs: bool = False,
        with_token_ids: bool = False,
    ) -> None:
        self._header = header
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._with_token_ids = with_token_ids
        self._plain = not with_logprobs and not with_token_ids
        chat = header.kind == "chat"
        self._head = "data: " + _encode(header.fields(chunk=True))[:-1] + ',"choices":[{"index":'
        self._before_text = ',"delta":{"content":' if chat else ',"text":'
        self._after_text = "}" if chat else ""
        self._no_text = ',"delta":{}' if chat else ',"text":""'
        self._no_usage = ',"usage":null}\n\n' if null_usage else "}\n\n"

    def opening(self, index: int, prompt_ids: Sequence[int] | None = None) -> bytes:
        """The chunk that starts a choice: its role in a chat. `prompt_ids` are included where given."""
        if self._header.kind == "text":
            if prompt_ids is None:
                return b""
            ids = _encode(list(prompt_ids))
            body = f'{self._no_text},"logprobs":null,"finish_reason":null,"prompt_token_ids":{ids}}}]'
        else:
            body = ',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
            if prompt_ids is not None:
                body += f',"prompt_token_ids":{_encode(list(prompt_ids))}'
        return f"{self._head}{index}{body}{self._no_usage}".encode()

    def delta(self, index: int, delta: Delta, usage: dict[str, Any] | None = None) -> bytes:
        """Chunks for what was added to a choice; empty if nothing is to be said yet. With `usage` each chunk has it."""
        tail = self._no_usage if usage is None else f',"usage":{_encode(usage)}}}\n\n'
        if delta.finish_reason is None:
            return self._text(index, delta, tail).encode() if delta.text else b""
        end = f'"finish_reason":"{delta.finish_reason}"'
        if delta.text:
            start = self._text(index, delta, tail)
            return f'{start}{self._head}{index}{self._no_text},"logprobs":null,{end}}}]{tail}'.encode()
        return f"{self._head}{index}{self._no_text},{self._details(delta)},{end}{self._ids(delta)}}}]{tail}".encode()

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk before the end that holds nothing but the usage."""
        return sse(self._header.fields(chunk=True) | {"choices": [], "usage": usage})

    def _text(self, index: int, delta: Delta, tail: str) -> str:
        start = f"{self._head}{index}{self._before_text}{quote(delta.text)}{self._after_text}"
        if self._plain:
            return f'{start},"logprobs":null,"finish_reason":null}}]{tail}'
        return f'{start},{self._details(delta)},"finish_reason":null{self._ids(delta)}}}]{tail}'

    def _details(self, delta: Delta) -> str:
        if not self._with_logprobs:
            return '"logprobs":null'
        return f'"logprobs":{_encode(logprobs_object(self._header.kind, delta.scored, self._tokenizer))}'

    def _ids(self, delta: Delta) -> str:
        return f',"token_ids":{_encode(delta.token_ids)}' if self._with_token_ids else ""


@dataclass(slots=True)
class WholeChoice:
    """A finished choice, put together from its deltas."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    scored: list[ScoredToken] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_ids: Sequence[int] = ()

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.scored += delta.scored
        self.finish_reason = delta.finish_reason or self.finish_reason


def whole_body(
    header: Header,
    choices: Sequence[WholeChoice],
    usage: dict[str, Any],
    tokenizer: Tokenizer,
    *,
    with_logprobs: bool = False,
    with_token_ids: bool = False,
) -> bytes:
    """The answer of a request that does not stream."""
    objects = []
    for index, choice in enumerate(choices):
        item: dict[str, Any] = {"index": index}
        if header.kind == "chat":
            item["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
        else:
            item["text"] = choice.text
        item["logprobs"] = logprobs_object(header.kind, choice.scored, tokenizer) if with_logprobs else None
        item["finish_reason"] = choice.finish_reason
        if with_token_ids:
            item["token_ids"] = choice.token_ids
            if header.kind == "text":
                item["prompt_token_ids"] = list(choice.prompt_ids)
        objects.append(item)
    body = header.fields(chunk=False) | {"choices": objects, "usage": usage}
    if with_token_ids and header.kind == "chat":
        body["prompt_token_ids"] = list(choices[0].prompt_ids)
    return to_json(body)


def logprobs_object(kind: Kind, scored: Sequence[ScoredToken], tokenizer: Tokenizer) -> dict[str, Any]:
    if kind == "chat":
        content = []
        for token in scored:
            top = [_chat_logprob(i, value, tokenizer) for i, value in token.top]
            content.append(_chat_logprob(token.token_id, token.logprob, tokenizer) | {"top_logprobs": top})
        return {"content": content, "refusal": None}
    text = tokenizer.token_text
    tops = []
    for token in scored:
        # The drawn token comes along even where it is none of the most likely; equal spellings keep the likelier one.
        pairs = [(token.token_id, token.logprob), *token.top]
        tops.append({text(i): value for i, value in sorted(pairs, key=lambda pair: pair[1])})
    return {
        "tokens": [text(token.token_id) for token in scored],
        "token_logprobs": [token.logprob for token in scored],
        "top_logprobs": [dict(reversed(top.items())) for top in tops],
        "text_offset": [token.offset for token in scored],
    }


def _chat_logprob(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    text = tokenizer.token_text(token_id)
    data = tokenizer.token_bytes(token_id) or text.encode()
    return {"token": text, "logprob": logprob, "bytes": list(data)}
