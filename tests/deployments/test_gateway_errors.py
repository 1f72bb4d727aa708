import asyncio
import itertools
import json

import pytest

from herd.cluster.errors import EngineUnavailable, Overloaded

from .fake_gateway import MAX_MODEL_LEN, byte_ids, gateway, saying, text_of


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"model": "gpt-9"}, 404, "model", "model_not_found"),
        ({"temperature": 9}, 400, "temperature", "invalid_value"),
        ({"messages": []}, 400, "messages", "invalid_value"),
        ({"messages": None}, 400, "messages", "invalid_value"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, 400, "messages.[0].content", "invalid_value"),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias", "invalid_value"),
        ({"stop_token_ids": [99999]}, 400, "stop_token_ids", "invalid_value"),
        ({"max_tokens": 5000}, 400, "max_tokens", "context_length_exceeded"),
        ({"n": 129}, 400, "n", "invalid_value"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format.type", "unsupported_parameter"),
        ({"tool_choice": "required"}, 400, "tool_choice", "unsupported_parameter"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_chat_is_a_status_and_never_an_event(body, status, param, code, stream):
    async with gateway() as g:
        reply = await g.chat(**{"stream": stream} | body)
        assert g.engines.requests == []
    assert reply.status == status
    assert (reply.error["param"], reply.error["code"]) == (param, code)
    assert reply.error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert reply.headers["content-type"] == "application/json"


async def test_an_unknown_model_is_told_which_there_are():
    async with gateway() as g:
        reply = await g.chat(model="nope")
        assert "'tiny'" in reply.error["message"]
        assert "'alias'" in reply.error["message"]
        assert (await g.chat(model="alias")).json()["model"] == "alias"
        assert (await g.chat()).json()["model"] == "tiny"


async def test_too_long_prompts_are_refused_with_both_numbers():
    async with gateway() as g:
        for reply, where, count in (
            (await g.complete([1] * 600), "prompt", 600),
            (await g.complete([1] * 500, max_tokens=50), "max_tokens", 550),
            (await g.chat("z" * 2000), "messages", None),
        ):
            assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "context_length_exceeded", where)
            assert reply.error["message"].startswith(f"This model's maximum context length is {MAX_MODEL_LEN} tokens.")
            assert count is None or str(count) in reply.error["message"]
        assert (await g.complete([1] * 505)).json()["usage"]["completion_tokens"] == 7


@pytest.mark.parametrize("prompt", [[1, 99999], [[1], [-1]]])
async def test_ids_outside_the_vocabulary_are_refused(prompt):
    async with gateway() as g:
        reply = await g.complete(prompt)
    assert (reply.status, reply.error["param"]) == (400, "prompt")


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff"])
async def test_a_body_that_is_no_json_object_is_400_whatever_its_type(raw):
    async with gateway() as g:
        assert (await g.post("/v1/completions", raw)).status == 400
        plain = await g.complete("hi", headers=None)
        assert plain.status == 200


async def test_json_is_read_whatever_the_content_type_says():
    async with gateway() as g:
        body = json.dumps({"prompt": "hi"}).encode()
        reply = await g.post("/v1/completions", body, headers={"content-type": "text/plain"})
        assert reply.status == 200


async def test_a_large_body_is_413_announced_or_not_and_the_rest_is_not_read():
    pulled = itertools.count()
    async with gateway(max_body_bytes=2048) as g:
        announced = await g.post("/v1/completions", b"x" * 3000)
        unending = (b"x" * 1000 for _ in pulled)
        found_out = await g.call("POST", "/v1/completions", pieces=unending)
        assert (await g.complete("hi")).status == 200
    assert announced.status == found_out.status == 413
    assert announced.error["code"] == "request_too_large"
    assert next(pulled) < 6


async def test_a_full_gateway_answers_429_before_it_looks_at_the_body():
    async with gateway(max_inflight=2) as g:
        g.engines.gate = asyncio.Event()
        running = [asyncio.create_task(g.chat()) for _ in range(2)]
        while len(g.engines.requests) < 2:
            await asyncio.sleep(0)
        refused = await g.post("/v1/chat/completions", b"not even json")
        assert refused.status == 429
        assert refused.error["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
        assert b"herd_gateway_requests_in_flight 2.0" in (await g.call("GET", "/metrics")).body
        g.engines.gate.set()
        assert [r.status for r in await asyncio.gather(*running)] == [200, 200]
        assert (await g.chat()).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_before_the_first_token_is_504(stream):
    async with gateway(request_timeout_s=60) as g:
        g.engines.gate = asyncio.Event()
        reply = await g.post(
            "/v1/completions", {"prompt": "hi", "stream": stream}, headers={"x-request-timeout-seconds": "0.01"}
        )
        assert (reply.status, reply.error["code"], reply.error["type"]) == (504, "deadline_exceeded", "server_error")
        assert len(g.engines.aborted) == 1


async def test_a_deadline_after_the_first_token_ends_the_stream_with_an_error_event():
    async with gateway(saying("abc"), request_timeout_s=0.05) as g:
        g.engines.hold_before_end = asyncio.Event()
        reply = await g.chat(stream=True)
        assert len(g.engines.aborted) == 1
    events = reply.events()
    assert reply.status == 200
    assert text_of(events[:-1]) == "ab"
    assert events[-1]["error"]["code"] == "deadline_exceeded"
    assert reply.complete


@pytest.mark.parametrize("error", [EngineUnavailable("gone", retry_after_s=2.5), Overloaded("full", retry_after_s=7)])
async def test_errors_of_the_engine_are_a_status_first_and_an_event_later(error):
    async with gateway(lambda _: [error]) as g:
        reply = await g.chat(stream=True)
        assert (reply.status, reply.error["code"]) == (error.status, error.code)
        assert int(reply.headers["retry-after"]) >= error.retry_after_s
    async with gateway(lambda _: [(byte_ids("a"), None, None), error]) as g:
        events = (await g.chat(stream=True)).events()
        assert text_of(events[:-1]) == "a"
        assert events[-1]["error"]["code"] == error.code
        assert (await g.chat()).status == error.status


async def test_a_failing_choice_aborts_the_others():
    def script(request):
        index = int(request["id"][-1])
        return [EngineUnavailable("gone")] if index == 1 else [(byte_ids("a"), None, None)]

    async with gateway(script) as g:
        assert (await g.chat(n=3)).status == 503
        assert sorted(int(i[-1]) for i in g.engines.aborted) == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_stops_the_engine(stream):
    leave = asyncio.Event()
    async with gateway(saying("abc")) as g:
        g.engines.hold_before_end = asyncio.Event()
        body = {"prompt": "hi", "stream": stream, "n": 2}
        task = asyncio.create_task(g.post("/v1/completions", body, leave=leave))
        while len(g.engines.requests) < 2:
            await asyncio.sleep(0)
        leave.set()
        await task
        assert len(g.engines.aborted) == 2
        assert b'status="499"' in (await g.call("GET", "/metrics")).body
        assert b"herd_gateway_requests_in_flight 0.0" in (await g.call("GET", "/metrics")).body


async def test_a_cancelled_handler_stops_the_engine():
    async with gateway() as g:
        g.engines.gate = asyncio.Event()
        task = asyncio.create_task(g.chat())
        while not g.engines.requests:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(g.engines.aborted) == 1


async def test_a_defect_is_a_logged_500_without_details(caplog, monkeypatch):
    async with gateway() as g:
        monkeypatch.setattr(g.engines, "submit", lambda _: 1 / 0)
        reply = await g.chat()
    assert (reply.status, reply.error["code"], reply.error["type"]) == (500, "engine_fault", "server_error")
    assert "ZeroDivision" in caplog.text
    assert "ZeroDivision" not in reply.body.decode()


async def test_before_an_engine_has_answered_nothing_is_served_but_liveness():
    async with gateway(ready=False) as g:
        ready = await g.call("GET", "/ready")
        assert (ready.status, ready.json()["status"]) == (503, "loading")
        assert "retry-after" in ready.headers
        assert (await g.call("GET", "/health")).status == 200
        assert (await g.chat()).status == 503
        assert "max_model_len" not in (await g.call("GET", "/v1/models/tiny")).json()
        g.engines.answers = True
        assert (await g.call("GET", "/ready")).json()["status"] == "ready"
        assert (await g.chat()).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/embeddings", 404),
        ("GET", "/", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
    ],
)
async def test_unknown_routes_and_methods_have_openai_bodies(method, path, status):
    async with gateway() as g:
        reply = await g.call(method, path)
    assert reply.status == status
    assert set(reply.error) == {"message", "type", "param", "code"}
