"""The choice of a chat format for a checkpoint: Llama 4's own renderer, or the checkpoint's jinja template. What a
format does with a conversation is the renderers' matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from .chat_messages import ChatError
from .llama4_chat import Llama4Chat
from .template_chat import TemplateChat, read_templates
from .tokenizer import Tokenizer

__all__ = ["ChatError", "ChatFormat", "load_chat_format"]


class ChatFormat(Protocol):
    """Turns a conversation into the prompt's token ids."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Messages and tools in OpenAI's shape. Special tokens come from the format alone, never from the strings of
        messages and tools. Raises ChatError, whose `param` names the field at fault."""
        ...


def load_chat_format(
    model_dir: Path | None, tokenizer: Tokenizer, choice: Literal["auto", "llama4", "template"] = "auto"
) -> ChatFormat:
    """The format of a checkpoint. `auto` prefers Llama 4's own renderer where the tokenizer has its tokens.

    Raises ChatError when the checkpoint cannot be used for chat in the chosen way.
    """
    if choice == "llama4" or (choice == "auto" and Llama4Chat.suits(tokenizer)):
        return Llama4Chat(tokenizer)
    templates = read_templates(model_dir) if model_dir is not None else {}
    if not templates:
        raise ChatError("this model has no chat template; use /v1/completions")
    return TemplateChat(templates, tokenizer)
