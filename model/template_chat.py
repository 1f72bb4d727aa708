"""A checkpoint's own jinja chat template, rendered in a sandbox as Hugging Face does it, except that strings of
messages and tools cannot spell special tokens: their spellings are broken before rendering and mended afterwards,
between the special tokens that the template itself wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .chat_messages import ChatError, ChatMessage, parse_messages, parse_tools
from .tokenizer import Tokenizer

MAX_TEMPLATE_CHARS = 1 << 20
_RENDER_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template's expressions can raise on values that its author did not foresee."""


class TemplateChat:
    """Renders conversations through a checkpoint's template."""

    def __init__(self, templates: Mapping[str, str], tokenizer: Tokenizer) -> None:
        """`templates` by name: "default", and "tool_use" where tools have their own. Raises ChatError when one is too
        large or is not valid jinja."""
        self._tokenizer = tokenizer
        self._special = tokenizer.special_text
        environment = self._environment()
        self._templates = {}
        for name, source in templates.items():
            if len(source) > MAX_TEMPLATE_CHARS:
                raise ChatError(f"the chat template {name!r} has more than {MAX_TEMPLATE_CHARS} characters")
            try:
                self._templates[name] = environment.from_string(source)
            except (TemplateError, RecursionError) as error:
                raise ChatError(f"the chat template {name!r} is not valid: {error}") from error
        if not self._templates:
            raise ChatError("this model has no chat template; use /v1/completions")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """See `ChatFormat.render`."""
        turns = parse_messages(messages)
        tool_list = parse_tools(tools)
        name = "tool_use" if tool_list and "tool_use" in self._templates else "default"
        template = self._templates.get(name) or next(iter(self._templates.values()))
        disarm = self._special.disarm
        try:
            text = template.render(
                **self._tokenizer.named_tokens,
                messages=[_template_message(turn, disarm) for turn in turns],
                tools=_map_strings(tool_list, disarm) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except _RENDER_ERRORS as error:
            what = str(error) or type(error).__name__
            raise ChatError(f"the model's chat template refuses these messages: {what}", param="messages") from error
        return self._tokenizer.encode_with_special(text, self._special.restore)

    def _environment(self) -> ImmutableSandboxedEnvironment:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
        )
        environment.filters["tojson"] = self._to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        return environment

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Jinja's own filter escapes HTML. JSON is written from the mended strings, so that no mark is escaped into
        text, and its spellings are broken again."""
        plain = _map_strings(value, self._special.restore)
        text = json.dumps(plain, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return self._special.disarm(text)


def read_templates(model_dir: Path) -> dict[str, str]:
    """A checkpoint's chat templates by name, from chat_template.jinja, chat_template.json or tokenizer_config.json;
    empty when there is none. Raises ChatError when a file cannot be read."""
    if (file := model_dir / "chat_template.jinja").is_file():
        try:
            return {"default": file.read_text(encoding="utf-8")}
        except ValueError as error:
            raise ChatError(f"{file} is not UTF-8 text") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = model_dir / name
        if not file.is_file():
            continue
        try:
            found = _named_templates(json.loads(file.read_text(encoding="utf-8")).get("chat_template"))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ChatError(f"{file} holds no readable chat_template: {error}") from error
        if found:
            return found
    return {}


def _named_templates(value: str | list[dict[str, str]] | None) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    return {entry["name"]: entry["template"] for entry in value}


def _template_message(turn: ChatMessage, disarm: Callable[[str], str]) -> dict[str, Any]:
    """A message as templates expect it: content a string, arguments an object, no empty or null fields."""
    handled = ("role", "content", "tool_calls")
    rest = {key: value for key, value in turn.source.items() if key not in handled and value is not None}
    message = {"role": turn.role, "content": disarm(turn.text)} | _map_strings(rest, disarm)
    if turn.tool_calls:
        sources = turn.source["tool_calls"]
        calls = [
            {**source, "function": {**source["function"], "arguments": call.arguments}}
            for source, call in zip(sources, turn.tool_calls, strict=True)
        ]
        message["tool_calls"] = _map_strings(calls, disarm)
    return message


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The same JSON value with every string in it changed, keys as well."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's tokens for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
