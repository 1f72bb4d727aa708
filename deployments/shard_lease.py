"""The lease of one shard process: asks the router for it, keeps it alive from a thread of its own while the process
loads and computes, and asks again when the router has let go of it. Knows neither weights nor sockets."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..cluster.errors import ExpertUnavailable, HerdError
from ..cluster.expert_map import Expert, pack_experts, unpack_experts

logger = logging.getLogger("herd.shard")

BEAT_S = 0.5
_BEAT_TIMEOUT_S = 2.0
_ASK_S = 0.1


class LeaseAbandoned(Exception):
    """The process is to end; it needs no lease any more."""


@dataclass(frozen=True, slots=True)
class ShardIdentity:
    """Who asks."""

    shard_id: str
    node_id: str
    gpu: str
    """Which GPU of its node; empty on CPU."""
    capacity_bytes: int | None
    """Room for experts; None: no limit."""
    pid: int


class ShardLease:
    """One shard's. `acquire`, `serve` and `leave` block and are for the thread that owns the shard."""

    def __init__(self, call: Callable[..., Any], identity: ShardIdentity) -> None:
        """`call`: `RouterClient.call`. An ExpertUnavailable of it (the router is away, or cannot store a change) means
        that it is to be repeated, any other HerdError that it is of no use."""
        self._call = call
        self._me = identity
        self._load: Callable[[], Mapping[str, Any]] = dict
        self._hosted: tuple[Expert, ...] = ()
        self._token = ""
        self._address: tuple[str, int, str] | None = None
        """Where it serves; None before it was in a map."""
        self._in_map = False
        """Whether the router has confirmed this shard's entry since it last did not know it."""
        self._on_entry: Callable[[int], None] = lambda epoch: None
        self._ending = threading.Event()
        self._beats: threading.Thread | None = None
        self.faults = 0
        """Beats that failed unexpectedly, each of them logged."""
        self.failure: str | None = None
        """Why this process cannot be a shard any more, if so: it has to be replaced."""

    def acquire(self, hosted: Iterable[Expert] = ()) -> tuple[tuple[Expert, ...], str]:
        """Ask until granted: (experts to hold, the cluster's token); from then on the lease is kept alive. Raises
        PlacementError, or LeaseAbandoned once `leave` was called."""
        while (lease := self._patiently(self._request, tuple(hosted))) is None:
            self._pause(_ASK_S)
        if self._beats is None:
            self._beats = threading.Thread(target=self._keep_alive, name="herd-beats", daemon=True)
            self._beats.start()
        self._token = lease["token"]
        return unpack_experts(lease["experts"]), self._token

    def check_digests(self, digests: Mapping[Expert, str]) -> None:
        """Have them compared with those of other copies. Raises DigestMismatch."""
        self._patiently(self._call, "check_digests", self._me.shard_id, [(*e, d) for e, d in digests.items()])

    def serve(
        self,
        experts: Iterable[Expert],
        address: tuple[str, int, str],
        load: Callable[[], Mapping[str, Any]],
        on_entry: Callable[[int], None],
    ) -> bool:
        """Enter the map: `experts` can be computed at `address`. `load` gives the figures of each beat; `on_entry` gets
        the epoch of the first map with this shard, now and after each return. False: acquire again."""
        self._hosted, self._load, self._on_entry = tuple(sorted(experts)), load, on_entry
        epoch = self._patiently(self._call, "ready", self._me.shard_id, *address)
        if epoch is not None:
            on_entry(epoch)
            self._in_map, self._address = True, address
        return epoch is not None

    def leave(self, only_if_spared: bool = False) -> bool:
        """Tell the router that this shard goes. False: not yet, some expert has no other copy. A router that does not
        answer counts as having been told; it will notice."""
        try:
            if not self._call("leave", self._me.shard_id, only_if_spared, timeout_s=_BEAT_TIMEOUT_S):
                return False
        except ExpertUnavailable:
            if only_if_spared:
                return False
        self._ending.set()
        return True

    def _request(self, hosted: tuple[Expert, ...]) -> dict[str, Any] | None:
        me = self._me
        return self._call(
            "request_lease", me.shard_id, me.node_id, me.gpu, me.capacity_bytes, pack_experts(hosted), me.pid
        )

    def _patiently(self, call: Callable[..., Any], *args: Any) -> Any:
        """Until the router is there and has stored it."""
        while True:
            try:
                return call(*args)
            except ExpertUnavailable:
                self._pause(_ASK_S)

    def _pause(self, seconds: float) -> None:
        if self._ending.wait(seconds):
            raise LeaseAbandoned

    def _keep_alive(self) -> None:
        while not self._ending.wait(BEAT_S):
            try:
                if not self._call("beat", self._me.shard_id, self._load(), timeout_s=_BEAT_TIMEOUT_S):
                    self._in_map = False
                # Also where the beat was known: an earlier return may have got no further than the lease.
                if not self._in_map and self._address is not None:
                    self._return(self._address)
            except ExpertUnavailable:
                continue
            except HerdError as error:
                self.failure = error.message
            except Exception:  # the edge of the thread: a shard that is not heard of loses its place
                self.faults += 1
                logger.exception("a beat failed")

    def _return(self, address: tuple[str, int, str]) -> None:
        """The router let go of this shard, which hung or was cut off: offer what it still holds."""
        lease = self._request(self._hosted)
        if lease is None or self._ending.is_set():
            return  # asked again with the next beat
        if lease["token"] != self._token:
            self._give_up("the router has forgotten everything and has another token")
        elif unpack_experts(lease["experts"]) != self._hosted:
            # This process cannot hold others beside its own: leave that slot to whoever replaces it.
            self._give_up("the router gave its experts to another shard while it was not heard of")
        elif (epoch := self._call("ready", self._me.shard_id, *address)) is not None:
            logger.warning("shard %s is back in the map of epoch %d", self._me.shard_id, epoch)
            self._on_entry(epoch)
            self._in_map = True

    def _give_up(self, why: str) -> None:
        self.failure = why
        self.leave()
