"""What must be true of an answer in the soak test. Knows nothing of how it was fetched."""

from __future__ import annotations

import json
from typing import Any

from soak_traffic import Ask


class Unexpected(Exception):
    """An answer that nobody asked for."""


def check_error(ask: Ask, status: int, raw: bytes) -> None:
    """An error must be the expected one, with an OpenAI body that names the parameter."""
    if status != ask.status and not (ask.deadline and status == 504):
        raise Unexpected(f"status {status} instead of {ask.status}: {raw[:300]!r}")
    try:
        error = json.loads(raw)["error"]
    except (ValueError, KeyError, TypeError) as problem:
        raise Unexpected(f"status {status} with no OpenAI body: {raw[:300]!r}") from problem
    _require(set(error) == {"message", "type", "param", "code"}, f"error object {error}")
    _require(status == 504 or error["param"] == ask.param, f"param {error['param']!r} instead of {ask.param!r}")


def check_whole(ask: Ask, raw: bytes) -> tuple[int, list[str]]:
    """(output tokens, text of each choice) of an answer that did not stream."""
    assert isinstance(ask.body, dict)
    answer = json.loads(raw)
    choices = answer["choices"]
    texts = [choice["message"]["content"] if "message" in choice else choice["text"] for choice in choices]
    reasons = [choice["finish_reason"] for choice in choices]
    tokens = _check_choices(ask.body, texts, reasons, answer["usage"])
    if ask.body.get("logprobs") not in (None, False):
        scored = [c["logprobs"]["content"] if "message" in c else c["logprobs"]["tokens"] for c in choices]
        _require(sum(map(len, scored)) == tokens, "logprobs of another number of tokens")
    return tokens, texts


def check_stream(ask: Ask, events: list[bytes]) -> tuple[int, list[str]]:
    """The same of a stream's events, `[DONE]` included."""
    assert isinstance(ask.body, dict)
    _require(bool(events), "an empty stream")
    chunks = [json.loads(event) for event in events if event != b"[DONE]"]
    if "error" in chunks[-1]:
        expected = ask.deadline and chunks[-1]["error"]["code"] == "deadline_exceeded"
        _require(expected, f"an error within the stream: {chunks[-1]}")
        return 0, []
    _require(events[-1] == b"[DONE]" and events.count(b"[DONE]") == 1, "no [DONE] at the end")
    _require(len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1, "several ids in one stream")
    count = _number_of_choices(ask.body)
    texts = [""] * count
    reasons: list[str | None] = [None] * count
    for chunk in chunks:
        for choice in chunk["choices"]:
            index = choice["index"]
            _require(reasons[index] is None, "text after the finish reason")
            texts[index] += (choice["delta"].get("content") or "") if "delta" in choice else choice["text"]
            reasons[index] = choice["finish_reason"]
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    wanted = bool((ask.body.get("stream_options") or {}).get("include_usage"))
    _require(len(usages) == int(wanted), f"{len(usages)} usage chunks")
    return _check_choices(ask.body, texts, reasons, usages[0] if usages else None), texts


def _number_of_choices(body: dict[str, Any]) -> int:
    prompt = body.get("prompt", "")
    prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    return prompts * body["n"]


def _check_choices(
    body: dict[str, Any], texts: list[str], reasons: list[str | None], usage: dict[str, Any] | None
) -> int:
    count, limit = _number_of_choices(body), body["max_tokens"]
    _require(len(texts) == count, f"{len(texts)} choices instead of {count}")
    _require(all(reason in ("stop", "length") for reason in reasons), f"finish reasons {reasons}")
    for stop in body.get("stop", ()):
        _require(not any(stop in text for text in texts), f"the stop string {stop!r} is in the text")
    if usage is None:
        return 0
    tokens = usage["completion_tokens"]
    _require(usage["total_tokens"] == usage["prompt_tokens"] + tokens, f"usage {usage}")
    _require(usage["prompt_tokens"] > 0, f"usage {usage}")
    _require(count <= tokens <= count * limit, f"{tokens} tokens in {count} choices of at most {limit}")
    if all(reason == "length" for reason in reasons):
        _require(tokens == count * limit, f"finished by length after {tokens} of {count * limit} tokens")
    return tokens


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise Unexpected(reason)
