"""Expert shards as threads of the test's process: real servers, sockets and slots, real placement, real experts; only
the processes and the router are left out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from herd.cluster.dispatch import Dispatcher
from herd.cluster.expert_compute import ExpertCompute
from herd.cluster.expert_map import Expert, ExpertMap, ShardEndpoint
from herd.cluster.experts_config import ExpertsConfig
from herd.cluster.placement import place
from herd.cluster.transport import Channel, RowLayout
from herd.cluster.transport_connect import connect
from herd.cluster.transport_server import TransportServer
from herd.model.config import Llama4Config
from herd.model.loading import Loader

TOKEN, MODEL, NODE = "token", "model", "node"


class ShardThreads:
    """`num_shards` shards with `copies` of every expert, and a dispatcher over them."""

    def __init__(
        self,
        config: Llama4Config,
        loader: Loader,
        dtype: torch.dtype,
        *,
        num_shards: int,
        copies: int = 1,
        tcp: bool = False,
        max_rows: int = 64,
        settings: ExpertsConfig | None = None,
    ) -> None:
        experts = [(layer, e) for layer in sorted(config.moe_layers) for e in range(config.num_experts)]
        nodes = [NODE] * num_shards
        placed = place(dict.fromkeys(experts, 1), [None] * num_shards, nodes=nodes, replicas=copies)
        self._layout = RowLayout(config.hidden_size, dtype, torch.device("cpu"))
        self._node = "another node" if tcp else NODE
        self._max_rows = max_rows
        self.computes: list[ExpertCompute] = []
        self.servers: list[TransportServer] = []
        self._endpoints: dict[str, ShardEndpoint] = {}
        self._hosted: dict[str, tuple[Expert, ...]] = {}
        for slot, hosted in enumerate(placed.slots):
            self._start(slot, hosted, loader)
        self.dispatcher = Dispatcher(settings or ExpertsConfig(), experts=experts, connect=self._connect)
        self._epoch = 0
        self.publish()
        self.dispatcher.wait_complete(20)
        deadline = time.monotonic() + 20
        while self.dispatcher.stats()["shards_connected"] < num_shards and time.monotonic() < deadline:
            self.dispatcher.refresh()  # replicas, too
            time.sleep(0.001)

    def _start(self, slot: int, hosted: Sequence[Expert], loader: Loader) -> None:
        compute = ExpertCompute({expert: loader.expert(*expert) for expert in hosted})
        server = TransportServer(
            shard_id=f"shard-{slot}-{len(self.servers)}",
            token=TOKEN,
            model=MODEL,
            layout=self._layout,
            host="127.0.0.1",
            handler=compute,
            max_queued_rows=1 << 16,
        )
        server.start()
        host, port, uds = server.address
        name = f"shard-{slot}-{len(self.servers)}"
        self._endpoints[name] = ShardEndpoint(name, slot, NODE, host, port, uds)
        self._hosted[name] = tuple(hosted)
        self.computes.append(compute)
        self.servers.append(server)

    def publish(self) -> None:
        """Give the dispatcher the next map."""
        self._epoch += 1
        self.dispatcher.update(ExpertMap(self._epoch, MODEL, TOKEN, dict(self._endpoints), dict(self._hosted)))

    def _connect(self, endpoint: ShardEndpoint, map_: ExpertMap) -> Channel:
        return connect(
            endpoint,
            my_node_id=self._node,
            token=map_.token,
            model=map_.model,
            layout=self._layout,
            max_rows=self._max_rows,
            max_calls=4,
            timeout_s=5,
        )

    def close(self) -> None:
        self.dispatcher.stop()
        self.dispatcher.close()
        for server in self.servers:
            server.stop()


@contextmanager
def shard_threads(
    config: Llama4Config, loader: Loader, dtype: torch.dtype = torch.float32, **options: object
) -> Iterator[ShardThreads]:
    """Shards for as long as the context lasts."""
    shards = ShardThreads(config, loader, dtype, **options)  # pyright: ignore[reportArgumentType]
    try:
        yield shards
    finally:
        shards.close()
