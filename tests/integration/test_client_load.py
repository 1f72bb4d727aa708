"""Many clients at once, clients that leave, limits and deadlines, against the whole stack: nothing hangs, and what
nobody waits for any more is given back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import openai
import pytest

from .live_app import CALL_S, LiveApp

LONG: Any = {"model": "tiny", "prompt": "herd", "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
"""Runs for many seconds unless somebody stops it."""


async def stream_text(client: openai.AsyncOpenAI, **asked: Any) -> str:
    stream = await client.completions.create(**asked, stream=True)
    return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])


async def eventually(app: LiveApp, condition: str) -> None:
    await asyncio.to_thread(app.wait_for, condition)


async def test_64_streams_at_once_and_each_is_its_own(tiny_app: LiveApp) -> None:
    asked = [
        {
            "model": "tiny",
            "prompt": f"{n} sheep",
            "max_tokens": 20 + n % 7,
            "seed": n,
            "extra_body": {"ignore_eos": True},
        }
        for n in range(64)
    ]
    async with tiny_app.async_client() as client:
        together = await asyncio.gather(*(stream_text(client, **fields) for fields in asked))
        alone = [(await client.completions.create(**asked[n])).choices[0].text for n in (0, 31, 63)]
    assert len(set(together)) == 64
    assert [together[n] for n in (0, 31, 63)] == alone, "company and caches change nothing"
    await asyncio.to_thread(tiny_app.assert_idle)


async def test_64_clients_that_leave_half_way(tiny_app: LiveApp) -> None:
    started = 0

    async def leave(client: openai.AsyncOpenAI, n: int) -> None:
        nonlocal started
        stream = await client.completions.create(**LONG | {"prompt": f"{n} sheep"}, stream=True)
        async for _ in stream:
            started += 1
            break
        await everyone.wait()
        await stream.close()

    everyone = asyncio.Event()
    async with tiny_app.async_client() as client:
        tasks = [asyncio.create_task(leave(client, n)) for n in range(64)]
        await eventually(tiny_app, "running == 64 and pages_used > 64")
        everyone.set()
        await asyncio.gather(*tasks)
        assert started == 64
        await asyncio.to_thread(tiny_app.assert_idle)


async def _drop_whole(client: openai.AsyncOpenAI) -> Any:
    return await client.completions.create(**LONG)


async def _drop_chat(client: openai.AsyncOpenAI) -> Any:
    messages: list[Any] = [{"role": "user", "content": "herd"}]
    return await client.chat.completions.create(
        model="tiny", messages=messages, n=3, max_tokens=3900, extra_body={"ignore_eos": True}
    )


async def _drop_stream(client: openai.AsyncOpenAI) -> Any:
    return await stream_text(client, **LONG)


@pytest.mark.parametrize("call", [_drop_whole, _drop_chat, _drop_stream])
async def test_a_call_that_is_cancelled_stops_the_engine(
    tiny_app: LiveApp, call: Callable[[openai.AsyncOpenAI], Awaitable[Any]]
) -> None:
    before = (await asyncio.to_thread(tiny_app.stats))["generated_tokens"]
    async with tiny_app.async_client() as client:
        task = asyncio.ensure_future(call(client))
        await eventually(tiny_app, f"running > 0 and generated_tokens > {before + 10}")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(tiny_app.assert_idle)
    assert (await asyncio.to_thread(tiny_app.stats))["generated_tokens"] < before + 3 * 3900


async def test_clients_that_leave_while_they_wait_for_a_place(tiny_app: LiveApp) -> None:
    """More than the engine computes at once: some leave out of its queue."""
    async with tiny_app.async_client() as client:
        tasks = [asyncio.ensure_future(_drop_whole(client)) for _ in range(70)]
        await eventually(tiny_app, "waiting >= 6 and running == 64")
        for task in reversed(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(tiny_app.assert_idle)


async def test_sockets_that_close_at_any_moment(tiny_app: LiveApp) -> None:
    """Raw connections cut while sending the body, before the answer, and in it."""
    host, port = tiny_app.url.removeprefix("http://").split("/")[0].split(":")
    body = b'{"model": "tiny", "prompt": "herd", "max_tokens": 4000, "stream": true, "ignore_eos": true}'
    path = f"/{tiny_app.name}/v1/completions"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def cut(sent: bytes, wait_s: float) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        await writer.drain()
        if wait_s:
            async with asyncio.timeout(CALL_S):
                await reader.readuntil(b"data:")
        writer.close()

    await asyncio.gather(
        *(cut(head + body[:40], 0) for _ in range(8)),
        *(cut(head + body, 0) for _ in range(8)),
        *(cut(head + body, 1) for _ in range(8)),
    )
    await asyncio.to_thread(tiny_app.assert_idle)


async def test_the_same_seed_in_company_and_after_prefix_hits(tiny_app: LiveApp) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "the shepherd counts them: " * 20, "max_tokens": 50, "seed": 21}
    async with tiny_app.async_client() as client:
        alone = await stream_text(client, **asked)
        crowd = [asyncio.ensure_future(stream_text(client, **LONG | {"prompt": f"{n}"})) for n in range(20)]
        await eventually(tiny_app, "running == 20")
        texts = await asyncio.gather(*(stream_text(client, **asked) for _ in range(4)))
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
    assert texts == [alone] * 4
    await asyncio.to_thread(tiny_app.assert_idle)


async def test_beyond_the_gateways_places_is_429(tiny_app: LiveApp) -> None:
    async with tiny_app.async_client() as client:
        tasks = [asyncio.ensure_future(_drop_whole(client)) for _ in range(tiny_app.max_inflight)]
        await eventually(tiny_app, f"running + waiting == {tiny_app.max_inflight}")
        with pytest.raises(openai.RateLimitError) as refused:
            await client.completions.create(model="tiny", prompt="a")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert (refused.value.type, refused.value.code) == ("rate_limit_error", "queue_full")
        await asyncio.to_thread(tiny_app.assert_idle)
        assert (await client.completions.create(model="tiny", prompt="a")).choices


async def test_beyond_the_engines_queue_is_429(tiny_app: LiveApp) -> None:
    async with tiny_app.async_client() as client:
        with pytest.raises(openai.RateLimitError) as refused:
            await client.completions.create(**LONG | {"n": 128})
    assert int(refused.value.response.headers["retry-after"]) >= 1
    await asyncio.to_thread(tiny_app.assert_idle)


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_of_the_clients_own(tiny_app: LiveApp, stream: bool) -> None:
    """Before anything was sent it is a status; after that the stream ends with an error."""
    with tiny_app.client() as client:
        asked = LONG | {"extra_headers": {"x-request-timeout-seconds": "0.5"}}
        began = time.monotonic()
        with pytest.raises(openai.APIError) as late:
            list(client.completions.create(**asked, stream=stream))
        assert time.monotonic() - began < CALL_S / 2
    assert late.value.code == "deadline_exceeded"
    if not stream:
        assert isinstance(late.value, openai.InternalServerError)
        assert late.value.status_code == 504
    tiny_app.assert_idle()


def test_a_client_whose_own_patience_ends(tiny_app: LiveApp) -> None:
    with tiny_app.client() as client, pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(**LONG)
    tiny_app.assert_idle()


async def test_a_slow_reader_gets_everything(tiny_app: LiveApp) -> None:
    body = {"model": "tiny", "prompt": "herd", "max_tokens": 300, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    lines = []
    async with (
        httpx.AsyncClient(timeout=CALL_S) as client,
        client.stream("POST", f"{tiny_app.url}/v1/completions", json=body) as response,
    ):
        async for line in response.aiter_lines():
            if len(lines) == 10:
                await eventually(tiny_app, "running == 0")  # it went on without us
            lines.append(line)
    assert lines[-2] == "data: [DONE]"
    assert '"completion_tokens":300' in lines[-4]
