"""Serve's request router for engines: adapts `cluster/affinity.py` to it. Each caller of the engines has its own,
running in its process. Knows Serve's router interface; what it decides is `PrefixAffinity`'s matter."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import Any

from ray.serve._private.common import ReplicaID
from ray.serve._private.replica_result import ReplicaResult
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from ..cluster.affinity import PrefixAffinity, prefix_hashes


class EngineRouter(RequestRouter):
    """Longest cached prefix among the not-overloaded engines, else the least loaded.

    The prompt is read from the call's own arguments (`generate(wire)`); calls without one go to the least loaded. Loads
    are counted here, at the moment of choice: Serve's own figures follow only once a request has been sent, by when a
    burst would have gone to one engine. Engines that the arguments name to `avoid` come last: a replica or its engine
    thread may be dead before Serve knows."""

    def initialize_state(self, spill: int = 4) -> None:
        """`spill` is `request_router_kwargs`' only entry (see `PrefixAffinity`)."""
        self._affinity = PrefixAffinity(spill=spill)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of one, best first: if the first cannot take the request Serve goes on to the next."""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        hashes = [] if pending_request is None else _hashes_of(pending_request)
        ranked = self._affinity.rank(hashes, by_name)
        ranked.sort(key=_avoided_by(pending_request).__contains__)  # keeps the order of the others
        if pending_request is not None and ranked:
            pending_request.routing_context.should_backoff = True
            self._assign(pending_request, ranked[0], hashes)
        return [[by_name[name]] for name in ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        request_id = pending_request.metadata.internal_request_id
        if self._affinity.replica_of(request_id) not in (None, replica_id.unique_id):
            self._affinity.assign(request_id, replica_id.unique_id, _hashes_of(pending_request))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._affinity.release(internal_request_id, replica_id.unique_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._forget_others()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._forget_others()

    def _assign(self, request: PendingRequest, name: str, hashes: list[bytes]) -> None:
        request_id = request.metadata.internal_request_id
        self._affinity.assign(request_id, name, hashes)

        def release_if_given_up(future: asyncio.Future[Any]) -> None:
            if future.cancelled():
                self._affinity.release(request_id)

        request.future.add_done_callback(release_if_given_up)

    def _forget_others(self) -> None:
        self._affinity.retain({replica_id.unique_id for replica_id in self.curr_replicas})


def _wire_of(request: PendingRequest) -> Mapping[str, Any]:
    wire = request.args[0] if request.args else None
    return wire if isinstance(wire, Mapping) else {}


def _avoided_by(request: PendingRequest | None) -> Collection[str]:
    return () if request is None else _wire_of(request).get("avoid", ())


def _hashes_of(request: PendingRequest) -> list[bytes]:
    fields = _wire_of(request).get("request")
    if not isinstance(fields, Mapping) or "prompt_ids" not in fields:
        return []
    return prefix_hashes(fields["prompt_ids"], fields.get("cache_salt") or "")
