"""Llama 4's chat format, rendered straight to token ids: headers and ends of turns are ids, all text between two of
them is encoded in one piece as ordinary text. Follows Meta's published template where that is sound; it differs where
the template drops an assistant turn with empty `tool_calls`, quotes string tool results, encodes JSON arguments twice,
and prints a list-valued first user message when there are tools.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .chat_messages import ChatError, ChatMessage, ToolCall, parse_messages, parse_tools
from .tokenizer import Tokenizer

_REQUIRED = ("<|header_start|>", "<|header_end|>", "<|eot|>")
_TOOLS_INTRODUCTION = (
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)
_TOOLS_ENVIRONMENT = "Environment: ipython\n"


class Llama4Chat:
    """Renders conversations for Llama 4 instruct models. No default system prompt, no date; one BOS."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ChatError when the tokenizer lacks Llama 4's tokens."""
        if not self.suits(tokenizer):
            raise ChatError(f"the tokenizer has no {', '.join(_REQUIRED)}: it cannot speak Llama 4's chat format")
        self._encode = tokenizer.encode
        self._special = tokenizer.special_tokens
        self._begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._headers = {role: self._header(role) for role in ("system", "user", "assistant", "ipython")}

    @staticmethod
    def suits(tokenizer: Tokenizer) -> bool:
        """Whether the tokenizer has the tokens that the format cannot do without."""
        return all(name in tokenizer.special_tokens for name in _REQUIRED)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """See `ChatFormat.render`."""
        turns = parse_messages(messages)
        listing = _tool_listing(parse_tools(tools))
        tools_at = _first_user(turns) if listing else None
        ids = list(self._begin)
        for n, turn in enumerate(turns):
            text = turn.text
            if n == 0 and turn.role == "system":
                text = (_TOOLS_ENVIRONMENT if listing else "") + text.strip()
            elif n == tools_at:
                text = _TOOLS_INTRODUCTION + listing + text.strip()
            ids += self._turn(turn, text)
        if add_generation_prompt:
            ids += self._headers["assistant"] + self._encode("\n\n")
        return ids

    def _header(self, role: str) -> list[int]:
        return [self._special["<|header_start|>"], *self._encode(role), self._special["<|header_end|>"]]

    def _turn(self, turn: ChatMessage, text: str) -> list[int]:
        ids = list(self._headers["ipython" if turn.role == "tool" else turn.role])
        if turn.tool_calls:
            ids += self._encode("\n\n") + self._optional("<|python_start|>") + self._encode(text)
            ids += self._optional("<|python_end|>") + self._encode("".join(map(_call_text, turn.tool_calls)))
        else:
            ids += self._encode("\n\n" + text)
        ids.append(self._special["<|eot|>"])
        return ids

    def _optional(self, name: str) -> list[int]:
        return [self._special[name]] if name in self._special else []


def _first_user(turns: Sequence[ChatMessage]) -> int:
    for n, turn in enumerate(turns):
        if turn.role == "user":
            return n
    raise ChatError("tools are given to the model in the first user message, and there is none", param="messages")


def _tool_listing(tools: Sequence[Mapping[str, Any]]) -> str:
    return "".join(_to_json(tool, f"tools.[{i}]", indent=4) + "\n\n" for i, tool in enumerate(tools))


def _call_text(call: ToolCall) -> str:
    arguments = call.arguments if isinstance(call.arguments, str) else _to_json(call.arguments, "messages")
    return f'{{"name": {_to_json(call.name, "messages")}, "parameters": {arguments}}}'


def _to_json(value: Any, param: str, indent: int | None = None) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"cannot be written as JSON: {error}", param=param) from error
