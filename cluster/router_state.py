"""All decisions of the router: who may hold which share of the experts, who is alive, and the map that follows from it.
The clock is passed in; what carries the calls here and the map to the engines is another's matter.

Its owner stores `checkpoint()` whenever `changes` has grown and before anybody learns of the change, so that a router
that starts again never gives an epoch to another map than before."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .errors import DigestMismatch, PlacementError
from .expert_load import ClusterLoad
from .expert_map import Expert, ExpertMap, ShardEndpoint, pack_experts, unpack_experts
from .leases import Lease, LeaseState
from .placement import place
from .router_spec import RouterSpec
from .router_status import build_status
from .slot_choice import choose_slot
from .waiting_room import Asker, WaitingRoom

logger = logging.getLogger(__name__)

SUSPECT_S = 1.2
"""How long a shard that an engine lost may take for a sign of life."""
NAP_S = 0.5
"""Most of the time between two ticks that counts against shards: a router that was held up itself has not heard the
beats that wait for it."""
VACANT_S = 10.0
"""How long experts that nobody holds wait for a replacement before a shard that only mirrors others is let go for
them."""
ENGINE_MEMORY_S = 60.0
"""An engine that was not heard of for so long is no longer shown."""


class RouterState:
    """The shards of one model. Its owner calls it from one thread."""

    def __init__(
        self,
        spec: RouterSpec,
        clock: Callable[[], float],
        *,
        token: str,
        lease_ttl_s: float = 2.0,
        gather_s: float = 5.0,
    ) -> None:
        self.spec = spec
        self.lease_ttl_s = lease_ttl_s
        self.gather_s = gather_s
        self.map = ExpertMap(0, spec.model, token)
        self.changes = 0
        """Grows with everything that a checkpoint holds."""
        self._clock = clock
        self._started = self._ticked = self._heard_at = clock()
        self._restarts = 0
        self._slots: tuple[tuple[Expert, ...], ...] = ()
        """The experts of each slot; empty until enough shards have asked to divide the experts among them."""
        self._leases: dict[str, Lease] = {}
        self._digests: dict[Expert, str] = {}
        self._orphaned_at: float | None = None
        """Since when a vacant slot has experts that nobody holds."""
        self._waiting = WaitingRoom(max(lease_ttl_s, gather_s))
        self._engines: dict[str, tuple[int, float]] = {}
        self._load = ClusterLoad()

    @property
    def missing(self) -> tuple[Expert, ...]:
        """The experts that no ready shard hosts."""
        return tuple(expert for expert in self.spec.experts if expert not in self.map.replicas)

    @property
    def idle_s(self) -> float:
        """How long no shard and no engine was heard of."""
        return self._clock() - self._heard_at

    # What shards say

    def request_lease(
        self,
        shard_id: str,
        node_id: str,
        gpu: str,
        capacity_bytes: int | None,
        hosted: Sequence[Expert] = (),
        pid: int = 0,
    ) -> Lease | None:
        """What this shard is to hold. None: not known yet, ask again soon (several times per `lease_ttl_s`). `hosted`:
        what it still holds of an earlier lease. Raises PlacementError; the shard may ask again, as may others."""
        now = self._heard()
        if shard_id in self._leases:
            lease = self._leases[shard_id]
            lease.renew(now, self.lease_ttl_s)
            return lease
        asker = Asker(shard_id, node_id, gpu, capacity_bytes, tuple(sorted(hosted)), pid)
        first_asked = self._waiting.ask(asker, now)
        if not self._slots:
            self._divide(now)
            return self._leases.get(shard_id)
        # Where nothing is vacant, the process that it replaces may be dead without our knowing yet.
        may_mirror = all(lease.heard_at > first_asked for lease in self._leases.values())
        try:
            slot = choose_slot(asker, self._slots, self.spec.num_bytes, self._leases.values(), may_mirror=may_mirror)
        except PlacementError:
            self._waiting.leave(shard_id)
            raise
        return None if slot is None else self._grant(asker, slot, now)

    def check_digests(self, shard_id: str, digests: Mapping[Expert, str]) -> None:
        """Compare what a shard loaded with what the first loader of each expert had. Raises DigestMismatch."""
        for (layer, expert), digest in sorted(digests.items()):
            known = self._digests.get((layer, expert), digest)
            if digest != known:
                raise DigestMismatch(
                    f"layer {layer}, expert {expert}: shard {shard_id} loaded weights with digest {digest}, "
                    f"the cluster has {known}"
                )
        if not digests.keys() <= self._digests.keys():
            self._digests.update(digests)
            self.changes += 1

    def ready(self, shard_id: str, *, host: str, port: int, uds: str) -> int | None:
        """The shard serves from now on. Returns the epoch of the first map that it is in. None: it has no lease
        (any more), ask for one again."""
        now = self._heard()
        lease = self._leases.get(shard_id)
        if lease is None:
            return None
        lease.renew(now, self.lease_ttl_s)
        if not lease.is_serving:
            lease.endpoint = ShardEndpoint(shard_id, lease.slot, lease.node_id, host, port, uds)
            lease.advance(LeaseState.READY)
            lease.entered = self.map.epoch + 1
            self._publish()
        return lease.entered

    def beat(self, shard_id: str, load: Mapping[str, Any]) -> bool:
        """A sign of life of a shard with a lease, also while it loads, with its load (see `expert_load.py`). False: it
        has no lease (any more), ask for one again."""
        now = self._heard()
        lease = self._leases.get(shard_id)
        if lease is None:
            return False
        lease.renew(now, self.lease_ttl_s)
        self._load.beat(shard_id, lease.experts, load, now)
        return True

    def leave(self, shard_id: str) -> None:
        """The shard ends in good order: the next map is without it."""
        self._heard()
        self._waiting.leave(shard_id)
        if shard_id in self._leases:
            self._let_go([self._leases[shard_id]], "it left")

    # What engines say

    def report_lost(self, shard_id: str, by: str) -> None:
        """Engine `by` cannot reach the shard, which goes unless it beats within SUSPECT_S."""
        if shard_id in self._leases:
            logger.info("engine %s lost shard %s", by, shard_id)
            self._leases[shard_id].suspect(self._clock() + SUSPECT_S)

    def follow(self, engine_id: str, epoch: int) -> None:
        """The engine has seen the map of that epoch."""
        self._engines[engine_id] = (epoch, self._heard())

    # What time does

    def tick(self) -> bool:
        """Let go of shards that were not heard of in time; to be called some times per NAP_S. True: the map changed."""
        now, epoch = self._clock(), self.map.epoch
        slept, self._ticked = now - self._ticked - NAP_S, now
        if slept > 0:
            for lease in self._leases.values():
                lease.expires_at = min(lease.expires_at + slept, now + self.lease_ttl_s)
        late = [lease for lease in self._leases.values() if lease.expires_at <= now]
        if late:
            self._let_go(late, "not heard of in time")
        self._release_mirror(now)
        self._engines = {i: seen for i, seen in self._engines.items() if now - seen[1] < ENGINE_MEMORY_S}
        return self.map.epoch > epoch

    # What others see

    def status(self) -> dict[str, Any]:
        """All that is known, as plain values."""
        now = self._clock()
        router = {"restarts": self._restarts, "up_s": now - self._started}
        found = build_status(self.spec, self.map, self._leases.values(), self._load, self._engines, now)
        return found | {"router": router}

    def checkpoint(self) -> bytes:
        """All that must outlive the router's process. Loads and those who wait for a lease will be heard of again."""
        state = {
            "spec": self.spec.to_wire(),
            "token": self.map.token,
            "lease_ttl_s": self.lease_ttl_s,
            "gather_s": self.gather_s,
            "restarts": self._restarts,
            "epoch": self.map.epoch,
            "slots": [pack_experts(experts) for experts in self._slots],
            "leases": [lease.to_wire() for lease in self._leases.values()],
            "digests": [[*expert, digest] for expert, digest in self._digests.items()],
        }
        return json.dumps(state, separators=(",", ":")).encode()

    @classmethod
    def restore(cls, data: bytes, clock: Callable[[], float]) -> RouterState:
        """The state that wrote `data`, with the same map and epoch. Every lease gets its whole time again: its holder
        could not beat while there was no router."""
        wire = json.loads(data)
        state = cls(
            RouterSpec.from_wire(wire["spec"]),
            clock,
            token=wire["token"],
            lease_ttl_s=wire["lease_ttl_s"],
            gather_s=wire["gather_s"],
        )
        state._restarts = wire["restarts"] + 1
        state._slots = tuple(unpack_experts(experts) for experts in wire["slots"])
        for fields in wire["leases"]:
            lease = Lease.from_wire(fields, state._slots[fields["slot"]], clock(), state.lease_ttl_s)
            state._leases[lease.shard_id] = lease
        state._digests = {(layer, expert): digest for layer, expert, digest in wire["digests"]}
        state._publish(wire["epoch"])
        return state

    # Changes

    def _divide(self, now: float) -> None:
        """Divide the experts among the shards that ask, once all have asked or the first has waited long enough: those
        that are absent are taken to be like the others. Raises PlacementError, which every asker will hear."""
        askers = self._waiting.gathered(self.spec.shards, self.gather_s, now)
        if askers is None:
            return
        num_absent = self.spec.shards - len(askers)
        capacities = [asker.capacity_bytes for asker in askers]
        typical = sorted(capacities, key=lambda c: math.inf if c is None else c)[(len(capacities) - 1) // 2]
        try:
            placement = place(
                self.spec.sizes,
                [*capacities, *[typical] * num_absent],
                nodes=[*(asker.node_id for asker in askers), *(f"absent {i}" for i in range(num_absent))],
                replicas=self.spec.replicas,
                redundancy=self.spec.redundancy,
                previous=[*(asker.hosted for asker in askers), *[()] * num_absent],
            )
        except PlacementError as error:
            self._waiting.refuse(error.message)
            raise
        self._slots = placement.slots
        for slot, asker in enumerate(askers):
            self._grant(asker, slot, now)

    def _release_mirror(self, now: float) -> None:
        """After a rolling update or a lost node there may be as many shards as slots, but two in one slot and none in
        another. One of the two is let go: it will ask for a lease and get the vacant slot."""
        vacant = set(range(len(self._slots))) - {lease.slot for lease in self._leases.values()}
        held = {expert for lease in self._leases.values() for expert in lease.experts} if vacant else set()
        if all(held.issuperset(self._slots[slot]) for slot in vacant):
            self._orphaned_at = None
            return
        if self._orphaned_at is None:
            self._orphaned_at = now
        serving = Counter(lease.slot for lease in self._leases.values() if lease.is_serving)
        mirrors = [lease for lease in self._leases.values() if lease.is_serving and serving[lease.slot] > 1]
        if mirrors and now - self._orphaned_at >= VACANT_S:
            self._orphaned_at = now
            self._let_go([max(mirrors, key=lambda lease: lease.entered)], "needed elsewhere")

    def _grant(self, asker: Asker, slot: int, now: float) -> Lease:
        self._waiting.leave(asker.shard_id)
        lease = Lease(
            shard_id=asker.shard_id,
            slot=slot,
            experts=self._slots[slot],
            node_id=asker.node_id,
            gpu=asker.gpu,
            pid=asker.pid,
            heard_at=now,
            expires_at=now + self.lease_ttl_s,
        )
        self._leases[lease.shard_id] = lease
        self.changes += 1
        return lease

    def _let_go(self, leases: Iterable[Lease], why: str) -> None:
        """End these leases; one new map for all of them."""
        serving = False
        for lease in leases:
            logger.info("shard %s gives up slot %d: %s", lease.shard_id, lease.slot, why)
            serving |= lease.is_serving
            lease.advance(LeaseState.GONE)
            del self._leases[lease.shard_id]
            self._load.forget(lease.shard_id)
        self.changes += 1
        if serving:
            self._publish()

    def _publish(self, epoch: int | None = None) -> None:
        """A map of the shards that serve now, by default under the next epoch."""
        serving = [lease for lease in self._leases.values() if lease.is_serving]
        serving.sort(key=lambda lease: (lease.slot, lease.shard_id))
        self.map = ExpertMap(
            epoch=self.map.epoch + 1 if epoch is None else epoch,
            model=self.spec.model,
            token=self.map.token,
            shards={lease.shard_id: lease.endpoint for lease in serving if lease.endpoint is not None},
            hosted={lease.shard_id: lease.experts for lease in serving},
        )
        self.changes += 1

    def _heard(self) -> float:
        self._heard_at = self._clock()
        return self._heard_at
