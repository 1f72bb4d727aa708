"""An engine client under test: its Serve handle and its engines are the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from ray.serve.exceptions import RequestCancelledError

from herd.cluster.metrics import GatewayMetrics
from herd.cluster.token_link import GatewayLink, TokenStreamClient
from herd.deployments.engine_client import EngineClient
from herd.deployments.generation_stream import GenerationStream

END = {"finish_reason": "stop", "num_cached_tokens": 0, "num_output_tokens": 2}
ASKED = {"id": "a", "prompt_ids": [50, 51], "num_resumed_tokens": 0, "cache_salt": "s", "priority": 2}


class FakeResponse:
    """A Serve response: awaited for its result, cancelled from outside."""

    def __init__(self) -> None:
        self.result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def __await__(self):
        return self.result.__await__()

    def cancel(self) -> None:
        if not self.result.done():
            self.result.set_exception(RequestCancelledError("x"))


class FakeHandle:
    """A Serve handle whose calls the test answers."""

    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, Any], FakeResponse]] = []
        self.fail: Exception | None = None
        self.generate = self.info = self

    def remote(self, *args: Any) -> FakeResponse:
        if self.fail is not None:
            raise self.fail
        self.calls.append((args[0] if args else {}, FakeResponse()))
        return self.calls[-1][1]


class Setup:
    def __init__(self, client: EngineClient, handle: FakeHandle, metrics: GatewayMetrics) -> None:
        self.client, self.handle, self.metrics = client, handle, metrics
        self.aborted: list[int] = []
        self.engine = TokenStreamClient(
            engine_id="e1", on_abort=lambda _, handles: self.aborted.extend(handles), on_lost=lambda _: None
        )

    async def called(self, count: int = 1) -> list[dict[str, Any]]:
        await until(lambda: len(self.handle.calls) >= count)
        return [wire for wire, _ in self.handle.calls]

    async def link(self) -> GatewayLink:
        (wire, *_) = await self.called()
        return await self.engine.link(wire["reply_to"], "node")

    def resumed(self) -> float | None:
        return self.metrics.registry.get_sample_value("herd_gateway_resumed_requests_total")


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.001)


@asynccontextmanager
async def setup(recovery_timeout_s: float = 30.0) -> AsyncIterator[Setup]:
    handle, metrics = FakeHandle(), GatewayMetrics()
    client = EngineClient(
        handle,  # pyright: ignore[reportArgumentType]
        metrics,
        host="127.0.0.1",
        node_id="node",
        recovery_timeout_s=recovery_timeout_s,
    )
    await client.start()
    s = Setup(client, handle, metrics)
    try:
        yield s
    finally:
        s.engine.close()
        await client.close()


async def collect(stream: GenerationStream, count: int) -> list[tuple[Any, ...]]:
    """Updates until `count` choices have ended."""
    got, ended = [], 0
    async with asyncio.timeout(5):
        while ended < count:
            for update in await stream.updates():
                got.append(tuple(update))
                ended += update.end is not None
    return got
