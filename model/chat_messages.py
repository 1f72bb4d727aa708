"""What a conversation may look like: checks messages and tools in OpenAI's shape and brings them into one plain form
for the renderers. Knows no special token and no prompt format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
_IMAGE_PARTS = ("image", "image_url", "input_image")


class ChatError(ValueError):
    """A conversation that cannot be rendered. The message is fit for the user; `param` is the path of the culprit."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant made."""

    name: str
    arguments: dict[str, Any] | str
    """By name; a string when the model's own text was not a JSON object, to be shown as it was."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One checked message; `developer` has become `system`."""

    role: str
    text: str
    tool_calls: tuple[ToolCall, ...]
    source: Mapping[str, Any]
    """The message as it was sent."""


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> list[ChatMessage]:
    """Check a conversation. Raises ChatError naming the first fault as `messages.[i].field`."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ChatError("messages must be a list with at least one message", param="messages")
    return [_parse_message(message, f"messages.[{i}]") for i, message in enumerate(messages)]


def parse_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Check that the tools are objects; None means none. Raises ChatError naming the first that is not."""
    for i, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping):
            raise ChatError("a tool must be an object", param=f"tools.[{i}]")
    return [dict(tool) for tool in tools or ()]


def _parse_message(message: Any, path: str) -> ChatMessage:
    if not isinstance(message, Mapping):
        raise ChatError("a message must be an object", param=path)
    role = message.get("role")
    if role not in ROLES:
        raise ChatError(f"role must be one of {', '.join(ROLES)}, not {role!r}", param=f"{path}.role")
    tool_calls = _parse_tool_calls(message.get("tool_calls"), f"{path}.tool_calls")
    if tool_calls and role != "assistant":
        raise ChatError("only an assistant message may carry tool calls", param=f"{path}.tool_calls")
    content = message.get("content")
    if content is None and not tool_calls:
        needs = "content or tool_calls" if role == "assistant" else "content"
        raise ChatError(f"the {role} message has no {needs}", param=f"{path}.content")
    text = _parse_content(content, f"{path}.content")
    return ChatMessage("system" if role == "developer" else role, text, tool_calls, message)


def _parse_content(content: Any, path: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ChatError("content must be a string or a list of parts", param=path)
    return "".join(_parse_part(part, path, i) for i, part in enumerate(content))


def _parse_part(part: Any, path: str, index: int) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _IMAGE_PARTS:
        raise ChatError("images are not supported yet; send text parts only", param=path)
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ChatError(f'part {index} is not {{"type": "text", "text": "..."}}', param=path)
    return part["text"]


def _parse_tool_calls(calls: Any, path: str) -> tuple[ToolCall, ...]:
    if calls is None:
        return ()
    if isinstance(calls, str) or not isinstance(calls, Sequence):
        raise ChatError("tool_calls must be a list", param=path)
    return tuple(_parse_tool_call(call, f"{path}.[{i}]") for i, call in enumerate(calls))


def _parse_tool_call(call: Any, path: str) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ChatError("a tool call needs a function with a name", param=f"{path}.function.name")
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        return ToolCall(function["name"], dict(arguments))
    if arguments is not None and not isinstance(arguments, str):
        raise ChatError("arguments must be a JSON object, as text or as it is", param=f"{path}.function.arguments")
    return ToolCall(function["name"], _parse_arguments(arguments or ""))


def _parse_arguments(text: str) -> dict[str, Any] | str:
    """A model may have written broken JSON, and its conversation must still be accepted when it comes back."""
    if not text.strip():
        return {}
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return parsed if isinstance(parsed, dict) else text
