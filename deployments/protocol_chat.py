"""The body of /v1/chat/completions, checked except for the insides of messages, which the chat format checks when it
renders them. Knows nothing of tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from ..cluster.errors import RequestError
from .protocol import INT64_MAX, GenerationBody, Limits, invalid, unsupported


def _check_tool_choice(value: Any) -> Any:
    if value in ("none", "auto"):
        return value
    if value == "required" or isinstance(value, dict):
        unsupported("only 'none' and 'auto' are supported yet")
    return invalid("must be 'none' or 'auto'")


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "array", "items": _PART}]},
        "tool_calls": {"type": "array", "items": {"type": "object"}},
        "tool_call_id": {"type": "string"},
        "name": {"type": "string"},
    },
    "required": ["role"],
}
Message = Annotated[dict[str, Any], WithJsonSchema(_MESSAGE)]
"""Its fields are checked by the chat format, which reads them."""
ToolChoice = Annotated[Any, AfterValidator(_check_tool_choice), WithJsonSchema({"enum": ["none", "auto"]})]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class Function(_Part):
    name: str = Field(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Part):
    type: Literal["function"]
    function: Function


class ChatInput(BaseModel):
    """What is rendered into a prompt: also part of /tokenize."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None

    def tool_dicts(self) -> list[dict[str, Any]] | None:
        return [t.model_dump(exclude_none=True) for t in self.tools] if self.tools else None


class ChatBody(ChatInput, GenerationBody):
    """Body of POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(default=None, ge=1, le=INT64_MAX)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0)
    tool_choice: ToolChoice | None = None

    @property
    def token_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def tool_dicts(self) -> list[dict[str, Any]] | None:
        """With tool_choice 'none' the model is not told of the tools: nothing else keeps it from calling them."""
        return None if self.tool_choice == "none" else super().tool_dicts()

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if self.top_logprobs is not None:
            if not self.logprobs:
                raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
            if self.top_logprobs > limits.max_logprobs:
                raise RequestError(
                    f"top_logprobs must be at most {limits.max_logprobs}, got {self.top_logprobs}",
                    param="top_logprobs",
                )
