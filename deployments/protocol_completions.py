"""The body of /v1/completions, checked, and those of /tokenize and /detokenize. Knows nothing of tokenizers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, WithJsonSchema

from ..cluster.errors import RequestError
from .protocol import Body, GenerationBody, Limits, TokenIds, invalid, unsupported
from .protocol_chat import ChatInput

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 256

Prompt = str | list[int]


def _check_prompt(value: Any) -> list[Prompt]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        invalid("must be a string, a list of token ids, or a non-empty list of either")
    if all(type(i) is int for i in value):
        return [value]
    if len(value) > MAX_PROMPTS:
        invalid(f"at most {MAX_PROMPTS} prompts are allowed, {len(value)} were given")
    if all(isinstance(item, str) for item in value):
        return value
    if all(isinstance(item, list) and item and all(type(i) is int for i in item) for item in value):
        return value
    return invalid(
        "must be a string, a list of token ids, or a list that holds only strings or only lists of token ids"
    )


def _refuse(value: Any) -> Any:
    if value is not None:
        unsupported("is not supported")
    return value


_ID_LIST = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
Prompts = Annotated[
    Any,
    AfterValidator(_check_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                _ID_LIST,
                {"type": "array", "items": _ID_LIST, "minItems": 1},
            ]
        }
    ),
]
Refused = Annotated[Any, AfterValidator(_refuse), WithJsonSchema({"type": "null"})]


class CompletionBody(GenerationBody):
    """Body of POST /v1/completions; `prompt` becomes a list of texts or of id lists."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0)
    add_special_tokens: bool | None = None
    suffix: Refused = None
    best_of: Refused = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if self.logprobs is not None and self.logprobs > limits.max_logprobs:
            raise RequestError(f"logprobs must be at most {limits.max_logprobs}, got {self.logprobs}", param="logprobs")
        if self.echo and self.logprobs is not None:
            raise RequestError("echo together with logprobs is not supported yet", param="echo")


class TokenizeCompletionBody(Body):
    """Body of POST /tokenize with a text."""

    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatBody(ChatInput, Body):
    """Body of POST /tokenize with messages."""

    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """Body of POST /detokenize."""

    tokens: TokenIds
