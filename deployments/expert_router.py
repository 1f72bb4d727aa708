"""The router as a Ray actor: carries calls to a `RouterState`, stores its checkpoints before anybody learns of a change
and hands new maps to the engines that wait for one. Decides nothing itself; others reach it through `router_client.py`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import RayError
from ray.experimental import internal_kv

from ..cluster.errors import ExpertUnavailable
from ..cluster.expert_map import ExpertMap, pack_experts, unpack_experts
from ..cluster.router_spec import RouterSpec
from ..cluster.router_state import RouterState

logger = logging.getLogger(__name__)

NAMESPACE = "herd"
_TICK_S = 0.1
_IDLE_S = 600.0
"""Without a sign of any shard or engine for so long, the router is not needed any more."""


class Store(Protocol):
    """Where one router's checkpoint outlives its process. Calls block."""

    def read(self) -> bytes | None: ...

    def write(self, checkpoint: bytes) -> None:
        """Raises RayError or OSError."""
        ...

    def delete(self) -> None: ...


class GcsStore:
    """In the key-value store of Ray's head."""

    def __init__(self, name: str) -> None:
        self._key = f"{name}-checkpoint"

    def read(self) -> bytes | None:
        return internal_kv._internal_kv_get(self._key, namespace=NAMESPACE)

    def write(self, checkpoint: bytes) -> None:
        internal_kv._internal_kv_put(self._key, checkpoint, overwrite=True, namespace=NAMESPACE)

    def delete(self) -> None:
        internal_kv._internal_kv_del(self._key, namespace=NAMESPACE)


class ExpertRouter:
    """Arguments and results are plain values, experts packed (`pack_experts`). Errors are HerdErrors; after an
    ExpertUnavailable the change is made but not stored yet, and to be asked for again."""

    async def __init__(self, name: str, spec: Mapping[str, Any], store: Store | None = None) -> None:
        _log_to_stderr()
        self._name = name
        self._store = store or GcsStore(name)
        checkpoint = self._store.read()
        if checkpoint is None:
            self._state = RouterState(RouterSpec.from_wire(spec), time.monotonic, token=secrets.token_hex(32))
        else:
            self._state = RouterState.restore(checkpoint, time.monotonic)
            logger.warning("router %s is back with the map of epoch %d", name, self._state.map.epoch)
        self._published: ExpertMap = self._state.map
        self._stored = 0
        self._faults = 0
        self._storing = asyncio.Lock()
        self._news = asyncio.Event()
        self._ticker = asyncio.get_running_loop().create_task(self._tick())

    async def request_lease(
        self, shard_id: str, node_id: str, gpu: str, capacity_bytes: int | None, hosted: Sequence[Any], pid: int
    ) -> dict[str, Any] | None:
        """See `RouterState.request_lease`; with the token that engines will have to prove."""
        lease = self._state.request_lease(shard_id, node_id, gpu, capacity_bytes, unpack_experts(hosted), pid)
        await self._commit()
        if lease is None:
            return None
        return {"slot": lease.slot, "experts": pack_experts(lease.experts), "token": self._state.map.token}

    async def check_digests(self, shard_id: str, digests: Sequence[tuple[int, int, str]]) -> None:
        """See `RouterState.check_digests`; `digests` holds (layer, expert, digest)."""
        self._state.check_digests(shard_id, {(layer, expert): digest for layer, expert, digest in digests})
        await self._commit()

    async def ready(self, shard_id: str, host: str, port: int, uds: str) -> int | None:
        """See `RouterState.ready`."""
        epoch = self._state.ready(shard_id, host=host, port=port, uds=uds)
        await self._commit()
        return epoch

    async def beat(self, shard_id: str, load: Mapping[str, Any]) -> bool:
        """See `RouterState.beat`."""
        return self._state.beat(shard_id, load)

    async def leave(self, shard_id: str, only_if_spared: bool = False) -> bool:
        """The shard goes; False: it was asked to stay because some expert has no other copy."""
        replicas = self._state.map.replicas
        if only_if_spared and any(len(replicas[e]) < 2 for e in self._state.map.hosted.get(shard_id, ())):
            return False
        self._state.leave(shard_id)
        await self._commit()
        return True

    async def report_lost(self, shard_id: str, engine_id: str) -> None:
        """See `RouterState.report_lost`."""
        self._state.report_lost(shard_id, engine_id)

    async def watch(self, engine_id: str, epoch: int, timeout_s: float) -> dict[str, Any] | None:
        """The map, as soon as its epoch differs from `epoch`, that of the map the engine has. None: nothing new within
        `timeout_s`."""
        self._state.follow(engine_id, epoch)
        if self._published.epoch == epoch:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._news.wait()
            except TimeoutError:
                return None
        return self._published.to_wire()

    async def status(self) -> dict[str, Any]:
        """See `RouterState.status`."""
        status = self._state.status()
        node = ray.get_runtime_context().get_node_id()
        status["router"] |= {"name": self._name, "node": node, "pid": os.getpid(), "faults": self._faults}
        return status

    async def _commit(self) -> None:
        """Store what changed; only then let others see it. Raises ExpertUnavailable."""
        async with self._storing:
            changes, expert_map = self._state.changes, self._state.map
            if changes == self._stored:
                return
            missing = len(self._state.missing)
            try:
                await asyncio.to_thread(self._store.write, self._state.checkpoint())
            except (RayError, OSError) as error:
                raise ExpertUnavailable(f"the expert router's change cannot be stored: {error}") from error
            self._stored = changes
            if expert_map is not self._published:
                self._published = expert_map
                self._news.set()
                self._news = asyncio.Event()
                logger.info(
                    "epoch %d: %d shards, %d experts missing", expert_map.epoch, len(expert_map.shards), missing
                )

    async def _tick(self) -> None:
        while self._state.idle_s < _IDLE_S:
            await asyncio.sleep(_TICK_S)
            try:
                self._state.tick()
                await self._commit()
            except Exception:
                # A checkpoint that cannot be stored now may be later; until then nobody sees the change.
                self._faults += 1
                logger.exception("the router's tick failed")
        logger.info("router %s is not needed any more", self._name)
        self._store.delete()
        ray.kill(ray.get_runtime_context().current_actor)


def _log_to_stderr() -> None:
    """Ray keeps an actor's stderr in a file of the node's logs."""
    herd = logging.getLogger("herd")
    if not herd.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s -- %(message)s"))
        herd.addHandler(handler)
        herd.setLevel(logging.INFO)
