"""A small OpenAI client for our own commands: streams text from a server and says what went wrong in one line. Knows
nothing of terminals."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

_CONNECT_S = 5.0


class ServerError(Exception):
    """The server cannot be reached, or answered an error; the message is for the user."""


@dataclass
class Usage:
    """What one streamed answer took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    """From sending the request."""
    total_s: float = 0.0
    finish_reason: str | None = None
    began: float = field(default_factory=time.perf_counter)

    @property
    def tokens_per_s(self) -> float | None:
        """Rate after the first token; None when there is too little to tell."""
        if self.first_token_s is None or self.completion_tokens < 2 or self.total_s <= self.first_token_s:
            return None
        return (self.completion_tokens - 1) / (self.total_s - self.first_token_s)


class Client:
    """Talks to one server. Close it, or use it in a `with`."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A long answer may pause for long; a server that is not there should be noticed at once.
        timeout = httpx.Timeout(None, connect=_CONNECT_S)
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(base_url=self.url, timeout=timeout, headers=headers)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """Served names. Raises ServerError."""
        with _explained(self.url):
            return [model["id"] for model in _checked(self._http.get("/v1/models")).json()["data"]]

    def stream_chat(self, body: Mapping[str, Any], usage: Usage) -> Iterator[str]:
        """The answer's text, piece by piece; `usage` is filled in. Raises ServerError."""
        for choice in self._stream("/v1/chat/completions", body, usage):
            yield choice.get("delta", {}).get("content") or ""

    def stream_completion(self, body: Mapping[str, Any], usage: Usage) -> Iterator[str]:
        """As `stream_chat`, for /v1/completions."""
        for choice in self._stream("/v1/completions", body, usage):
            yield choice.get("text") or ""

    def _stream(self, path: str, body: Mapping[str, Any], usage: Usage) -> Iterator[Mapping[str, Any]]:
        wanted = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with _explained(self.url), self._http.stream("POST", path, json=wanted) as response:
            if response.status_code != 200:
                response.read()
                _checked(response)
            finished = False
            for line in response.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    finished = True
                    break
                yield from _choices(json.loads(data), usage)
            usage.total_s = time.perf_counter() - usage.began
            if not finished:
                raise ServerError("the server ended the answer before it was complete")


class _explained:
    """Turns what httpx raises into ServerError."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            raise ServerError(f"nothing answers at {self.url}; start a server with: herd serve") from error
        if isinstance(error, httpx.HTTPError | httpx.InvalidURL):
            raise ServerError(f"{self.url}: {error or type(error).__name__}") from error
        if isinstance(error, json.JSONDecodeError | KeyError | TypeError):
            raise ServerError(f"{self.url} does not answer like an OpenAI server") from error


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:300] or response.reason_phrase
    raise ServerError(f"{response.status_code}: {message}")


def _choices(chunk: Mapping[str, Any], usage: Usage) -> Iterator[Mapping[str, Any]]:
    if error := chunk.get("error"):
        raise ServerError(str(error.get("message", error)))
    if counts := chunk.get("usage"):
        usage.prompt_tokens, usage.completion_tokens = counts["prompt_tokens"], counts["completion_tokens"]
    for choice in chunk.get("choices", ()):
        text = choice.get("text") or choice.get("delta", {}).get("content")
        if text and usage.first_token_s is None:
            usage.first_token_s = time.perf_counter() - usage.began
        usage.finish_reason = choice.get("finish_reason") or usage.finish_reason
        yield choice
