"""Both ends of a token stream for tests: they remember what they were told, on any loop and over either transport."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from herd.cluster.token_link import GatewayLink, TokenStreamClient
from herd.cluster.token_stream import TokenStreamServer

DEADLINE_S = 20.0
LOOPS = ("asyncio", "uvloop")
NODE = "node-a"
NODES = {"unix": NODE, "tcp": "node-b"}
"""The engine's node, by the transport that it leads to: the gateway's is NODE."""


def runner(kind: str) -> Callable[[Coroutine[Any, Any, None]], None]:
    """Runs a scenario on a fresh loop of that kind; skips the test where it is not installed."""
    factory = asyncio.new_event_loop if kind == "asyncio" else pytest.importorskip("uvloop").new_event_loop

    def run(scenario: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=factory) as loop:
            loop.run(asyncio.wait_for(scenario, DEADLINE_S))

    return run


async def until(condition: Callable[[], Any]) -> None:
    """Return as soon as the condition holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.001)


def update(handle: int, *tokens: int) -> list[Any]:
    """An update as `token_frames` describes it, without logprobs and end."""
    return [handle, list(tokens), None, None]


class Gateway:
    """A server that remembers what it was told."""

    def __init__(self, **options: Any) -> None:
        self.updates: list[tuple[str, list[Any]]] = []
        self.frames = 0
        self.lost: list[str] = []
        self.stats: list[tuple[str, dict]] = []
        self.server = TokenStreamServer(
            host="127.0.0.1",
            on_updates=self._on_updates,
            on_lost=self.lost.append,
            on_stats=lambda engine, figures: self.stats.append((engine, figures)),
            **options,
        )

    def _on_updates(self, engine: str, updates: list[list[Any]]) -> None:
        self.frames += 1
        self.updates += [(engine, update) for update in updates]

    async def __aenter__(self) -> Gateway:
        await self.server.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.server.close()

    @property
    def address(self) -> dict[str, Any]:
        return self.server.address(NODE)


class Engine:
    """A client that remembers what it was told."""

    def __init__(self, name: str = "engine", **options: Any) -> None:
        self.aborts: list[tuple[int, list[int]]] = []
        self.lost: list[GatewayLink] = []
        self.client = TokenStreamClient(
            name,
            on_abort=lambda link, handles: self.aborts.append((link.id, handles)),
            on_lost=self.lost.append,
            **options,
        )

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.client.close()
