"""What every HTTP handler of one gateway shares: the model's text side, the engines, limits, admission and metrics.
Knows nothing of requests' shapes nor of how an engine is reached."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from ..cluster.errors import EngineUnavailable, HerdError, Overloaded, UnknownModel
from ..cluster.metrics import GatewayMetrics
from ..model.chat_format import ChatFormat
from ..model.tokenizer import Tokenizer
from .config import GatewayConfig
from .generation_stream import Engines
from .protocol import Limits, SamplingDefaults

log = logging.getLogger("herd.gateway")

READY_FOR_S = 1.0
"""How long an engine's answer counts as a sign of life."""
PROBE_TIMEOUT_S = 2.0
STATUS_TIMEOUT_S = 2.0
"""How long the answer about the cluster waits for its router."""
OFFLOAD_CHARACTERS = 20_000
"""Longer texts are tokenized in a thread, so that they do not stall other streams."""

T = TypeVar("T")


class Service:
    """The state behind one gateway's handlers."""

    def __init__(
        self,
        config: GatewayConfig,
        *,
        served_names: Sequence[str],
        tokenizer: Tokenizer,
        chat_format: ChatFormat,
        vocab_size: int,
        engines: Engines,
        metrics: GatewayMetrics,
        defaults: SamplingDefaults | None = None,
        returns_request_id: bool = True,
        cluster_status: Callable[[], Awaitable[Mapping[str, Any]]] | None = None,
    ) -> None:
        """`vocab_size`: the model's; its tokenizer may know fewer ids. `returns_request_id`: put `x-request-id` into
        answers; not where what stands before the gateway does it. `cluster_status`: asks the expert router, raises
        HerdError; None where the engines hold the experts themselves."""
        if not served_names:
            raise ValueError("a gateway serves at least one model name")
        self.config = config
        self.served_names = tuple(served_names)
        self.tokenizer = tokenizer
        self.chat_format = chat_format
        self.engines = engines
        self.metrics = metrics
        self.defaults = defaults or SamplingDefaults()
        self.returns_request_id = returns_request_id
        self.created = int(time.time())
        self.vocab_size = vocab_size
        self._ask_router = cluster_status
        self._asked_router: asyncio.Future[Mapping[str, Any]] | None = None
        self._in_flight = 0
        self._limits: Limits | None = None
        self._info: Mapping[str, Any] = {}
        self._answered_at = float("-inf")
        self._probe: asyncio.Task[None] | None = None

    @property
    def limits(self) -> Limits:
        """Raises EngineUnavailable until an engine has said how long a context it takes."""
        if self._limits is None:
            raise EngineUnavailable("the model is still loading", retry_after_s=5.0)
        return self._limits

    @property
    def max_model_len(self) -> int | None:
        """None while no engine has answered."""
        return self._limits.max_model_len if self._limits else None

    @property
    def info(self) -> Mapping[str, Any]:
        """What an engine last said of the model; empty before."""
        return self._info

    def resolve_model(self, name: str | None) -> str:
        """The served name a request means. Raises UnknownModel, which names those there are."""
        if name is None or name in self.served_names:
            return name or self.served_names[0]
        served = ", ".join(repr(n) for n in self.served_names)
        raise UnknownModel(f"The model {name[:200]!r} does not exist. This server serves {served}.", param="model")

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Hold one of the gateway's places. Raises Overloaded at once if there is none."""
        if self._in_flight >= self.config.max_inflight:
            raise Overloaded(f"{self._in_flight} requests are in flight, which is the limit; try again later")
        self._in_flight += 1
        self.metrics.in_flight.set(self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= 1
            self.metrics.in_flight.set(self._in_flight)

    async def off_loop(self, characters: int, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)`, in a thread if it has so much text to work on that it would stall other streams."""
        if characters < OFFLOAD_CHARACTERS:
            return function(*args)
        return await asyncio.to_thread(function, *args)

    async def probe(self) -> bool:
        """Whether an engine answers now, or did a moment ago. Concurrent probes share one call."""
        if time.monotonic() - self._answered_at < READY_FOR_S:
            return True
        if self._probe is None or self._probe.done():
            self._probe = asyncio.get_running_loop().create_task(self._ask(), name="herd-probe")
        asked = self._probe
        await asyncio.wait((asked,), timeout=PROBE_TIMEOUT_S)
        return asked.done() and time.monotonic() - self._answered_at < READY_FOR_S

    async def cluster_status(self) -> dict[str, Any]:
        """What the router says of the cluster, with the engines' figures as this gateway heard them. A router that is
        away is null, and `router_error` says why."""
        own = {"name": self.served_names[0], "engine_stats": self.metrics.engines.latest()}
        if self._ask_router is None:
            return {"mode": "local"} | own
        if self._asked_router is None or self._asked_router.done():  # one call at a time, however many want to know
            self._asked_router = asyncio.ensure_future(self._ask_router())
        asked = self._asked_router
        await asyncio.wait((asked,), timeout=STATUS_TIMEOUT_S)
        try:
            known = asked.result()
        except asyncio.InvalidStateError:
            known = {"router": None, "router_error": f"no answer within {STATUS_TIMEOUT_S:.0f} s"}
        except HerdError as error:
            known = {"router": None, "router_error": error.message}
        return {"mode": "shards"} | own | dict(known)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the gateway runs: asks in the background until an engine has answered."""
        learner = asyncio.get_running_loop().create_task(self._learn_limits(), name="herd-learn-limits")
        try:
            yield
        finally:
            learner.cancel()

    async def _learn_limits(self) -> None:
        while self._limits is None:
            await self._ask()
            if self._limits is None:
                await asyncio.sleep(1.0)

    async def _ask(self) -> None:
        try:
            info = await self.engines.info()
        except HerdError as error:
            log.warning("no engine answers: %s", error.message)
            return
        self._info = info
        self._answered_at = time.monotonic()
        self._limits = Limits(
            max_model_len=int(info["max_model_len"]),
            vocab_size=self.vocab_size,
            max_n=self.config.max_n,
            max_logprobs=self.config.max_logprobs,
        )
