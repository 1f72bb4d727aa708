"""The engines as the gateway reaches them: each request is one pending call through Serve, which picks the replica,
sees the load and cancels; its tokens come back beside Ray over the token stream. The only file of the HTTP side that
knows Ray's errors. Knows nothing of HTTP or text."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from ..cluster.errors import EngineFault, EngineUnavailable, HerdError, Overloaded
from ..cluster.metrics import GatewayMetrics
from ..cluster.token_stream import TokenStreamServer
from .generation_stream import GenerationStream, Update

log = logging.getLogger("herd.gateway")

END_GRACE_S = 5.0
"""How long after its call has returned a request's end may still be on its way over the token stream."""
INFO_TIMEOUT_S = 30.0


@dataclass(slots=True, eq=False)
class _Call:
    """One choice at one engine."""

    stream: GenerationStream
    index: int
    engine_id: str | None = None
    """Known once the engine has sent something."""
    response: DeploymentResponse[Any] | DeploymentResponseGenerator[Any] | None = None
    grace: asyncio.TimerHandle | None = None


class EngineClient:
    """Submits generations and hands out their streams. All methods belong to the loop that `start` ran on."""

    def __init__(self, handle: DeploymentHandle, metrics: GatewayMetrics, *, host: str, node_id: str) -> None:
        """`handle`: the Engine deployment. `host`: this node's address as engines on other nodes reach it; `node_id`:
        this node's name in Ray."""
        self._engines = handle
        self._metrics = metrics
        self._node_id = node_id
        self._server = TokenStreamServer(
            host=host, on_updates=self._on_updates, on_lost=self._on_lost, on_stats=metrics.engines.update
        )
        self._reply_to: dict[str, Any] = {}
        self._handles = itertools.count(1)
        self._calls: dict[int, _Call] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen for the engines' tokens. Raises OSError if this node's address cannot be listened on."""
        await self._server.start()
        self._reply_to = self._server.address(self._node_id)

    async def close(self) -> None:
        """Give up whatever still runs and stop listening."""
        for handle in list(self._calls):
            self._give_up(handle)
        for task in list(self._tasks):
            task.cancel()
        await self._server.close()

    def submit(self, requests: Sequence[Mapping[str, Any]]) -> GenerationStream:
        """See `Engines.submit`."""
        handles = [next(self._handles) for _ in requests]
        stream = GenerationStream(len(requests), lambda index: self._give_up(handles[index]))
        for index, (handle, request) in enumerate(zip(handles, requests, strict=True)):
            self._calls[handle] = _Call(stream, index)
            wire = {"handle": handle, "request": request, "reply_to": self._reply_to}
            # An empty context, because Serve gives all calls made within one HTTP request the same internal id, and its
            # router takes requests of equal id for one.
            task = asyncio.get_running_loop().create_task(self._follow(handle, wire), context=contextvars.Context())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return stream

    async def info(self) -> Mapping[str, Any]:
        """See `Engines.info`."""
        # Apart from the HTTP request that asks, with which Serve would cancel the call.
        asking = asyncio.get_running_loop().create_task(self._ask_info(), context=contextvars.Context())
        try:
            return await asking
        finally:
            asking.cancel()

    async def _ask_info(self) -> Mapping[str, Any]:
        try:
            async with asyncio.timeout(INFO_TIMEOUT_S):
                return await self._engines.info.remote()
        except TimeoutError:
            raise EngineUnavailable(f"no engine answered within {INFO_TIMEOUT_S:g} s") from None
        except Exception as error:
            raise herd_error(error) from error

    async def _follow(self, handle: int, wire: dict[str, Any]) -> None:
        """Wait for the call to return. If it fails before the request's end has come over the stream, so does that."""
        call = self._calls.get(handle)
        if call is None:
            return
        try:
            response = self._engines.generate.remote(wire)
            call.response = response
            await response
        except asyncio.CancelledError:
            self._fail(handle, EngineUnavailable("the gateway is shutting down"))
            raise
        except Exception as error:  # noqa: BLE001 - the edge to Ray: whatever the call raised becomes the stream's error
            if handle in self._calls:
                self._fail(handle, herd_error(error))
        else:
            if handle in self._calls:
                late = EngineUnavailable("the engine finished, but its last tokens never arrived")
                call.grace = asyncio.get_running_loop().call_later(END_GRACE_S, self._fail, handle, late)
        finally:
            call.response = None

    def _on_updates(self, engine_id: str, updates: Sequence[Sequence[Any]]) -> None:
        forgotten = []
        for handle, token_ids, logprobs, end in updates:
            call = self._calls.get(handle)
            if call is None:
                if end is None:
                    forgotten.append(handle)
                continue
            call.engine_id = engine_id
            if end is not None:
                self._remove(handle)
            call.stream.feed(Update(call.index, token_ids, logprobs, end))
        if forgotten:  # given up before the engine was known
            self._server.abort(engine_id, forgotten)

    def _on_lost(self, engine_id: str) -> None:
        """An engine's connection ended, and with it everything it was sending."""
        self._metrics.engines.forget(engine_id)
        lost = [handle for handle, call in self._calls.items() if call.engine_id == engine_id]
        if lost:
            log.warning("lost the connection to engine %s with %d requests running", engine_id, len(lost))
        for handle in lost:
            self._fail(handle, EngineUnavailable("the connection to the engine was lost"))

    def _fail(self, handle: int, error: HerdError) -> None:
        call = self._remove(handle)
        if call is not None:
            call.stream.fail(call.index, error)

    def _give_up(self, handle: int) -> None:
        """Nobody waits for this request any more: tell the engine, or if none has it yet, Serve."""
        call = self._remove(handle)
        if call is None:
            return
        told = call.engine_id is not None and self._server.abort(call.engine_id, [handle])
        if not told and call.response is not None:
            call.response.cancel()

    def _remove(self, handle: int) -> _Call | None:
        call = self._calls.pop(handle, None)
        if call is not None and call.grace is not None:
            call.grace.cancel()
        return call


def herd_error(error: BaseException) -> HerdError:
    """What a failed call means. Errors of ours that crossed a process come wrapped by Ray."""
    cause = getattr(error, "cause", None)
    for candidate in (cause, error):
        if isinstance(candidate, HerdError):
            return candidate
    if isinstance(error, BackPressureError):
        return Overloaded("the engines have as many requests as they take; try again later")
    if isinstance(error, RayActorError) or isinstance(cause, RayActorError):
        return EngineUnavailable("the engine died while it worked on the request")
    if isinstance(error, RayServeException | TaskCancelledError):
        return EngineUnavailable("no engine could take the request")
    log.error("a call to an engine failed", exc_info=error)
    return EngineFault("the engine failed; its log says why")
