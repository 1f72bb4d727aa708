"""What the Engine deployment tells Serve and its callers when its engine thread ends. No Ray is started."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from herd.cluster.errors import EngineUnavailable, from_wire
from herd.deployments import engine as module


class FakeEngine:
    def __init__(self) -> None:
        self.alive = True
        self.fault: BaseException | None = None


class FakeLink:
    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send_updates(self, updates: list[Any]) -> None:
        self.sent += updates


@pytest.fixture
def replica() -> Any:
    """The deployment's own class around a fake engine; no model is loaded."""
    deployment: Any = module.Engine
    replica = object.__new__(deployment.func_or_class)
    replica._engine, replica._live, replica._loop = FakeEngine(), {}, None
    return replica


def test_a_running_thread_is_healthy(replica: Any) -> None:
    replica.check_health()


def test_a_dead_thread_is_not(replica: Any) -> None:
    replica._engine.alive, replica._engine.fault = False, MemoryError("no page left")
    with pytest.raises(EngineUnavailable, match="no page left"):
        replica.check_health()


async def test_a_request_that_comes_after_the_thread_has_ended_is_refused(
    replica: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Streams:
        async def link(self, reply_to: Any, node_id: str) -> Any:
            return type("Link", (), {"id": 1})()

    replica._engine.fault = MemoryError("no page left")
    replica._node_id = "node"
    monkeypatch.setattr(replica, "_stream_client", Streams)
    request = {"prompt_ids": [1], "sampling": {"max_tokens": 1}}
    async with asyncio.timeout(5):
        with pytest.raises(EngineUnavailable, match="no page left"):
            await replica.generate({"reply_to": {}, "handle": 1, "request": request})
    assert not replica._live


async def test_every_request_learns_of_a_dying_thread(replica: Any) -> None:
    """Over its stream and as the result of its pending call."""
    loop = asyncio.get_running_loop()
    links, calls = [FakeLink(), FakeLink()], [loop.create_future() for _ in range(3)]
    replica._loop = loop
    for n, done in enumerate(calls):
        replica._live[f"r{n}"] = module._Live(links[n % 2], n, done)  # pyright: ignore[reportArgumentType]
    await asyncio.to_thread(replica._on_fault, MemoryError("no page left"))
    async with asyncio.timeout(5):
        ends = await asyncio.gather(*calls)
    assert [len(link.sent) for link in links] == [2, 1]
    assert {handle for link in links for handle, *_ in link.sent} == {0, 1, 2}
    for end in [*ends, *(update[-1] for link in links for update in link.sent)]:
        error = from_wire(end["error"])
        assert isinstance(error, EngineUnavailable)
        assert "no page left" in error.message
    assert not replica._live
