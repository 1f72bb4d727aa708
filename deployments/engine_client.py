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
from .journal import EngineLost, Journal

log = logging.getLogger("herd.gateway")

END_GRACE_S = 5.0
"""How long after its call has returned a request's end may still be on its way over the token stream."""
INFO_TIMEOUT_S = 30.0


@dataclass(slots=True, eq=False)
class _Choice:
    """One choice of an HTTP request, whatever engines it takes."""

    stream: GenerationStream
    index: int
    journal: Journal
    attempt: _Attempt | None = None
    timer: asyncio.TimerHandle | None = None
    """From an engine's loss to the next token: starts the next attempt, or ends the wait for what it brings."""

    def set_timer(self, timer: asyncio.TimerHandle | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.timer = timer


@dataclass(slots=True, eq=False)
class _Attempt:
    """One choice at one engine. Its handle is its own, so that nothing of an earlier attempt is taken for it."""

    handle: int
    choice: _Choice
    engine_id: str | None = None
    """Known once the engine has sent something."""
    response: DeploymentResponse[Any] | DeploymentResponseGenerator[Any] | None = None
    grace: asyncio.TimerHandle | None = None


class EngineClient:
    """Submits generations, again where an engine is lost, and hands out their streams. All methods belong to the loop
    that `start` ran on."""

    def __init__(
        self,
        handle: DeploymentHandle,
        metrics: GatewayMetrics,
        *,
        host: str,
        node_id: str,
        recovery_timeout_s: float,
    ) -> None:
        """`handle`: the Engine deployment. `host`: this node's address as engines on other nodes reach it; `node_id`:
        this node's name in Ray. `recovery_timeout_s`: see `Journal`."""
        self._engines = handle
        self._metrics = metrics
        self._node_id = node_id
        self._recovery_timeout_s = recovery_timeout_s
        self._server = TokenStreamServer(
            host=host, on_updates=self._on_updates, on_lost=self._on_lost, on_stats=metrics.engines.update
        )
        self._reply_to: dict[str, Any] = {}
        self._handles = itertools.count(1)
        self._choices: set[_Choice] = set()
        self._attempts: dict[int, _Attempt] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen for the engines' tokens. Raises OSError if this node's address cannot be listened on."""
        await self._server.start()
        self._reply_to = self._server.address(self._node_id)

    async def close(self) -> None:
        """Give up whatever still runs and stop listening."""
        for choice in list(self._choices):
            self._give_up(choice)
            choice.stream.fail(choice.index, EngineUnavailable("the gateway is shutting down"))
        for task in list(self._tasks):
            task.cancel()
        await self._server.close()

    def submit(self, requests: Sequence[Mapping[str, Any]]) -> GenerationStream:
        """See `Engines.submit`."""
        choices: list[_Choice] = []
        stream = GenerationStream(len(requests), lambda index: self._give_up(choices[index]))
        for index, request in enumerate(requests):
            choices.append(_Choice(stream, index, Journal(request, self._recovery_timeout_s)))
            self._choices.add(choices[-1])
            self._submit(choices[-1])
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

    def _submit(self, choice: _Choice) -> None:
        """Ask an engine for what is missing of the choice."""
        loop, journal = asyncio.get_running_loop(), choice.journal
        patience_s = journal.patience_s
        choice.set_timer(None if patience_s is None else loop.call_later(patience_s, self._despair, choice))
        choice.attempt = attempt = _Attempt(next(self._handles), choice)
        self._attempts[attempt.handle] = attempt
        # An empty context, because Serve gives all calls made within one HTTP request the same internal id, and its
        # router takes requests of equal id for one.
        task = loop.create_task(self._follow(attempt), context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, attempt: _Attempt) -> None:
        """Wait for the call to return. If it fails before the request's end has come over the stream, so does the
        attempt."""
        if attempt.handle not in self._attempts:
            return
        journal = attempt.choice.journal
        wire = {
            "handle": attempt.handle,
            "request": journal.next_request(),
            "reply_to": self._reply_to,
            "avoid": journal.lost_engines,
        }
        try:
            attempt.response = self._engines.generate.remote(wire)
            await attempt.response
        except asyncio.CancelledError:  # raised by Serve, too, for a call that was cancelled at the engine
            self._lose(attempt, EngineUnavailable("the call to the engine was cancelled"))
            raise
        except Exception as error:  # noqa: BLE001 - the edge to Ray: whatever the call raised becomes the attempt's error
            if attempt.handle in self._attempts:
                self._lose(attempt, herd_error(error))
        else:
            if attempt.handle in self._attempts:
                late = EngineLost("the engine finished, but its last tokens never arrived")
                attempt.grace = asyncio.get_running_loop().call_later(END_GRACE_S, self._lose, attempt, late)
        finally:
            attempt.response = None

    def _on_updates(self, engine_id: str, updates: Sequence[Sequence[Any]]) -> None:
        forgotten = []
        for handle, token_ids, logprobs, end in updates:
            attempt = self._attempts.get(handle)
            if attempt is not None:
                attempt.engine_id = engine_id
                self._take(attempt, token_ids, logprobs, end)
            elif end is None:
                forgotten.append(handle)
        if forgotten:  # given up before the engine was known, or gone on with elsewhere
            self._server.abort(engine_id, forgotten)

    def _take(self, attempt: _Attempt, token_ids: Sequence[int], logprobs: Any, end: dict[str, Any] | None) -> None:
        choice, journal = attempt.choice, attempt.choice.journal
        failure = None if end is None else journal.failure_of(end)
        if failure is not None:
            end = None
        if token_ids or end is not None:
            if choice.timer is not None:
                choice.set_timer(None)
                self._metrics.resumed_requests.inc()
            journal.extend(token_ids)
            if end is not None:
                end = journal.whole(end)
                self._remove(attempt)
                self._choices.discard(choice)
            choice.stream.feed(Update(choice.index, token_ids, logprobs, end))
        if failure is not None:
            self._lose(attempt, failure)

    def _on_lost(self, engine_id: str) -> None:
        """An engine's connection ended, and with it everything it was sending."""
        self._metrics.engines.forget(engine_id)
        lost = [attempt for attempt in self._attempts.values() if attempt.engine_id == engine_id]
        if lost:
            log.warning("lost the connection to engine %s with %d requests running", engine_id, len(lost))
        for attempt in lost:
            self._lose(attempt, EngineLost("the connection to the engine was lost"))

    def _lose(self, attempt: _Attempt, failure: HerdError) -> None:
        """The attempt has come to nothing: try again, or end the choice."""
        if not self._remove(attempt):
            return
        choice = attempt.choice
        try:
            pause_s = choice.journal.pause_after(failure, attempt.engine_id)
        except HerdError as error:
            self._fail(choice, error)
            return
        if pause_s == 0:
            self._submit(choice)
        else:
            choice.set_timer(asyncio.get_running_loop().call_later(pause_s, self._submit, choice))

    def _despair(self, choice: _Choice) -> None:
        self._fail(choice, choice.journal.gave_up())

    def _fail(self, choice: _Choice, error: HerdError) -> None:
        self._give_up(choice)
        choice.stream.fail(choice.index, error)

    def _give_up(self, choice: _Choice) -> None:
        """Nobody waits for this choice any more: tell the engine, or if none has it yet, Serve."""
        self._choices.discard(choice)
        choice.set_timer(None)
        attempt = choice.attempt
        if attempt is None or not self._remove(attempt):
            return
        told = attempt.engine_id is not None and self._server.abort(attempt.engine_id, [attempt.handle])
        if not told and attempt.response is not None:
            attempt.response.cancel()

    def _remove(self, attempt: _Attempt) -> bool:
        """Nothing more is expected of this attempt. False if that was so before."""
        if self._attempts.pop(attempt.handle, None) is None:
            return False
        if attempt.grace is not None:
            attempt.grace.cancel()
        attempt.choice.attempt = None
        return True


def herd_error(error: BaseException) -> HerdError:
    """What a failed call means. Errors of ours that crossed a process come wrapped by Ray."""
    cause = getattr(error, "cause", None)
    for candidate in (cause, error):
        if isinstance(candidate, HerdError):
            return candidate
    if isinstance(error, BackPressureError):
        return Overloaded("the engines have as many requests as they take; try again later")
    if isinstance(error, RayActorError) or isinstance(cause, RayActorError):
        return EngineLost("the engine died while it worked on the request")
    if isinstance(error, RayServeException | TaskCancelledError):
        return EngineUnavailable("no engine could take the request")
    log.error("a call to an engine failed", exc_info=error)
    return EngineFault("the engine failed; its log says why")
