"""Wrong requests, as the real client and raw HTTP send them: the right status, and a body that names the parameter."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from .live_app import CALL_S, LiveApp

USER = {"role": "user", "content": "hi"}

BAD_CHATS: list[tuple[str, dict[str, Any], str]] = [
    ("temperature", {"temperature": 2.5}, "temperature"),
    ("temperature of text", {"temperature": "hot"}, "temperature"),
    ("top_p", {"top_p": 0}, "top_p"),
    ("top_k", {"top_k": -2}, "top_k"),
    ("min_p", {"min_p": 1.5}, "min_p"),
    ("presence_penalty", {"presence_penalty": 3}, "presence_penalty"),
    ("frequency_penalty", {"frequency_penalty": -3}, "frequency_penalty"),
    ("repetition_penalty", {"repetition_penalty": 0}, "repetition_penalty"),
    ("no choice", {"n": 0}, "n"),
    ("too many choices", {"n": 129}, "n"),
    ("max_tokens", {"max_tokens": 0}, "max_tokens"),
    ("max_tokens as a fraction", {"max_tokens": 1.5}, "max_tokens"),
    ("max_completion_tokens", {"max_completion_tokens": -1}, "max_completion_tokens"),
    ("min_tokens above max_tokens", {"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ("seed", {"seed": 2**63}, "seed"),
    ("empty stop", {"stop": [""]}, "stop"),
    ("too many stops", {"stop": ["x"] * 17}, "stop"),
    ("stop_token_ids beyond the vocabulary", {"stop_token_ids": [10**6]}, "stop_token_ids"),
    ("a bias of no token", {"logit_bias": {"sheep": 1}}, "logit_bias"),
    ("a bias too large", {"logit_bias": {"5": 101}}, "logit_bias"),
    ("a bias beyond the vocabulary", {"logit_bias": {"99999": 1}}, "logit_bias"),
    ("top_logprobs without logprobs", {"top_logprobs": 2}, "top_logprobs"),
    ("too many top_logprobs", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("stream_options without stream", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("stream", {"stream": "yes"}, "stream"),
    ("response_format", {"response_format": {"type": "json_object"}}, "response_format.type"),
    ("tool_choice", {"tool_choice": "required"}, "tool_choice"),
    ("tools", {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.[0].function.name"),
    ("no messages", {"messages": []}, "messages"),
    ("messages of text", {"messages": "hi"}, "messages"),
    ("unknown role", {"messages": [USER, {"role": "wizard", "content": "x"}]}, "messages.[1].role"),
    ("no content", {"messages": [{"role": "user"}]}, "messages.[0].content"),
    ("an image", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages.[0].content"),
    ("priority", {"priority": 2**31}, "priority"),
    ("request_id", {"request_id": "a b"}, "request_id"),
]  # fmt: skip

BAD_COMPLETIONS: list[tuple[str, dict[str, Any], str]] = [
    ("no prompt", {"prompt": None}, "prompt"),
    ("empty list", {"prompt": []}, "prompt"),
    ("no token at all", {"prompt": "", "add_special_tokens": False}, "prompt"),
    ("a number", {"prompt": 5}, "prompt"),
    ("mixed list", {"prompt": ["a", [1]]}, "prompt"),
    ("ids beyond the vocabulary", {"prompt": [1, 10**6]}, "prompt"),
    ("negative ids", {"prompt": [[-1]]}, "prompt"),
    ("too many logprobs", {"logprobs": 21}, "logprobs"),
    ("suffix", {"suffix": "x"}, "suffix"),
    ("best_of", {"best_of": 2}, "best_of"),
]


def check_body(error: openai.APIStatusError, param: str | None, kind: str = "invalid_request_error") -> None:
    assert isinstance(error.body, dict)
    assert set(error.body) == {"message", "type", "param", "code"}
    assert (error.param, error.type) == (param, kind)
    assert isinstance(error.code, str)


@pytest.mark.parametrize(("fields", "param"), [c[1:] for c in BAD_CHATS], ids=[c[0] for c in BAD_CHATS])
def test_a_bad_chat(tiny_app: LiveApp, fields: dict[str, Any], param: str) -> None:
    with tiny_app.client() as client, pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=[USER], extra_body=fields)  # pyright: ignore
    check_body(bad.value, param)


@pytest.mark.parametrize(("fields", "param"), [c[1:] for c in BAD_COMPLETIONS], ids=[c[0] for c in BAD_COMPLETIONS])
def test_a_bad_completion(tiny_app: LiveApp, fields: dict[str, Any], param: str) -> None:
    with tiny_app.client() as client, pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="hi", extra_body=fields)
    check_body(bad.value, param)


def test_a_bad_stream_is_a_status_and_no_event(tiny_app: LiveApp) -> None:
    with tiny_app.client() as client, pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="hi", stream=True, temperature=-1)
    check_body(bad.value, "temperature")


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf", "0"])
def test_a_bad_deadline(tiny_app: LiveApp, value: str) -> None:
    reply = tiny_app.post("/v1/completions", {"prompt": "hi"}, {"x-request-timeout-seconds": value})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "x-request-timeout-seconds")


@pytest.mark.parametrize(
    "raw", [b"", b"{", b'{"prompt": "hi"', b"[1]", b'"hi"', b"\xff\xfe", b'{"n": NaN}', b"[" * 9999]
)
def test_a_body_that_is_no_json_object(tiny_app: LiveApp, raw: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        reply = tiny_app.post(path, raw)
        assert reply.status_code == 400
        assert reply.json()["error"]["type"] == "invalid_request_error"


def test_a_body_of_10_mb(tiny_app: LiveApp) -> None:
    body = b'{"model": "tiny", "prompt": "' + b"sheep " * (10 * 2**20 // 6) + b'"}'

    def pieces() -> Any:
        yield from (body[at : at + 65536] for at in range(0, len(body), 65536))

    for content in (body, pieces()):
        reply = httpx.post(f"{tiny_app.url}/v1/completions", content=content, timeout=CALL_S)
        assert reply.status_code == 413
        assert reply.json()["error"]["code"] == "request_too_large"
    with tiny_app.client() as client:
        with pytest.raises(openai.APIStatusError) as large:
            client.completions.create(model="tiny", prompt="sheep " * (10 * 2**20 // 6))
        assert large.value.status_code == 413
        assert client.completions.create(model="tiny", prompt="sheep").choices


@pytest.mark.parametrize(
    ("asked", "param", "count"),
    [({"prompt": [5] * 5000}, "prompt", 5000), ({"prompt": [5] * 4000, "max_tokens": 97}, "max_tokens", 4097)],
)
def test_a_completion_that_is_too_long(tiny_app: LiveApp, asked: dict[str, Any], param: str, count: int) -> None:
    with tiny_app.client() as client, pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", **asked)
    check_too_long(long.value, param, count)


def test_a_chat_that_is_too_long(tiny_app: LiveApp) -> None:
    messages: list[Any] = [{"role": "user", "content": "sheep " * 5000}]
    with tiny_app.client() as client, pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=messages)
    check_too_long(long.value, "messages", tiny_app.post("/tokenize", {"messages": messages}).json()["count"])


def check_too_long(error: openai.APIStatusError, param: str, count: int) -> None:
    check_body(error, param)
    assert error.code == "context_length_exceeded"
    assert "maximum context length is 4096 tokens" in error.message
    assert f"{count} tokens" in error.message


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
    ],
)
def test_routes_that_are_not_there(tiny_app: LiveApp, method: str, path: str, status: int) -> None:
    reply = httpx.request(method, f"{tiny_app.url}{path}", timeout=CALL_S)
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_afterwards_nothing_is_left(tiny_app: LiveApp) -> None:
    tiny_app.assert_idle()
    assert 'herd_gateway_requests_total{endpoint="/v1/completions",status="500"}' not in tiny_app.get("/metrics").text
