"""How shards, engines and gateways reach the router actor, from any thread: finds or creates it by name, follows it
through its restarts, and tells an absent router from one that refuses. Knows nothing of what is said."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ..cluster.errors import ExpertUnavailable, HerdError
from ..cluster.router_spec import RouterSpec
from .expert_router import NAMESPACE, ExpertRouter

CALL_S = 5.0
"""A router that answers takes milliseconds; one that starts again, seconds."""


class RouterAway(ExpertUnavailable):
    """The router does not answer now. Ray starts it again; what it has stored comes back with it."""


class RouterClient:
    """One router, by its spec and the application that it belongs to."""

    def __init__(self, application: str, spec: RouterSpec) -> None:
        self.spec = spec
        self.name = router_name(application, spec)
        self._actor: Any = None
        self._finding = threading.Lock()

    def call(self, method: str, *args: Any, timeout_s: float = CALL_S) -> Any:
        """What the router's `method` returns. Raises its HerdError, or RouterAway. Blocks: not on an event loop."""
        with self._explaining():
            # Not ray.get, which warns about the event loop of the process, whatever the thread.
            return self._submit(method, args).result(timeout_s)

    async def status(self) -> dict[str, Any]:
        """What `ExpertRouter.status` says. Raises RouterAway."""
        with self._explaining():
            future = await asyncio.to_thread(self._submit, "status", ())
            async with asyncio.timeout(CALL_S):
                return await asyncio.wrap_future(future)

    def _submit(self, method: str, args: tuple[Any, ...]) -> Future[Any]:
        with self._finding:
            if self._actor is None:
                self._actor = self._find()
            actor = self._actor
        return getattr(actor, method).remote(*args).future()

    def _find(self) -> Any:
        router = ray.remote(ExpertRouter).options(
            name=self.name,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=10_000,
            num_cpus=0,
            # The head's end is the cluster's end; any other node may go.
            resources={"node:__internal_head__": 0.001},
        )
        try:
            return router.remote(self.name, self.spec.to_wire())
        except (RayError, ValueError, ConnectionError) as error:
            raise RouterAway(f"the expert router cannot be started: {error}") from error

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Turn Ray's errors into Herd's; a defect of the router stays what it is."""
        try:
            yield
        except TimeoutError as error:
            raise RouterAway("the expert router does not answer") from error
        except RayTaskError as error:
            if isinstance(error.cause, HerdError):
                raise error.cause from error
            raise
        except RayError as error:
            self._actor = None  # it may have ended for good: look it up anew
            is_restarting = isinstance(error, RayActorError)
            why = "is starting again" if is_restarting else f"cannot be reached: {error}"
            raise RouterAway(f"the expert router {why}") from error


def router_name(application: str, spec: RouterSpec) -> str:
    """Other weights or another number of shards or copies mean another router."""
    digest = hashlib.blake2b(json.dumps(spec.to_wire(), sort_keys=True).encode(), digest_size=6).hexdigest()
    return f"router-{application}-{digest}"
