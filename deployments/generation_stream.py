"""What the HTTP side sees of engines: submit requests, get one stream of updates, abort. Holds no transport; the real
client is `engine_client.py`, tests use a fake one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ..cluster.errors import HerdError


class Update(NamedTuple):
    """What one engine step produced for one choice."""

    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[Any] | None
    """Per token `[logprob, [top ids], [top logprobs]]`, where asked for."""
    end: dict[str, Any] | None
    """`{"finish_reason", "num_cached_tokens", "num_output_tokens"}` or `{"error": HerdError.to_wire()}`."""


class GenerationStream:
    """Updates of all choices of one HTTP request, in order of arrival. Made by an engine client, read by one task.

    Updates that arrive while the reader is busy are handed over together, so a slow client costs memory in proportion
    to its own tokens and no more wake-ups."""

    __slots__ = ("_abort", "_arrived", "_error", "_loop", "_open", "_waiter")

    def __init__(self, size: int, abort: Callable[[int], None]) -> None:
        """`abort(index)` tells the engine that a choice needs no more tokens. Make it within the running loop."""
        self._open = set(range(size))
        self._abort = abort
        self._arrived: list[Update] = []
        self._error: HerdError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()

    def feed(self, update: Update) -> None:
        """Called by the client, in the stream's loop. Updates of choices that are over are dropped."""
        if update.index in self._open:
            if update.end is not None:
                self._open.discard(update.index)
            self._arrived.append(update)
            self._wake()

    def fail(self, index: int, error: HerdError) -> None:
        """Called by the client: choice `index` will get no end. A choice that is over does not care."""
        if index in self._open and self._error is None:
            self._error = error
            self._wake()

    async def updates(self) -> list[Update]:
        """The updates since the last call, at least one. Raises the error that the client failed the stream with,
        after what had arrived before it."""
        while not self._arrived:
            if self._error is not None:
                raise self._error
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        arrived, self._arrived = self._arrived, []
        return arrived

    def abort(self, index: int) -> None:
        """This choice needs no more tokens."""
        if index in self._open:
            self._open.discard(index)
            self._abort(index)

    def close(self) -> None:
        """Abort whatever is still open. Safe to call twice."""
        for index in sorted(self._open):
            self.abort(index)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Engines(Protocol):
    """The engines behind the gateway, as one."""

    def submit(self, requests: Sequence[Mapping[str, Any]]) -> GenerationStream:
        """Start one generation per request (fields of EngineRequest as plain values); the i-th is choice i."""
        ...

    async def info(self) -> Mapping[str, Any]:
        """Model facts from any engine; waits until one answers. Raises EngineUnavailable."""
        ...
