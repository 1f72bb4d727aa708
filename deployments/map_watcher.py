"""Keeps an engine's expert map up to date: a thread that waits for the router's next map, another that reports shards
that cannot be reached. Keeps the last map while the router is away. Knows neither channels nor rows."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from ..cluster.expert_map import ExpertMap
from .router_client import CALL_S, RouterAway

logger = logging.getLogger("herd.engine")

WATCH_S = 5.0
"""How long the router holds on to a question that has no answer yet; it hears of the engine as often."""
_PAUSE_S = 0.2


class MapWatcher:
    """One engine's."""

    def __init__(self, call: Callable[..., Any], engine_id: str) -> None:
        """`call`: `RouterClient.call`."""
        self._call = call
        self._engine_id = engine_id
        self._stopping = threading.Event()
        self.faults = 0
        """Unexpected errors, each of them logged."""
        self._lost: queue.SimpleQueue[str] = queue.SimpleQueue()

    def start(self, on_map: Callable[[ExpertMap], None]) -> None:
        """Hand every map to `on_map`, on a thread of the watcher, beginning with the one that there is."""
        threading.Thread(target=self._watch, args=(on_map,), name="herd-map-watch", daemon=True).start()
        threading.Thread(target=self._report, name="herd-map-report", daemon=True).start()

    def stop(self) -> None:
        """No further map; does not wait for a question that is under way."""
        self._stopping.set()

    def report_lost(self, shard_id: str, reason: str) -> None:
        """A shard of the map cannot be reached, from any thread. Does not wait."""
        logger.info("shard %s cannot be reached: %s", shard_id, reason)
        self._lost.put(shard_id)

    def _watch(self, on_map: Callable[[ExpertMap], None]) -> None:
        epoch = -1
        while not self._stopping.is_set():
            try:
                wire = self._call("watch", self._engine_id, epoch, WATCH_S, timeout_s=WATCH_S + CALL_S)
                if wire is not None and not self._stopping.is_set():
                    epoch = self._take(ExpertMap.from_wire(wire), on_map)
            except RouterAway as error:
                logger.info("no news of the experts: %s", error.message)
                self._stopping.wait(_PAUSE_S)
            except Exception:  # the edge of the thread: an engine must not be left with an old map for good
                self.faults += 1
                logger.exception("asking for the expert map failed")
                self._stopping.wait(_PAUSE_S)

    def _take(self, expert_map: ExpertMap, on_map: Callable[[ExpertMap], None]) -> int:
        # A map without any shard says no more than broken connections do, and may be that of a router that has
        # forgotten everything: the shards that still answer will be in its next one.
        if expert_map.shards:
            on_map(expert_map)
        return expert_map.epoch

    def _report(self) -> None:
        while not self._stopping.is_set():
            try:
                shard_id = self._lost.get(timeout=_PAUSE_S)
                self._call("report_lost", shard_id, self._engine_id)
            except (queue.Empty, RouterAway):
                continue  # a router that is away will miss the shard's beats itself
            except Exception:  # likewise
                self.faults += 1
                logger.exception("reporting a lost shard failed")
