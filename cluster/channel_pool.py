"""Keeps one channel to every shard of the present map, connecting in a thread of its own so that no step ever waits for
a handshake. Hands channels over; knows nothing of calls or rows."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from .expert_map import ExpertMap, ShardEndpoint
from .transport import Channel, HandshakeRefused, PeerLost

logger = logging.getLogger(__name__)

Connect = Callable[[ShardEndpoint, ExpertMap], Channel]

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.05, 1.0


@dataclass(slots=True)
class _Target:
    """A shard of the map."""

    endpoint: ShardEndpoint
    connected: bool = False
    retry_at: float = 0.0
    delay_s: float = _FIRST_DELAY_S


class ChannelPool:
    """Callbacks run on the pool's thread. `on_channel(shard_id, channel)`: a new connection, now the receiver's to
    close. `on_failed(shard_id, reason)`: a shard of the map broke off, or cannot be reached; it is tried again as long
    as it is in the map. Whatever else connecting or a callback raises is logged, and counts as a shard out of reach."""

    def __init__(
        self,
        connect: Connect,
        *,
        on_channel: Callable[[str, Channel], None],
        on_failed: Callable[[str, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect = connect
        self._on_channel = on_channel
        self._on_failed = on_failed
        self._clock = clock
        self._map: ExpertMap | None = None
        self._targets: dict[str, _Target] = {}
        self._lost: list[tuple[str, str]] = []
        self._changed = threading.Condition()
        self._closing = False
        self.faults = 0
        """Unexpected errors, each of them logged."""
        self._thread = threading.Thread(target=self._loop, name="herd-channels", daemon=True)
        self._thread.start()

    def update(self, map: ExpertMap) -> None:
        """Follow another map, from any thread."""
        with self._changed:
            self._map = map
            self._targets = {
                shard_id: self._targets.get(shard_id) or _Target(endpoint) for shard_id, endpoint in map.shards.items()
            }
            self._changed.notify()

    def lost(self, shard_id: str, reason: str) -> None:
        """The receiver found a channel broken, from any thread."""
        with self._changed:
            self._lost.append((shard_id, reason))
            target = self._targets.get(shard_id)
            if target is not None:
                target.connected = False
                target.retry_at = self._clock() + target.delay_s
            self._changed.notify()

    def close(self) -> None:
        """Stop connecting. Channels that were handed over are the receiver's."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._lost or self._due() is not None):
                    self._changed.wait(self._pause_s())
                if self._closing:
                    return
                lost, self._lost = self._lost, []
                due, map_ = self._due(), self._map
            for shard_id, reason in lost:
                self._report(shard_id, reason)
            if due is not None and map_ is not None:
                self._try(due, map_)

    def _due(self) -> _Target | None:
        now = self._clock()
        waiting = [target for target in self._targets.values() if not target.connected and target.retry_at <= now]
        return min(waiting, key=lambda target: target.retry_at, default=None)

    def _pause_s(self) -> float | None:
        waiting = [target.retry_at for target in self._targets.values() if not target.connected]
        return max(0.0, min(waiting) - self._clock()) if waiting else None

    def _try(self, target: _Target, map_: ExpertMap) -> None:
        shard_id = target.endpoint.shard_id
        try:
            self._hand_over(target, self._connect(target.endpoint, map_))
        except Exception as error:  # the edge of the thread: one shard's trouble must not cut off the others
            with self._changed:
                target.connected = False
                target.retry_at = self._clock() + target.delay_s
                target.delay_s = min(2 * target.delay_s, _LONGEST_DELAY_S)
            if isinstance(error, HandshakeRefused):
                logger.warning("shard %s refused this engine: %s", shard_id, error)
            elif not isinstance(error, PeerLost):
                self.faults += 1
                logger.exception("connecting to shard %s failed", shard_id)
            self._report(shard_id, str(error))

    def _hand_over(self, target: _Target, channel: Channel) -> None:
        shard_id = target.endpoint.shard_id
        with self._changed:
            wanted = self._targets.get(shard_id) is target and not self._closing
            target.connected = True
        if not wanted:
            channel.close()
            return
        try:
            self._on_channel(shard_id, channel)
        except Exception:
            channel.close()
            raise
        with self._changed:
            target.delay_s = _FIRST_DELAY_S

    def _report(self, shard_id: str, reason: str) -> None:
        try:
            self._on_failed(shard_id, reason)
        except Exception:  # the edge of the thread, as above
            self.faults += 1
            logger.exception("nobody could be told that shard %s is out of reach", shard_id)
