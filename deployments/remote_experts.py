"""An engine's side of the expert shards, put together: the dispatcher, how it connects, and what keeps its map up to
date. Does none of the three's work."""

from __future__ import annotations

import logging

from ..cluster.dispatch import Dispatcher
from ..cluster.errors import ExpertUnavailable
from ..cluster.expert_map import ExpertMap, ShardEndpoint
from ..cluster.router_spec import RouterSpec
from ..cluster.transport import Channel, RowLayout
from ..cluster.transport_connect import connect
from .config import HerdConfig
from .map_watcher import MapWatcher
from .router_client import RouterClient

logger = logging.getLogger("herd.engine")

_MAX_ROWS = 512
"""Of one call, where no step size is configured; larger ones are split."""
_MAX_CALLS = 8
_CONNECTION_BYTES = 64 << 20
"""For the rows of all calls of one connection."""
_CONNECT_S = 2.0
_WAIT_S = 15.0


class RemoteExperts:
    """`backend` computes the routed experts of one engine in shards."""

    def __init__(
        self,
        config: HerdConfig,
        spec: RouterSpec,
        layout: RowLayout,
        *,
        application: str,
        engine_id: str,
        node_id: str,
    ) -> None:
        """Follows the router at once; connections come up beside whatever the engine does meanwhile."""
        self._layout = layout
        self._node_id = node_id
        wanted = config.engine.max_num_batched_tokens or _MAX_ROWS
        self._max_rows = max(1, min(wanted, _CONNECTION_BYTES // _MAX_CALLS // layout.row_bytes))
        self._watcher = MapWatcher(RouterClient(application, spec).call, engine_id)
        self.backend = Dispatcher(
            config.experts, experts=spec.experts, connect=self._connect, on_failed=self._watcher.report_lost
        )
        self._watcher.start(self.backend.update)

    def wait(self) -> None:
        """Return once every expert can be reached, however long the shards load. Before the first step."""
        while True:
            try:
                return self.backend.wait_complete(_WAIT_S)
            except ExpertUnavailable as error:
                logger.info("waiting for the expert shards: %s", error.message)

    def stats(self) -> dict[str, float]:
        """The dispatcher's figures, for the engine's."""
        figures = self.backend.stats() | {"watch_faults": self._watcher.faults}
        return {f"experts_{name}": value for name, value in figures.items()}

    def _connect(self, endpoint: ShardEndpoint, expert_map: ExpertMap) -> Channel:
        return connect(
            endpoint,
            my_node_id=self._node_id,
            token=expert_map.token,
            model=expert_map.model,
            layout=self._layout,
            max_rows=self._max_rows,
            max_calls=_MAX_CALLS,
            timeout_s=_CONNECT_S,
        )
